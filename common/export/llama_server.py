"""llama.cpp's server over an exported GGUF file, in this process: an export as its users run it.

llama-server -m OUT/int8/model.gguf --reranking      # the same from a shell; --embedding for an encoder
"""

from __future__ import annotations

import importlib.util
import json
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.checkpoint import GGUF_FILE, read_config
from common.errors import UserError
from common.export.verification import Judge
from common.text import PairTokenizer


class LlamaServer:
    """The model of a directory that scripts/export.py wrote as GGUF. Texts are cut to its limits before.

    `apart` gets the texts that llama.cpp's tokenizer reads otherwise than ours, and how. Raises UserError
    where xllamacpp is not installed, and for a file that llama.cpp does not read.
    """

    def __init__(self, directory: str | Path, kind: Literal["cross-encoder", "bi-encoder"]) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise UserError("a GGUF export is verified by llama.cpp: pip install -e '.[gguf]' (xllamacpp)")
        import xllamacpp

        self.directory, config = Path(directory), read_config(directory)
        self.apart: dict[str, str] = {}
        about, settings = config.get("gguf") or {}, config.get("resonance") or {}
        if about.get("kind") != kind:
            raise UserError(
                f"{directory}: no GGUF export of a {kind}; scripts/export.py --format gguf makes one"
            )
        given = {
            key: int(settings[key]) for key in ("max_query_tokens", "max_passage_tokens") if settings.get(key)
        }
        self.tokenizer = PairTokenizer(self.directory, **given)
        longest = int(config["max_position_embeddings"])
        self._longest = min(int(about.get("max_tokens") or longest), longest)
        pooling, rank = xllamacpp.llama_pooling_type, kind == "cross-encoder"
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(self.directory / GGUF_FILE)
        parameters.embedding, parameters.warmup, parameters.verbosity = True, False, 0
        parameters.pooling_type = pooling.LLAMA_POOLING_TYPE_RANK if rank else pooling.LLAMA_POOLING_TYPE_MEAN
        parameters.n_parallel = 1
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = longest
        parameters.cpuparams.n_threads = 1  # more wait for each other spinning, on a busy machine for ages
        parameters.n_gpu_layers = 0
        try:
            self._server: Any = xllamacpp.Server(parameters)
        except RuntimeError as error:
            raise UserError(f"{self.directory / GGUF_FILE}: llama.cpp does not read it ({error})") from error

    def rerank(self, query: str, passages: Sequence[str]) -> NDArray[np.float32]:
        """The portable score of each passage, [L]. UserError when llama.cpp puts other special tokens around
        a pair than the model was trained with: then its scores are of something else."""
        query = self.tokenizer.cut([query], self.tokenizer.max_query_tokens)[0]
        texts = self.tokenizer.cut(passages, self.tokenizer.max_passage_tokens)
        answer = self._asked(self._server.handle_rerank({"query": query, "documents": texts}))
        expected = sum(len(pair.ids) for pair in self.tokenizer.encode_pairs([query] * len(texts), texts))
        if (read := answer["usage"]["prompt_tokens"]) != expected:
            self._compare(query, texts, read, expected)
        scores = np.zeros(len(texts), np.float32)
        for result in answer["results"]:
            scores[result["index"]] = result["relevance_score"]
        return scores

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors [N, D]."""
        # [CLS] and [SEP] are not part of the text
        texts = self.tokenizer.cut(texts, self._longest - 2)
        answer = self._asked(self._server.handle_embeddings({"input": texts}))
        rows = sorted(answer["data"], key=lambda row: int(row["index"]))
        return np.asarray([row["embedding"] for row in rows], np.float32)

    def tokens(self, text: str) -> list[int]:
        """llama.cpp's tokens of a text, special ones included."""
        body = {"content": text, "add_special": True, "parse_special": False}
        return [int(token) for token in post(self._server, "/tokenize", body)["tokens"]]

    def _asked(self, answer: dict[str, Any]) -> dict[str, Any]:
        if "error" in answer or answer.get("code"):
            raise UserError(f"{self.directory}: llama.cpp says {answer.get('error') or answer}")
        return answer

    def _compare(self, query: str, passages: Sequence[str], read: int, expected: int) -> None:
        """Note the texts whose tokens differ; UserError when none does, so that the pairs must."""
        texts = list(dict.fromkeys([query, *passages]))
        ours = [encoded.ids.tolist() for encoded in self.tokenizer.encode_texts(texts, 1 << 20)]
        theirs = [self.tokens(text) for text in texts]
        found = {
            text: _first_difference(own, other)
            for text, own, other in zip(texts, ours, theirs, strict=True)
            if own != other
        }
        if not found:
            raise UserError(
                f"{self.directory}: llama.cpp reads {read} tokens where the model was trained on {expected}, "
                "though it reads each text alike: its pairs have other special tokens. Install the xllamacpp "
                "that constraints.txt names, or export to ONNX."
            )
        self.apart |= found


def post(server: Any, path: str, body: Mapping[str, Any]) -> Any:
    """What a running xllamacpp.Server answers to JSON."""
    url = server.listening_address + path
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def of_llama_server(server: LlamaServer, kind: Literal["cross-encoder", "bi-encoder"]) -> Judge:
    """The scores of a GGUF export as common.export.verification measures them."""
    if kind == "cross-encoder":
        return server.rerank
    return lambda query, passages: server.embed(list(passages)) @ server.embed([query])[0]


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> str:
    shorter = min(len(ours), len(theirs))
    at = next((place for place in range(shorter) if ours[place] != theirs[place]), shorter)
    return f"from token {at} ours are {list(ours[at : at + 4])}, llama.cpp's {list(theirs[at : at + 4])}"
