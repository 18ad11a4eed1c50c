"""The backend of exported directories: chosen by what lies there, and what it says when that does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.backends import load_encoder, load_scorer, load_trainer
from common.errors import UserError
from common.export.onnx_scoring import OnnxScorer
from common.export.verification import Exported
from common.rag import RAGPipeline
from jax_impl.export.onnx import export_bi_encoder, export_cross_encoder
from tests.tiny import TOPIC_WORDS, write_base


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exports")
    base = write_base(root / "base")
    for name, exported in (
        ("cross", export_cross_encoder(base, "fp32")),
        ("bi", export_bi_encoder(base, "int8")),
    ):
        _put(root / name, exported)
    return root


def _put(folder: Path, exported: Exported) -> None:
    folder.mkdir()
    (folder / "model.onnx").write_bytes(exported.model)
    (folder / "config.json").write_text(json.dumps(exported.config))
    exported.tokenizer_save(folder)


def test_an_exported_directory_needs_no_backend_named(exports: Path) -> None:
    for backend in ("auto", "onnx"):
        scorer = load_scorer(exports / "cross", backend, say=lambda _: None)
        assert isinstance(scorer, OnnxScorer) and scorer.name == "cross" and len(scorer.identity) == 16
    assert load_encoder(exports / "bi", say=lambda _: None).dim == 32


def test_the_pipeline_runs_on_exports_alone(exports: Path) -> None:
    rag = RAGPipeline(exports / "bi", exports / "cross", say=lambda _: None)
    rag.index_documents([f"{word} banosh" for word in TOPIC_WORDS])
    found = rag.retrieve_and_rerank(TOPIC_WORDS[3])
    assert found.reranked and len(found.hits) == 5 and rag.index.kind == "flat"


def test_what_does_not_fit_is_told(exports: Path, tmp_path: Path) -> None:
    for load, folder, backend, message in (
        (load_scorer, "cross", "jax", "an ONNX export, which backend jax does not read"),
        (load_scorer, "base", "onnx", "backend onnx reads what `python scripts/export.py"),
        (load_scorer, "bi", "auto", "holds a bi-encoder, a cross-encoder is needed"),
        (load_encoder, "cross", "auto", "holds a cross-encoder, a bi-encoder is needed"),
    ):
        with pytest.raises(UserError, match=message):
            load(exports / folder, backend, say=lambda _: None)
    with pytest.raises(UserError, match="backend onnx does not train"):
        load_trainer("onnx")
    broken = shutil.copytree(exports / "cross", tmp_path / "broken")
    (broken / "model.onnx").write_bytes((broken / "model.onnx").read_bytes()[:500])
    with pytest.raises(UserError, match=r"model\.onnx: cannot be read .* Export it again"):
        load_scorer(broken, say=lambda _: None)


def test_identity_follows_the_weights_and_not_the_report(exports: Path, tmp_path: Path) -> None:
    before = load_scorer(exports / "cross", say=lambda _: None).identity
    copy = shutil.copytree(exports / "cross", tmp_path / "copy")
    (copy / "export.json").write_text("{}")
    assert load_scorer(copy, say=lambda _: None).identity == before
    model = bytearray((copy / "model.onnx").read_bytes())
    place = model.find(b"resonance")  # the producer's name
    model[place : place + 9] = b"Resonance"
    (copy / "model.onnx").write_bytes(model)
    assert load_scorer(copy, say=lambda _: None).identity != before


def test_a_caller_that_raises_ends_the_work(exports: Path) -> None:
    scorer, done = load_scorer(exports / "cross", say=lambda _: None), list[int]()

    def stop(count: int) -> None:
        done.append(count)
        raise TimeoutError

    with pytest.raises(TimeoutError):
        scorer.score(["bolum"] * 3000, ["banosh dolum " * 20] * 3000, stop)
    assert len(done) == 1
    seen: list[int] = []
    assert len(scorer.score(["bolum"] * 100, ["banosh"] * 100, seen.append).score) == sum(seen) == 100
    assert scorer.score([], []).score.shape == (0,)
    assert np.isfinite(scorer.score([""], [""]).score).all()
