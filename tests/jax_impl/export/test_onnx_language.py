"""Graphs of language models compute what JAX computes: logits, tokens, memory, perplexity, any precision."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.language import TokenDocuments
from common.errors import UserError
from common.export import onnx_generation, onnx_language_scoring
from common.export.language_verification import SideBySide
from common.export.onnx_generation import past_inputs
from common.export.verification import PRECISIONS
from common.language.evaluation import evaluate_perplexity
from common.language.generation import SamplingConfig, generate
from jax_impl import generation, language_scoring
from jax_impl.export import onnx
from jax_impl.export.onnx_language import export_language_model
from tests.language_exports import CONTEXT, MODELS, checkpoint, export

NEW = 2 * CONTEXT + 1


class Numbers:
    """A tokenizer that ends at none."""

    end: int | None = None

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def marked(kind: str, *fast: str) -> Any:
    """A kind of MODELS as a parameter, slow unless it is named."""
    return kind if kind in fast else pytest.param(kind, marks=pytest.mark.slow)


def random_prompts(rng: np.random.Generator, vocabulary: int, segmented: bool) -> list[list[int]]:
    """Of several lengths; those of a segmented model over several segments, and just up to a border."""
    lengths = (5, CONTEXT, CONTEXT + 1, 1, 3 * CONTEXT + 2) if segmented else (5, 15, 1, 9)
    return [rng.integers(0, vocabulary, length).tolist() for length in lengths]


@pytest.mark.parametrize("kind", [marked(kind, "qwen3", "indra", "infinito") for kind in MODELS])
def test_greedy_tokens_and_logits_are_those_of_jax(tmp_path: Path, seed: int, kind: str) -> None:
    source = checkpoint(tmp_path / "source", MODELS[kind], seed)
    theirs = generation.load_engine(source)
    ours = onnx_generation.load_engine(export(source, tmp_path / "onnx"))
    known = [(engine.context, engine.segmented, engine.vocab_size) for engine in (theirs, ours)]
    assert known[0] == known[1]
    prompts = random_prompts(np.random.default_rng(seed), ours.vocab_size, ours.segmented)
    both = SideBySide(theirs, ours)
    generate(both, prompts, Numbers(), SamplingConfig(max_new_tokens=NEW))
    near = 1e-4 * max(1.0, both.largest)
    assert both.tokens >= len(prompts) * NEW
    assert max(part.max() for part in both.differences) < near
    assert max(both.regrets, default=0.0) < near  # another token only where two are equally likely


def test_rows_do_not_depend_on_their_neighbours_nor_on_where_their_padding_stands(tmp_path: Path) -> None:
    seed = 7  # equal tokens, which a tie may part
    folder = export(checkpoint(tmp_path / "source", MODELS["infinito"], seed), tmp_path / "onnx")
    engine = onnx_generation.load_engine(folder)
    prompts = random_prompts(np.random.default_rng(seed), engine.vocab_size, segmented=True)
    sampling = SamplingConfig(max_new_tokens=NEW)
    together = generate(engine, prompts, Numbers(), sampling)
    alone = [generate(engine, [prompt], Numbers(), sampling)[0] for prompt in prompts]
    assert [text.ids for text in together] == [text.ids for text in alone]


def test_the_memory_comes_out_as_jax_writes_it(tmp_path: Path, seed: int) -> None:
    source = checkpoint(tmp_path / "source", MODELS["infinito_first"], seed)
    theirs = generation.load_engine(source)
    ours = onnx_generation.load_engine(export(source, tmp_path / "onnx"))
    rng = np.random.default_rng(seed)
    states: list[Any] = [theirs.start(3, CONTEXT), ours.start(3, CONTEXT)]
    for counts in ([7, CONTEXT, 2], [0, CONTEXT, 1], [3, 5, 0]):
        ids = rng.integers(0, ours.vocab_size, (3, CONTEXT)).astype(np.int32)
        for place, engine in enumerate((theirs, ours)):
            states[place] = engine.read(states[place], ids, np.array(counts, np.int32))[0]  # type: ignore[attr-defined]
            states[place] = engine.renew(states[place], np.array([True, True, False]))  # type: ignore[attr-defined]
    # onnx writes it when the rows read on
    once = np.ones((3, 1), np.int32)
    states = [
        engine.read(state, once, np.ones(3, np.int32))[0]  # type: ignore[attr-defined]
        for engine, state in zip((theirs, ours), states, strict=True)
    ]
    for part in ("slots", "importance", "age"):
        expected = np.asarray(getattr(states[0].memory, part))
        got = states[1].past[f"past_memory.{part}"].numpy()
        assert expected.any() and np.abs(expected - got).max() < 1e-4, part


def documents(seed: int, vocabulary: int, lengths: Sequence[int] = (30, 5, 61, 1, 12)) -> TokenDocuments:
    rng = np.random.default_rng(seed)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    ids = rng.integers(1, vocabulary, starts[-1]).astype(np.int32)  # 0 ends texts
    sizes = np.asarray(lengths, np.int64)
    return TokenDocuments(ids, rng.random(starts[-1]) < 0.9, starts, sizes, 4 * sizes)


@pytest.mark.parametrize("kind", [marked(kind, "infinito") for kind in ("qwen3", "infinito", "transformer")])
def test_perplexity_is_that_of_jax(tmp_path: Path, seed: int, kind: str) -> None:
    source = checkpoint(tmp_path / "source", MODELS[kind], seed)
    theirs = language_scoring.load_segment_scorer(source)
    ours = onnx_language_scoring.load_segment_scorer(export(source, tmp_path / "onnx"))
    assert (ours.context, ours.carries) == (theirs.context, theirs.carries)
    text = documents(seed, 300)
    found = {}
    for cache in (False, True) if ours.carries else (False,):
        one, other = (
            evaluate_perplexity(scorer, text, 0, cache=cache, batch_size=2) for scorer in (theirs, ours)
        )
        found[cache] = other.perplexity.nll
        assert other.perplexity.nll == pytest.approx(one.perplexity.nll, rel=1e-4)
    assert len(found) == 1 or found[False] != found[True]


@pytest.mark.parametrize(
    "kind", [marked(kind, "infinito") for kind in ("llama", "qwen3", "indra", "infinito")]
)
def test_smaller_precisions_stay_near_and_are_smaller(tmp_path: Path, seed: int, kind: str) -> None:
    source = checkpoint(tmp_path / "source", MODELS[kind], seed)
    ids = np.random.default_rng(seed).integers(0, 250, (4, CONTEXT)).astype(np.int32)
    counts = np.array([CONTEXT, 3, 7, 1], np.int32)
    engine = generation.load_engine(source)
    expected = engine.read(engine.start(4, CONTEXT), ids, counts)[1]
    sizes, apart = {}, {}
    for precision in PRECISIONS:
        folder = export(source, tmp_path / precision, precision)
        sizes[precision] = (folder / "model.onnx").stat().st_size
        small = onnx_generation.load_engine(folder)
        got = small.read(small.start(4, CONTEXT), ids, counts)[1]
        apart[precision] = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    assert sizes["int8"] < sizes["fp16"] < sizes["fp32"]
    assert apart["fp32"] < 1e-4 < apart["int8"] < 0.7 and apart["fp16"] < 0.05
    errors = export_language_model(source, "int8").errors
    assert errors and all(0 < error < 0.02 for error in errors.values())


def test_a_tied_table_lies_in_the_file_once(tmp_path: Path) -> None:
    import onnx as library

    source = checkpoint(tmp_path / "source", MODELS["qwen3"], 0)
    tied = json.loads((source / "config.json").read_text())
    for precision in PRECISIONS:
        graph = library.load_from_string(export_language_model(source, precision).model).graph
        sizes = [int(np.prod(item.dims)) for item in graph.initializer]
        assert sizes.count(tied["vocab_size"] * tied["hidden_size"]) == 1, precision


def test_inputs_and_outputs_are_named_and_shaped_as_promised(tmp_path: Path) -> None:
    import onnx as library

    source = checkpoint(tmp_path / "source", MODELS["infinito"], 0)
    graph = library.load_from_string(export_language_model(source, "fp32").model).graph
    inputs = [item.name for item in graph.input]
    assert inputs[:5] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "num_logits_to_keep",
        "new_segment",
    ]
    assert inputs[5:] == list(past_inputs(MODELS["infinito"]))
    outputs = [item.name for item in graph.output]
    assert outputs[:2] == ["logits", "present.0.key"] and "present_memory.slots" in outputs
    assert len(outputs) == 1 + len(inputs) - 5


def test_what_cannot_be_exported_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lstm = dataclasses.replace(MODELS["infinito"], architecture="lstm")
    with pytest.raises(UserError, match="an LSTM; exported to ONNX are llama, qwen3, indra"):
        export_language_model(checkpoint(tmp_path / "lstm", lstm, 0), "fp32")
    source = checkpoint(tmp_path / "source", MODELS["llama"], 0)
    monkeypatch.setattr(onnx, "LARGEST", 1000)
    with pytest.raises(UserError, match=r"the weights in fp32 have .* GiB, and a file of ONNX holds 2"):
        export_language_model(source, "fp32")
    (source / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer .* was not found"):
        export_language_model(source, "fp32")
    (source / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="truncated or corrupt"):
        export_language_model(source, "fp32")
