"""The real consumers on a GGUF of ours: llama-server, transformers, node-llama-cpp and QMD's own expandQuery.

    npm ci --prefix tests/consumers && pip install xllamacpp torch && pytest -m slow tests/consumers

A consumer that is absent is skipped with the reason; RESONANCE_REQUIRE=consumers makes that a failure.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

pytest.importorskip("gguf", reason="needs gguf: install the extra `mlx`")
pytest.importorskip("mlx_lm", reason="needs MLX and mlx-lm: install the extra `mlx`")

from common.data.expansion import load_expansions, render_lines
from common.expansion.config import SftConfig
from common.expansion.prompts import ExpansionPrompts, load_tokenizer
from common.expansion.tiny_qwen import tiny_base
from mlx_impl import convert
from mlx_impl.expansion import ExpansionOptions, train_sft
from mlx_impl.export import gguf, runtime
from mlx_impl.models.qwen import load_trained
from mlx_impl.training.generation import generate, greedy
from tests.tiny_expansion import ACTIONS, THINGS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

HERE = Path(__file__).resolve().parent
MODULES = HERE / "node_modules"
NODE = MODULES / "node" / "bin" / "node"
STEPS = 48
EXACT = ["F32", "F16", "Q8_0"]  # types that must continue as the source does
IN_QMD = ["F16", "Q8_0", "Q4_K_M"]
# wide enough for true K-quants, whose blocks have 256 weights
SIZES = {
    **{"vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64},
}


def absent(reason: str) -> NoReturn:
    """Skip, or fail where consumers are required."""
    if "consumers" in os.environ.get("RESONANCE_REQUIRE", "").split(","):
        pytest.fail(f"RESONANCE_REQUIRE=consumers, and {reason}")
    pytest.skip(reason)


def needs_package(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        absent(f"the package {name} is not installed (pip install -e '.[peers]')")


def needs_node(package: str) -> None:
    if not NODE.exists() or not (MODULES / package).is_dir():
        absent(f"{package} and Node 22 are not installed (npm ci --prefix tests/consumers)")


@dataclass(frozen=True)
class Shipped:
    """A model that knows its rows by heart, and what convert.py made of it."""

    rows: dict[str, list[tuple[str, str]]]  # query -> lines
    checkpoint: Path
    files: dict[str, Path]
    prompts: ExpansionPrompts

    def asked(self) -> list[list[int]]:
        """Prompts of some rows, with and without QMD's system prompt."""
        queries = list(self.rows)
        return [self.prompts.prompt(query, consumer=bool(i % 2)) for i, query in enumerate(queries[:4])]

    def continued(self) -> list[list[int]]:
        """What mlx-lm's model writes after each prompt."""
        model = load_trained(str(self.checkpoint), say=lambda _: None).model
        written = generate(model, self.asked(), end=self.prompts.end_id, sampling=greedy(STEPS))
        return [row.ids for row in written]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    folder = tmp_path_factory.mktemp("consumers")
    rows = _rows(folder / "rows")
    data = load_expansions(str(folder / "rows"))
    tiny_base(folder / "base", data, 0, SIZES)
    run = train_sft(_config(folder), ExpansionOptions(), lambda _: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NODE_PATH", str(MODULES))  # where convert.py looks for a llama.cpp that quantises
        kinds = [*EXACT, "Q4_K_M"] if list(gguf._quantizers([])) else EXACT
        options = convert.ConvertOptions(str(run / "final"), folder / "model", types=tuple(kinds), run=False)
        files = convert.convert(options, lambda _: None)
    checkpoint = folder / "model" / "hf"
    prompts = ExpansionPrompts(load_tokenizer(checkpoint))
    return Shipped(rows, checkpoint, dict(zip(kinds, files, strict=True)), prompts)


def _rows(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Ten rows; two more are for validation, and not returned."""
    folder.mkdir()
    rows = {}
    for number, thing in enumerate(THINGS):
        for action in (ACTIONS[number % 4], ACTIONS[(number + 1) % 4]):
            rows[f"{action} {thing}"] = [
                ("hyde", f"To {action} the {thing}, take your time."),
                ("lex", f"{thing} {action} tools"),
                ("vec", f"how to {action} a {thing} at home"),
            ]
    known = dict(list(rows.items())[:-2])
    for name, chosen in (("train", known), ("val", {q: rows[q] for q in rows.keys() - known.keys()})):
        text = "".join(
            json.dumps({"query": query, "output": lines}) + "\n" for query, lines in chosen.items()
        )
        (folder / f"{name}.jsonl").write_text(text)
    return known


def _config(folder: Path) -> SftConfig:
    config = SftConfig()
    return replace(
        config,
        model=replace(config.model, base=str(folder / "base"), output=str(folder / "run")),
        dataset=replace(config.dataset, name=str(folder / "rows")),
        training=replace(
            config.training,
            **{"epochs": 50.0, "batch_size": 10, "gradient_accumulation_steps": 1, "learning_rate": 5e-3},
            **{"eval_steps": 50, "save_steps": 50},
        ),
        lora=replace(config.lora, train_embeddings=True),
        evaluation=replace(config.evaluation, queries=0),
    ).validate()


def consume(folder: Path, **wanted: Any) -> Any:
    """consume.mjs, as a user's machine runs it: without `CI`, in which QMD refuses every call."""
    question, answer = folder / "question.json", folder / "answer.json"
    question.write_text(json.dumps(wanted))
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "LD_PRELOAD")}
    here = {"XDG_CACHE_HOME": str(folder), "QMD_FORCE_CPU": "1", "NODE_LLAMA_CPP_SKIP_DOWNLOAD": "true"}
    done = subprocess.run(
        [str(NODE), str(HERE / "consume.mjs"), str(question), str(answer)],
        capture_output=True,
        text=True,
        env=kept | here,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(answer.read_text())


def test_an_absent_consumer_fails_where_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESONANCE_REQUIRE", "other,consumers")
    with pytest.raises(pytest.fail.Exception, match="RESONANCE_REQUIRE=consumers, and it is not here"):
        absent("it is not here")
    monkeypatch.delenv("RESONANCE_REQUIRE")
    with pytest.raises(pytest.skip.Exception, match="it is not here"):
        absent("it is not here")


def test_the_model_knows_its_rows(shipped: Shipped) -> None:
    written = [shipped.prompts.decode(ids) for ids in shipped.continued()]
    assert written == [render_lines(shipped.rows[query]) + "\n" for query in list(shipped.rows)[:4]]


def test_transformers_continues_as_mlx_lm(shipped: Shipped) -> None:
    needs_package("torch")
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(shipped.checkpoint), dtype=torch.float32)
    for prompt, expected in zip(shipped.asked(), shipped.continued(), strict=True):
        ids = list(prompt)
        for _ in range(len(expected) + 1):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert ids[len(prompt) :] == [*expected, shipped.prompts.end_id]


@pytest.mark.parametrize("kind", EXACT)
def test_llama_server_reads_and_continues_as_mlx_lm(shipped: Shipped, kind: str) -> None:
    needs_package("xllamacpp")
    found = runtime.check_runtime(shipped.files[kind], shipped.checkpoint, kind)
    assert found.texts == len(runtime.TEXTS) + len(runtime.QUERIES)


@pytest.mark.parametrize("kind", EXACT)
def test_node_llama_cpp_reads_and_continues_as_mlx_lm(shipped: Shipped, tmp_path: Path, kind: str) -> None:
    needs_node("node-llama-cpp")
    texts = [*runtime.TEXTS, *(shipped.prompts.text(query, consumer=True) for query in shipped.rows)]
    found = consume(
        tmp_path,
        **{"what": "llama", "model": str(shipped.files[kind]), "texts": texts},
        **{"prompts": shipped.asked(), "steps": STEPS},
    )
    encode = shipped.prompts.tokenizer.encode
    assert found["tokens"] == [encode(text, add_special_tokens=False) for text in texts]
    assert found["continued"] == shipped.continued()


@pytest.mark.parametrize("kind", IN_QMD)
def test_qmd_parses_stops_and_returns_the_trained_lines(shipped: Shipped, tmp_path: Path, kind: str) -> None:
    needs_node("@tobilu/qmd")
    if kind not in shipped.files:
        absent("no llama.cpp that quantises was found")
    queries = list(shipped.rows)[:3]
    found = consume(tmp_path, what="qmd", model=str(shipped.files[kind]), queries=queries)
    lines = [[(line["type"], line["text"]) for line in expanded] for expanded in found]
    assert lines == [shipped.rows[query] for query in queries]
