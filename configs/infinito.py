"""Infinito's reference recipe: 71 M parameters, GPT-2 tokenizer, context 256, 256 slots, on WikiText-2.

    python scripts/train.py --config configs/infinito.py

Needs a GPU. The source hopes for a validation perplexity of 50 to 80; it was **not measured yet**. WikiText-2
is read from $RESONANCE_DATA/wikitext-2 or the hub, the tokenizer from $RESONANCE_DATA/tokenizers/gpt2 or the
hub.
The regularisation is what a corpus of two million words asks of a model of this size.
"""

from __future__ import annotations

from common.language.config import InfinitoConfig, InfinitoRecipe, LanguageDataConfig, LanguageTrainConfig


def get_config() -> InfinitoRecipe:
    """Twenty epochs of WikiText-2 in its literal form."""
    return InfinitoRecipe(
        name="infinito",
        model=InfinitoConfig(
            embedding_dropout=0.1, word_dropout=0.05, hidden_dropout=0.3, attention_dropout=0.1
        ),
        data=LanguageDataConfig(name="wikitext-2", form="literal", tokenizer="gpt2"),
        train=LanguageTrainConfig(
            epochs=20.0,
            batch_size=32,
            unroll=2,
            reset_rate=0.05,
            learning_rate=6e-4,
            weight_decay=0.5,
            average=0.999,
            evaluations=20,
            patience=5,
        ),
    )
