"""Exported language models in onnxruntime: columns, segments, the card's code, directories refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.backends import language_module, load_language_trainer
from common.errors import UserError
from common.export import onnx_generation
from common.export.onnx_decode import decode
from common.export.onnx_generation import OnnxLanguageModel, load_engine, past_inputs, present_name
from common.export.onnx_language_scoring import load_segment_scorer
from common.language.generation import SamplingConfig
from common.language.samples import LanguageGenerator, load_generator
from tests.language_exports import CONTEXT, MODELS, checkpoint, export


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    return {
        kind: export(checkpoint(root / f"{kind}-source", MODELS[kind], 3), root / kind)
        for kind in ("qwen3", "infinito", "transformer")
    }


def greedy(generator: LanguageGenerator, prompt: str, tokens: int) -> str:
    return generator.generate([prompt], SamplingConfig(max_new_tokens=tokens))[0].text


@pytest.mark.parametrize("kind", ["qwen3", "infinito", "transformer"])
def test_the_code_of_the_card_writes_the_same_text(exports: dict[str, Path], kind: str) -> None:
    prompt, tokens = "Ada has the red kite. Bob has", 3 * CONTEXT
    generator = load_generator(exports[kind], say=lambda _: None)
    ids = generator.tokenizer.encode(prompt).tolist()
    found = generator.generate([prompt], SamplingConfig(max_new_tokens=tokens))[0]
    assert found.finish == ("context" if kind == "qwen3" else "length")
    written = generator.tokenizer.decode([*ids, *found.ids])
    assert decode(str(exports[kind]), prompt, tokens) == written


def test_a_cache_loses_the_columns_that_nobody_sees_and_nothing_else(
    exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    calls = [rng.integers(0, 250, (3, 6)).astype(np.int32) for _ in range(6)]
    counts = [np.array(rng.permutation([1, 0, 6]), np.int32) for _ in calls]
    found = {}
    for spare in (0, 1000):
        monkeypatch.setattr(onnx_generation, "SPARE", spare)
        engine = load_engine(exports["qwen3"])
        state, logits = engine.start(3, 40), []
        for ids, count in zip(calls, counts, strict=True):
            state, said = engine.read(state, ids, count)
            logits.append(np.where(count[:, None] > 0, said, 0.0))
        found[spare] = np.stack(logits)
        assert state.length.tolist() == np.sum(counts, axis=0).tolist()
        assert (state.mask.shape[1] < 6 * 6) == (spare == 0)
        assert state.past["past_key_values.0.key"].shape()[2] == state.mask.shape[1]
    np.testing.assert_allclose(found[0], found[1000], atol=1e-4)


def test_a_row_that_reads_nothing_stays_as_it_was(exports: dict[str, Path]) -> None:
    engine = load_engine(exports["infinito"])
    ids = np.arange(8, dtype=np.int32).reshape(2, 4)
    state, _ = engine.read(engine.start(2, CONTEXT), ids, np.array([4, 3], np.int32))
    state, _ = engine.read(state, ids, np.array([2, 0], np.int32))
    _, got = engine.read(state, ids, np.array([0, 4], np.int32))
    state, _ = engine.read(engine.start(2, CONTEXT), ids, np.array([4, 3], np.int32))
    _, expected = engine.read(state, ids, np.array([1, 4], np.int32))
    np.testing.assert_allclose(got[1], expected[1], atol=1e-4)


def test_presents_are_named_after_their_pasts() -> None:
    names = [present_name(name) for name in past_inputs(MODELS["infinito"])]
    assert names[:2] == ["present.0.key", "present.0.value"]
    assert {"present_states", "present_memory.age", "present_recalled.value"} <= set(names)


def test_an_export_is_found_to_be_one_and_does_not_train(exports: dict[str, Path]) -> None:
    for backend in ("auto", "onnx"):
        module = language_module(backend, "generation", exports["qwen3"])
        assert module is onnx_generation
    with pytest.raises(UserError, match="an ONNX export, which backend jax does not read"):
        load_generator(exports["qwen3"], "jax", say=lambda _: None)
    with pytest.raises(UserError, match="backend onnx reads what"):
        load_generator(exports["qwen3"].with_name("qwen3-source"), "onnx", say=lambda _: None)
    with pytest.raises(UserError, match="backend onnx does not train"):
        load_language_trainer("onnx")


def test_exploration_is_refused_where_there_is_a_memory(exports: dict[str, Path]) -> None:
    sampling = SamplingConfig(max_new_tokens=2, explore=True)
    generator = load_generator(exports["infinito"], say=lambda _: None)
    with pytest.raises(UserError, match="an ONNX export has no exploration: leave it out"):
        generator.generate(["Ada"], sampling)


def test_rows_of_several_texts_are_not_scored(exports: dict[str, Path]) -> None:
    from common.data.language import LanguageBatch

    ones = np.ones((1, 1, 4), np.int32)
    batch = LanguageBatch(
        ones,
        ones,
        ones > 0,
        np.array([[[1, 1, 2, 2]]], np.int32),
        np.ones((1, 1), bool),
        np.zeros(1, np.int32),
    )
    with pytest.raises(ValueError, match="rows of one text"):
        load_segment_scorer(exports["qwen3"]).score(batch, None)


def test_directories_that_hold_something_else_are_refused(exports: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exports["qwen3"], folder)
    whole = (folder / "model.onnx").read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"nothing of the kind"):
        (folder / "model.onnx").write_bytes(broken)
        with pytest.raises(UserError, match=r"model\.onnx: cannot be read .*Export it again"):
            OnnxLanguageModel(folder)
    shutil.copy(exports["infinito"] / "model.onnx", folder)
    with pytest.raises(UserError, match=r"a graph that is not of the model in config\.json.*") as told:
        OnnxLanguageModel(folder)
    assert "past_memory.age: expected nothing, found ['rows', 9]" in str(told.value)
    shutil.copy(exports["qwen3"] / "model.onnx", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 17}))
    with pytest.raises(UserError, match=r"logits: expected \['rows', 'kept', 17\], found"):
        OnnxLanguageModel(folder)
    (folder / "config.json").write_text(json.dumps(config | {"onnx": {"kind": "cross-encoder"}}))
    with pytest.raises(UserError, match="holds a cross-encoder, a language-model is needed"):
        OnnxLanguageModel(folder)
