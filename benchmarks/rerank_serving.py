"""Speed of reranking as a service does it, beside sentence-transformers on the same weights and passages.

A query comes with its BM25 passages, texts go in and scores come out; every contestant takes its turn on the
same queries, each side in a process of its own with the same cores. Texts are cut to the same limits before,
and only real tokens count. Ours is the full export (the head is computed too), fp32 and INT8. The peer is
`CrossEncoder.predict` on torch in float32 and bfloat16, and over onnxruntime with what torch.onnx exports,
fp32 and INT8 (quantize_dynamic, per channel). That is what its ONNX backend runs; the package that this
backend needs, optimum-onnx, does not install beside transformers 5. The last peer is FlashRank's runtime,
given the same two files.
    python benchmarks/rerank_serving.py --model runs/x/best            # SciFact, about 15 minutes on 2 cores
    python benchmarks/rerank_serving.py --model runs/x/best --quick    # does it run?
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer import Peer, answer_all
from benchmarks.record import RESULTS, Record, compared
from common.backends import Scorer, load_scorer
from common.checkpoint import CONFIG_FILE, HEAD_FILE, ONNX_FILE, to_json, write_directory
from common.data.records import RankingData
from common.data.sources import load_ranking_data
from common.errors import UserError, run_command
from common.export.verification import Exported, Precision, calibration_pairs
from common.hub import resolve_model
from common.metrics.latency import percentiles
from common.retrieval.lexical import bm25_run
from common.text import PairTokenizer

ROOT = Path(__file__).resolve().parents[1]
OURS: tuple[Precision, ...] = ("fp32", "int8")
PEERS = ("torch fp32", "torch bf16", "onnx fp32", "onnx int8", "flashrank fp32", "flashrank int8")
NAMES = {
    "torch": "sentence-transformers on torch",
    "onnx": "sentence-transformers over onnxruntime",
    "flashrank": "FlashRank",
}
# what, ours, the peer's
ROWS = (
    ("fp32", "fp32", "torch fp32"),
    ("fp32", "fp32", "onnx fp32"),
    ("fp32", "fp32", "flashrank fp32"),
    ("INT8", "int8", "onnx int8"),
    ("INT8", "int8", "flashrank int8"),
    ("INT8 beside bf16", "int8", "torch bf16"),
)
Asked = list[tuple[str, list[str]]]  # queries with their passages


def main() -> None:
    options = _options()
    directory = resolve_model(options.model, say=lambda _: None)
    if not (directory / HEAD_FILE).exists():
        raise UserError(
            f"{directory}: no reranker that a run wrote; both sides need the same trained weights"
        )
    data = load_ranking_data(options.data)
    windows, tokens = workload(directory, data, options)
    about = {
        "data": Path(options.data).name,
        "queries": sum(map(len, windows)),
        "pairs": sum(len(passages) for window in windows for _, passages in window),
        "real_tokens": sum(tokens),
        "repetitions": len(windows),
        "cores": len(os.sched_getaffinity(0)),
    }
    record = Record("rerank_serving", about, folder=Path(options.results))
    with tempfile.TemporaryDirectory() as folder:
        ours = {
            precision: exported(directory, Path(folder) / precision, precision, data.corpus)
            for precision in OURS
        }
        with Peer(serve_peer, str(directory), folder) as peer:
            seconds, differences = measure(ours, peer, windows)
        sizes = {name: (Path(folder) / name / ONNX_FILE).stat().st_size / 1e6 for name in ours}
    for row in rows(seconds, tokens, differences, sizes):
        record.add(row, replace=True)
        speeds = f"{row['ours']:,.0f} against {row['peer']:,.0f} {row['unit']}"
        print(f"{row['what']}: {speeds} ({row['peer_name']}), ratio {row['ratio']:.2f}", flush=True)


def workload(
    directory: Path, data: RankingData, options: argparse.Namespace
) -> tuple[list[Asked], list[int]]:
    """The queries of each repetition with their passages, cut to the model's limits; their real tokens."""
    split = "test" if "test" in data.qrels else next(iter(data.qrels))
    wanted = sorted(data.split(split))[: options.queries * options.repetitions]
    run = bm25_run(data.corpus, {query: data.queries[query] for query in wanted}, options.depth)
    tokenizer = load_scorer(directory, "jax", say=lambda _: None).tokenizer  # type: ignore[attr-defined]
    asked = []
    for query, found in run.items():
        if found:
            passages = _cut(tokenizer, [data.corpus[passage] for passage in found])
            asked.append((_cut(tokenizer, [data.queries[query]], query=True)[0], passages))
    windows = [asked[at : at + options.queries] for at in range(0, len(asked), options.queries)]
    tokens = [
        sum(
            len(encoded.ids)
            for query, passages in window
            for encoded in tokenizer.encode_pairs([query] * len(passages), passages)
        )
        for window in windows
    ]
    return windows, tokens


def _cut(tokenizer: PairTokenizer, texts: list[str], query: bool = False) -> list[str]:
    """The texts as the limit of their side leaves them."""
    ids, _ = tokenizer.query_ids(texts) if query else tokenizer.passage_ids(texts)
    return [tokenizer._tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in ids]


def exported(directory: Path, place: Path, precision: Precision, corpus: Mapping[str, str]) -> Scorer:
    """The export in a folder of its own, as scripts/export.py writes it, loaded."""
    from jax_impl.export.onnx import export_cross_encoder

    write_exported(place, export_cross_encoder(directory, precision, calibration=calibration_pairs(corpus)))
    return load_scorer(place, say=lambda _: None)


def write_exported(place: Path, made: Exported) -> None:
    """An export as it was made, not verified."""

    def fill(folder: Path) -> None:
        (folder / ONNX_FILE).write_bytes(made.model)
        (folder / CONFIG_FILE).write_bytes(to_json(made.config))
        made.tokenizer_save(folder)

    write_directory(place, fill)


def measure(
    ours: Mapping[str, Scorer], peer: Peer, windows: Sequence[Asked]
) -> tuple[dict[str, list[list[float]]], dict[str, float]]:
    """Contestant -> seconds of every query of every repetition, and how far its scores are from our fp32's.

    The first window goes before, untimed; then each window is run by every contestant in turn.
    """
    contestants: dict[str, Callable[[Asked], tuple[list[float], list[np.ndarray]]]] = {
        name: (lambda asked, scorer=scorer: timed(_portable(scorer), asked)) for name, scorer in ours.items()
    }
    contestants |= {kind: (lambda asked, kind=kind: peer.run(kind, asked)) for kind in PEERS}
    seconds: dict[str, list[list[float]]] = {name: [] for name in contestants}
    scores = {name: run(windows[0])[1] for name, run in contestants.items()}
    for window in windows:
        for name, run in contestants.items():
            seconds[name].append(run(window)[0])
    right = np.concatenate(scores["fp32"])
    return seconds, {name: float(np.abs(np.concatenate(got) - right).max()) for name, got in scores.items()}


def timed(
    score: Callable[[str, list[str]], np.ndarray], asked: Asked
) -> tuple[list[float], list[np.ndarray]]:
    """Seconds of each query with its passages, and its scores."""
    seconds, scores = [], []
    for query, passages in asked:
        began = time.perf_counter()
        scores.append(np.asarray(score(query, passages), np.float32))
        seconds.append(time.perf_counter() - began)
    return seconds, scores


def _portable(scorer: Scorer) -> Callable[[str, list[str]], np.ndarray]:
    """All five outputs are computed; the portable one is what the peer has too."""
    return lambda query, passages: scorer.score([query] * len(passages), passages).portable


def rows(
    seconds: Mapping[str, list[list[float]]],
    tokens: Sequence[int],
    differences: Mapping[str, float],
    sizes: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Real tokens per second of every comparison, with milliseconds of a query and the largest difference."""

    def speed(name: str) -> list[float]:
        return [count / sum(times) for count, times in zip(tokens, seconds[name], strict=True)]

    def times(name: str) -> dict[str, float]:
        return percentiles(np.concatenate([np.asarray(part) for part in seconds[name]]).tolist())

    made = []
    for what, mine, theirs in ROWS:
        more = {
            "milliseconds_a_query": {"ours": times(mine), "peer": times(theirs)},
            "largest_difference_to_fp32": {"ours": differences[mine], "peer": differences[theirs]},
            "megabytes": sizes[mine],
        }
        peer_name = f"{NAMES[theirs.split()[0]]}, {theirs.split()[1]}"
        made.append(compared(what, speed(mine), speed(theirs), peer_name, "real tokens/s", **more))
    more = {"megabytes": {"ours": sizes["int8"], "peer": sizes["fp32"]}}
    made.append(
        compared("INT8 beside our fp32", speed("int8"), speed("fp32"), "ours, fp32", "real tokens/s", **more)
    )
    return made


def serve_peer(connection: Connection, directory: str, folder: str) -> None:
    """The peer's process: takes (kind, queries with passages), answers with seconds and scores."""
    import torch
    from sentence_transformers import CrossEncoder

    def scoring(model: CrossEncoder) -> Callable[[str, list[str]], np.ndarray]:
        return lambda query, passages: model.predict(
            [(query, passage) for passage in passages], show_progress_bar=False
        )

    types = {"torch fp32": torch.float32, "torch bf16": torch.bfloat16}
    models = {
        kind: scoring(CrossEncoder(directory, device="cpu", model_kwargs={"dtype": dtype}))
        for kind, dtype in types.items()
    }
    for precision, path in zip(OURS, peer_exports(directory, Path(folder)), strict=True):
        models[f"onnx {precision}"] = scoring(over_onnxruntime(directory, path))
        models[f"flashrank {precision}"] = over_flashrank(directory, path)

    answer_all(connection, lambda kind, asked: timed(models[kind], asked))


def peer_exports(directory: str, folder: Path) -> tuple[Path, Path]:
    """What torch.onnx makes of the model, and the same quantized by onnxruntime."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModelForSequenceClassification

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModelForSequenceClassification.from_pretrained(
                directory, attn_implementation="eager", dtype=torch.float32
            )

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    names, axes = ["input_ids", "attention_mask"], {0: "rows", 1: "tokens"}
    example = torch.ones((2, 8), dtype=torch.int64)
    plain, small = folder / "peer.onnx", folder / "peer_int8.onnx"
    torch.onnx.export(
        Logits().eval(),
        (example, example),
        str(plain),
        input_names=names,
        output_names=["logits"],
        dynamic_axes={name: axes for name in names} | {"logits": {0: "rows"}},
        opset_version=17,
        dynamo=False,
    )
    quantize_dynamic(plain, small, per_channel=True, weight_type=QuantType.QInt8)
    return plain, small


def over_onnxruntime(directory: str, path: Path) -> Any:
    """The peer's CrossEncoder whose forward pass is an onnxruntime session, as its ONNX backend has it."""
    import onnxruntime
    import torch
    from sentence_transformers import CrossEncoder
    from transformers.modeling_outputs import SequenceClassifierOutput

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SequenceClassifierOutput:
        given = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return SequenceClassifierOutput(logits=torch.from_numpy(session.run(None, given)[0]))

    model = CrossEncoder(directory, device="cpu")
    model.model.forward = forward
    return model


def over_flashrank(directory: str, path: Path) -> Callable[[str, list[str]], np.ndarray]:
    """FlashRank's Ranker over an ONNX file, under the name of a model that it knows; its scores as logits."""
    from flashrank import Ranker, RerankRequest

    name = "ms-marco-MiniLM-L-12-v2"
    place = path.parent / f"flashrank-{path.stem}" / name
    place.mkdir(parents=True)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(directory) / file, place / file)
    (place / "special_tokens_map.json").write_text("{}")  # tokenizer.json has them
    shutil.copyfile(path, place / "flashrank-MiniLM-L-12-v2_Q.onnx")
    ranker = Ranker(name, str(place.parent), log_level="WARNING")

    def score(query: str, passages: list[str]) -> np.ndarray:
        given = [{"id": number, "text": text} for number, text in enumerate(passages)]
        answer = ranker.rerank(RerankRequest(query=query, passages=given))
        probability = np.zeros(len(passages))
        for item in answer:
            probability[item["id"]] = item["score"]
        return np.log(probability) - np.log1p(-probability)

    return score


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    shared = Path(os.environ.get("RESONANCE_DATA") or ROOT.parent / "shared" / "data")
    parser.add_argument("--model", required=True, help="a reranker that a run wrote, of the BERT family")
    parser.add_argument("--data", default=str(shared / "scifact"), help="ranking data, as --data.name")
    parser.add_argument("--queries", type=int, default=10, help="queries of a repetition")
    parser.add_argument("--depth", type=int, default=50, help="passages of a query")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--results", default=str(RESULTS), help="where the JSON goes")
    parser.add_argument("--quick", action="store_true", help="two queries, five passages, one repetition")
    options = parser.parse_args(arguments)
    if options.quick:
        options.queries, options.depth, options.repetitions = 2, 5, 1
    return options


if __name__ == "__main__":
    run_command(main)
