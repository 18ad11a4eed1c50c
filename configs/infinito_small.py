"""A small Infinito: an external memory beside the decoder, at most 5 M parameters, an 8k BPE of the corpus.

    python scripts/train.py --config configs/infinito_small.py [--preset smoke|wikitext|transformer|...]

The default trains on the documentation of the Python packages on this machine: no network. WikiText-2 in its
published split: --preset wikitext, from $RESONANCE_DATA/wikitext-2 or the hub. transformer and lstm are the
controls with as many parameters, no_memory and no_exploration the ablations; all on WikiText-2.

preset          what for                                      one core, 800 steps  test perplexity a word
(default)       a first language model                        not measured         not measured
smoke           everything runs, little is learned            under 2 minutes      not measured
wikitext        the numbers of the literature, literal form   6 min                738, 740, 729 (seeds 0 1 2)
transformer                                                   5 min                699, 740, 756
lstm                                                          7 min                1201
no_exploration                                                6 min                740
no_memory                                                     not measured         not measured

With `--train.max-steps 800`; docs/results.md. The memory helps nothing there.
"""

from __future__ import annotations

from collections.abc import Callable

from common.language.config import (
    InfinitoConfig,
    InfinitoRecipe,
    LanguageDataConfig,
    LanguageEvalConfig,
    LanguageTrainConfig,
)


def default() -> InfinitoRecipe:
    """About 3.7 M parameters, segments of 128 tokens, gradients through two of them."""
    return InfinitoRecipe(
        name="infinito_small",
        model=InfinitoConfig(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            context=128,
            memory_slots=64,
            memory_writes=16,
            hidden_dropout=0.1,
            embedding_dropout=0.1,
        ),
        data=LanguageDataConfig(max_dev_documents=20),
        train=LanguageTrainConfig(
            epochs=0.0,
            max_steps=600,
            batch_size=8,
            unroll=2,
            reset_rate=0.05,
            learning_rate=2e-3,
        ),
        evaluation=LanguageEvalConfig(batch_size=8),
    )


def smoke() -> InfinitoRecipe:
    """Two layers, thirty steps."""
    return default().changed(
        name="infinito_smoke",
        model={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        data={"vocab_size": 2048, "max_dev_documents": 3},
        train={"max_steps": 30, "evaluations": 2, "checkpoint_every": 10},
    )


def wikitext() -> InfinitoRecipe:
    """WikiText-2 as its files have it, every `<unk>` counted."""
    return default().changed(
        name="infinito_small_wikitext",
        data={"name": "wikitext-2", "form": "literal", "max_dev_documents": None},
    )


def transformer() -> InfinitoRecipe:
    """The control: as many parameters, no memory."""
    recipe = wikitext()
    return recipe.changed(name="transformer_small_wikitext", model={"architecture": "transformer"})


def lstm() -> InfinitoRecipe:
    """The baseline of the source: an LSTM of as many parameters."""
    return wikitext().changed(name="lstm_small_wikitext", model={"architecture": "lstm"})


def no_memory() -> InfinitoRecipe:
    """The same model without slots and their parameters."""
    return wikitext().changed(name="infinito_small_no_memory", model={"memory_slots": 0})


def no_exploration() -> InfinitoRecipe:
    """Without noise on the memory's queries."""
    return wikitext().changed(name="infinito_small_no_exploration", model={"exploration": 0.0})


PRESETS: dict[str, Callable[[], InfinitoRecipe]] = {
    "smoke": smoke,
    "wikitext": wikitext,
    "transformer": transformer,
    "lstm": lstm,
    "no_memory": no_memory,
    "no_exploration": no_exploration,
}


def get_config(preset: str | None = None) -> InfinitoRecipe:
    """The recipe of a preset; the embedded default without one."""
    return default() if preset is None else PRESETS[preset]()
