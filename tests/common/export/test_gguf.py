"""GGUF of the BERT family: llama.cpp's server reads the tokens and gives the scores that we do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.backends import load_encoder, load_scorer
from common.errors import UserError
from common.export.verification import Exported, Precision
from tests.rerankers import reranker
from tests.tiny import FILLER, PARTNERS, TOPIC_WORDS, WORDS, write_base

pytest.importorskip("gguf", reason="needs the extra gguf")

from common.export import gguf as gguf_export

QUERY = f"{TOPIC_WORDS[0]} {WORDS[0]}"
TEXTS = [
    *(" ".join([TOPIC_WORDS[0], PARTNERS[0], *FILLER[:count]]) for count in (0, 1, 5, 9)),
    "Unknown wörds, (marks) — and 数字 42!",
    f"{WORDS[3].upper()} and {WORDS[4]}ish",
    " ".join(FILLER[:9] * 5),  # longer than the limit
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reranker(tmp_path_factory.mktemp("gguf"), 3)


def written(folder: Path, exported: Exported) -> Path:
    folder.mkdir()
    (folder / "model.gguf").write_bytes(exported.model)
    (folder / "config.json").write_text(json.dumps(exported.config))
    exported.tokenizer_save(folder)
    return folder


@pytest.fixture(scope="module")
def expected(trained: Path) -> dict[str, np.ndarray]:
    """The portable scores of some queries."""
    scorer = load_scorer(trained, "jax", say=lambda _: None)
    queries = (QUERY, f"{WORDS[7]}?", " ".join(WORDS[:30]))
    return {query: scorer.score([query] * len(TEXTS), TEXTS).portable for query in queries}


@pytest.mark.parametrize(
    ("precision", "near"),
    [("fp32", 5e-3), pytest.param("fp16", 1e-2, marks=pytest.mark.slow), ("int8", 0.1)],
)
def test_llama_server_scores_pairs_as_the_portable_score(
    trained: Path, expected: dict[str, np.ndarray], tmp_path: Path, precision: Precision, near: float
) -> None:
    """llama.cpp's GELU is the tanh form, ours the exact one: that far apart even in F32."""
    pytest.importorskip("xllamacpp", reason="needs the extra gguf")
    from common.export.llama_server import LlamaServer

    exported = gguf_export.export_cross_encoder(trained, precision)
    server = LlamaServer(written(tmp_path / "out", exported), "cross-encoder")
    for query, scores in expected.items():
        assert np.ptp(scores) > 0.05  # a constant would pass
        np.testing.assert_allclose(server.rerank(query, TEXTS), scores, atol=near)


def test_llama_server_reads_the_same_tokens(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="needs the extra gguf")
    from common.export.llama_server import LlamaServer

    server = LlamaServer(
        written(tmp_path / "out", gguf_export.export_cross_encoder(trained, "fp32")), "cross-encoder"
    )
    for text in (QUERY, *TEXTS):
        own = server.tokenizer.encode_texts([text], 1 << 20)[0].ids.tolist()
        assert server.tokens(text) == own
    assert server.apart == {}
    server.rerank(QUERY, TEXTS)
    assert server.apart == {}
    server.rerank(QUERY, ["a [SEP] b"])  # a special token for our tokenizer, plain text for llama.cpp's
    assert re.fullmatch(r"from token 2 ours are \[3.*", server.apart["a [SEP] b"])


def test_pairs_with_other_special_tokens_are_found(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As llama.cpp's own defaults have them: no [SEP] at the end."""
    pytest.importorskip("xllamacpp", reason="needs the extra gguf")
    from gguf import GGUFWriter

    from common.export.llama_server import LlamaServer

    monkeypatch.setattr(GGUFWriter, "add_add_eos_token", lambda self, value: None)
    exported = gguf_export.export_cross_encoder(trained, "fp32")
    server = LlamaServer(written(tmp_path / "out", exported), "cross-encoder")
    with pytest.raises(UserError, match="its pairs have other special tokens"):
        server.rerank(QUERY, TEXTS)


def test_llama_server_embeds_as_the_bi_encoder_does(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="needs the extra gguf")
    from common.export.llama_server import LlamaServer, of_llama_server

    base = write_base(tmp_path / "base", num_hidden_layers=2)
    exported = gguf_export.export_bi_encoder(base, "fp32")
    server = LlamaServer(written(tmp_path / "out", exported), "bi-encoder")
    expected = load_encoder(base, "jax", say=lambda _: None).encode(TEXTS, kind="passage")
    np.testing.assert_allclose(server.embed(TEXTS), expected, atol=5e-3)
    judged = of_llama_server(server, "bi-encoder")(TEXTS[0], TEXTS[1:])
    np.testing.assert_allclose(judged, expected[1:] @ expected[0], atol=1e-2)
    with pytest.raises(UserError, match="no GGUF export of a cross-encoder"):
        LlamaServer(tmp_path / "out", "cross-encoder")


@pytest.mark.parametrize(
    ("precision", "largest"), [("fp32", 0.0), ("fp16", 1e-3), ("int8", 1e-2)], ids=["F32", "F16", "Q8_0"]
)
def test_keys_tensors_and_sizes(trained: Path, tmp_path: Path, precision: Precision, largest: float) -> None:
    from gguf import GGUFReader

    exported = gguf_export.export_cross_encoder(trained, precision)
    assert max(exported.errors.values(), default=0.0) <= largest
    reader = GGUFReader(written(tmp_path / "out", exported) / "model.gguf")
    names = {tensor.name for tensor in reader.tensors}
    assert {"cls.weight", "cls.output.bias", "blk.1.ffn_up.weight", "token_embd_norm.bias"} <= names

    def value(key: str) -> Any:
        field = reader.get_field(key)
        assert field is not None, key
        return field.contents()

    assert value("general.architecture") == "bert" and value("bert.pooling_type") == 4
    assert value("bert.attention.causal") is False
    tokens, kinds = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    assert tokens[value("tokenizer.ggml.bos_token_id")] == "[CLS]"
    assert tokens[10] == "\u2581" + TOPIC_WORDS[5] and kinds[0] == 3 and kinds[10] == 1
    assert exported.config["gguf"] == {
        "kind": "cross-encoder",
        "score": "portable",
        "precision": precision,
    }


def test_a_tensor_that_was_written_wrong_is_found(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf import GGUFWriter

    real = GGUFWriter.write_tensor_data

    def changed(self: Any, value: np.ndarray) -> None:
        real(self, value * np.float32(1.01) if value.shape == (32, 32) else value)

    monkeypatch.setattr(GGUFWriter, "write_tensor_data", changed)
    with pytest.raises(UserError, match=r"cls\.weight: differs from the checkpoint"):
        gguf_export.export_cross_encoder(trained, "fp32")


def test_what_llama_cpp_would_read_otherwise_is_refused(trained: Path, tmp_path: Path) -> None:
    def changed(name: str, file: str, change: Any) -> Path:
        shutil.copytree(trained, tmp_path / name)
        content = json.loads((tmp_path / name / file).read_text())
        change(content)
        (tmp_path / name / file).write_text(json.dumps(content))
        return tmp_path / name

    cased = changed("cased", "tokenizer.json", lambda found: found["normalizer"].update(lowercase=False))
    with pytest.raises(UserError, match=r"lower case without accents.*lowercase is False"):
        gguf_export.export_cross_encoder(cased, "fp32")
    segment = changed("seg", "config.json", lambda found: found["resonance"].update(passage_segment=1))
    with pytest.raises(UserError, match=r"llama.cpp knows segment 0 only"):
        gguf_export.export_cross_encoder(segment, "fp32")
    other = changed("other", "config.json", lambda found: found.update(model_type="roberta"))
    with pytest.raises(UserError, match="a roberta model; exported to GGUF is bert"):
        gguf_export.export_cross_encoder(other, "fp32")
    gelu = changed("gelu", "config.json", lambda found: found.update(hidden_act="relu"))
    with pytest.raises(UserError, match="hidden_act is 'relu'"):
        gguf_export.export_cross_encoder(gelu, "fp32")
    with pytest.raises(UserError, match=r"no reranker yet, it has no cls\.output"):
        gguf_export.export_cross_encoder(write_base(tmp_path / "base"), "fp32")
