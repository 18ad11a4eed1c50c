"""A tiny world in which a run takes seconds: BERT bases of width 32 and 60 queries over made-up words.

A query names a topic and a thing (`topic thing`), its passage the topic and the thing's partner among filler.
Words find the topic; which of its six passages is the right one has to be learned.
As a command: `python tests/tiny.py RECIPE RUNS` trains, or goes on; lists are kept in $RESONANCE_CACHE.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from common.config import DataConfig, EvalConfig, RerankerConfig, TrainConfig, load_recipe, to_dict
from common.errors import run_command

TOPICS, THINGS = 10, 6
WORDS = [
    a + b + c for a in ("ba", "do", "ki", "lu", "me") for b in "rntk" for c in ("o", "ax", "uv", "il", "em")
]
TOPIC_WORDS = [f"{a}{b}um" for a in "bdfgk" for b in ("ol", "an")]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PARTNERS = [f"{word}sh" for word in WORDS[: TOPICS * THINGS]]
FILLER = WORDS[TOPICS * THINGS :]
VOCABULARY = [*SPECIAL, *TOPIC_WORDS, *WORDS, *PARTNERS]
LAYER = "encoder.layer.{}."


@dataclass(frozen=True)
class World:
    """Where the tiny data and bases lie; `base` is a sentence encoder."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def data(self) -> Path:
        return self.root / "data.jsonl"

    def config(self, **train: Any) -> RerankerConfig:
        """A run of 12 steps on 1 layer, learning fast, without dropout; `train` changes TrainConfig."""
        settings: dict[str, Any] = {
            "epochs": 0.0,
            "max_steps": 12,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "hidden_dropout": 0.0,
            "checkpoint_every": 4,
            "evaluations": 3,
        }
        return RerankerConfig(
            name="tiny",
            model=replace(RerankerConfig().model, base=str(self.base)),
            data=DataConfig(
                name=str(self.data), list_size=4, negative_pool=6, max_passage_tokens=24, length_buckets=(32,)
            ),
            train=TrainConfig(**(settings | train)),
            evaluation=EvalConfig(depth=10, dev_depth=8),
        )


def build(root: Path) -> World:
    """Write the data and the sentence encoder."""
    world = World(root)
    write_base(world.base)
    (world.base / "modules.json").write_text(
        "[]"
    )  # what tells a sentence encoder from a masked language model
    rng = np.random.default_rng(0)
    rows = []
    for thing in range(TOPICS * THINGS):
        topic = TOPIC_WORDS[thing // THINGS]
        words = [topic, PARTNERS[thing], *rng.choice(FILLER, rng.integers(2, 12))]
        rows.append({"query": f"{topic} {WORDS[thing]}", "positive": " ".join(words)})
    world.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return world


def write_collection(folder: Path, words: list[str], *, queries: int, judged: int = 1) -> Path:
    """A BEIR folder with splits train and test: a query's passage says its two words, among others. With
    `judged` above 1 each query has so many judged passages, the others irrelevant."""
    rng = np.random.default_rng(len(words) + judged)
    pairs = [(a, b) for a in words for b in words if a < b]
    chosen = [pairs[i] for i in rng.permutation(len(pairs))[:queries]]
    passages = [" ".join(rng.permutation([*pair, *rng.choice(words, 3)])) for pair in chosen]
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", passages), ("queries", [" ".join(pair) for pair in chosen])):
        rows = [json.dumps({"_id": f"{name[0]}{i}", "text": text}) for i, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    for split, numbers in (("train", range(queries * 3 // 4)), ("test", range(queries * 3 // 4, queries))):
        lines = [f"q{i}\tc{(i + j) % queries}\t{int(j == 0)}\n" for i in numbers for j in range(judged)]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def write_base(directory: Path, *, seed: int = 0, head: bool = False, **settings: Any) -> Path:
    """A BERT checkpoint directory with random weights, and a `classifier` of one label when `head`."""
    config = {
        "model_type": "bert",
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "pad_token_id": 0,
    } | settings
    if head:
        config |= {
            "architectures": ["BertForSequenceClassification"],
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
        }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    save_file(random_tensors(config, seed, head), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def random_tensors(config: dict[str, Any], seed: int, head: bool) -> dict[str, np.ndarray]:
    """Weights under Hugging Face's names: N(0, 0.2), norms near 1; behind `bert.` with a head."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], width),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], width),
    }
    norms, linears = ["embeddings.LayerNorm"], {"pooler.dense": (width, width)}
    for layer in map(LAYER.format, range(config["num_hidden_layers"])):
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
        linears |= {f"{layer}attention.self.{name}": (width, width) for name in ("query", "key", "value")}
        linears |= {
            f"{layer}attention.output.dense": (width, width),
            f"{layer}intermediate.dense": (inner, width),
            f"{layer}output.dense": (width, inner),
        }
    shapes |= {f"{name}.weight": (width,) for name in norms} | {f"{name}.bias": (width,) for name in norms}
    shapes |= {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    if head:
        shapes = {f"bert.{name}": shape for name, shape in shapes.items()}
        shapes |= {"classifier.weight": (1, width), "classifier.bias": (1,)}
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    return {
        name: value + 1 if name.endswith("LayerNorm.weight") else value for name, value in tensors.items()
    }


def train(
    config: RerankerConfig,
    runs: Path,
    *,
    fresh: bool = False,
    say: Callable[[str], None] = print,
    backend: str = "jax",
) -> dict[str, Any]:
    """What the training command does before it evaluates: prepare, then train or resume."""
    from common.backends import load_encoder, load_trainer
    from common.reranker.prepare import load_data, load_old_data, prepare, run_fingerprint
    from common.runs import RunFolder

    data, old = load_data(config.data), load_old_data(config)
    encoder = config.model.base if config.data.encoder == "default" else config.data.encoder
    prepared = prepare(config, load_encoder(encoder, backend, say=say), data, old, say=say)
    folder = RunFolder.create(
        runs,
        config.name,
        to_dict(config),
        resume=not fresh,
        data_fingerprint=run_fingerprint(data, old),
    )
    with folder:
        return load_trainer(backend)(config, prepared, say=say).run(folder)


def command(config: RerankerConfig, runs: Path) -> list[str]:
    """The command line that trains `config` in a process of its own; its environment is `environment()`."""
    runs.mkdir(parents=True, exist_ok=True)
    recipe = runs / "recipe.py"
    recipe.write_text(f"from common.config import *\n\n\ndef get_config():\n    return {config!r}\n")
    return [sys.executable, "-u", str(Path(__file__).resolve()), str(recipe), str(runs)]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with the repository on the path."""
    return os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])} | changes


def main() -> None:
    train(load_recipe(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    run_command(main)
