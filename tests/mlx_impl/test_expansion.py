"""The query expander from end to end in MLX: sft, grpo, eval, convert; exact resume; bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("mlx_lm", reason="needs MLX and mlx-lm: install the extra `mlx`")

import mlx.core as mx
from mlx_lm.tuner.lora import LoRALinear

from common.checkpoint import read_json, read_tensors
from common.config import to_dict
from common.data.expansion import load_expansions
from common.data.sources import load_ranking_data
from common.errors import UserError
from common.expansion.config import SftConfig
from common.expansion.prompts import ExpansionPrompts, load_tokenizer
from common.expansion.retrieval_effect import TEMPLATE
from common.metrics.expansion import score, score_strict
from common.runs import read_metrics
from mlx_impl import convert, eval
from mlx_impl.expansion import ExpansionOptions, train_grpo, train_sft
from mlx_impl.models.qwen import Origin, add_lora, load_base, load_trained, without_adapter
from mlx_impl.train import main
from mlx_impl.training.generation import greedy
from mlx_impl.training.grpo import GrpoTrainer
from mlx_impl.training.sft import SftTrainer
from tests.tiny_expansion import grpo_config, sft_config, write_expander, write_rows

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ExpansionOptions()


def silent(_: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Trained:
    """Rows, a base, and finished runs on them."""

    rows: Path
    base: Path
    sft: Path
    grpo: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("expansion")
    rows = write_rows(folder / "rows")
    base = write_expander(folder / "base", rows)
    sft = train_sft(sft_config(rows, base, folder / "sft"), OPTIONS, silent)
    grpo = train_grpo(grpo_config(rows, sft, folder / "grpo"), OPTIONS, silent)
    return Trained(rows, base, sft, grpo)


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run) if line["kind"] == kind]


def adapter(run: Path, part: str = "final") -> dict[str, np.ndarray]:
    return read_tensors(run / part / "adapters.safetensors")


def assert_same(run: Path, other: Path) -> None:
    for part in ("final", "best"):
        ours, theirs = adapter(run, part), adapter(other, part)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            np.testing.assert_array_equal(value, theirs[name], err_msg=f"{part} {name}")


def test_sft_learns_logs_and_keeps_the_best_adapter(trained: Trained) -> None:
    train, dev = lines_of(trained.sft, "train"), lines_of(trained.sft, "dev")
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    assert train[-1]["loss"] < train[0]["loss"] - 1
    assert [line["step"] for line in dev] == [3, 6] and all("score" in line for line in dev)
    summary = read_json(trained.sft / "results.json")
    assert summary["best_dev"] == min(line["loss"] for line in dev)
    settings = read_json(trained.sft / "best" / "adapter_config.json")
    assert settings["lora_parameters"]["scale"] == 2.0 and len(settings["lora_parameters"]["keys"]) == 7
    assert "model.embed_tokens.weight" in adapter(trained.sft)


def test_grpo_starts_at_the_sft_model(trained: Trained) -> None:
    """The reference is the adapter off, and a fresh adapter writes nothing: the KL of step 1 is 0."""
    train = lines_of(trained.grpo, "train")
    assert train[0]["kl"] == 0.0 and train[1]["kl"] > 0
    assert [line["step"] for line in lines_of(trained.grpo, "dev")] == [0, 2, 3]
    for name in ("reward", "reward_score", "entropy", "no_signal", "truncated", "invalid", "length"):
        assert name in train[0], name
    assert set(adapter(trained.grpo)) == {
        f"model.layers.0.self_attn.{layer}.lora_{part}" for layer in ("q_proj", "v_proj") for part in "ab"
    }


def test_the_clip_acts_at_the_second_update_of_a_batch(trained: Trained) -> None:
    assert grpo_config(trained.rows, trained.sft, trained.grpo).grpo.num_iterations == 2
    shares = [line["clipped"] for line in lines_of(trained.grpo, "train")]
    print(f"clipped: {shares}")
    assert max(shares) > 0 and max(shares) <= 1


def test_grpo_says_what_it_gained_on_queries_that_did_not_choose_the_best(trained: Trained) -> None:
    """start and best are the SFT run and best/ as anybody loads them; the last 2 of 4 held-out queries."""
    found = read_json(trained.grpo / "results.json")["held_out"]
    assert (found["queries"], found["samples"]) == (2, 4) and found["kl"] >= 0
    queries = [row.query for row in load_expansions(str(trained.rows)).val][2:]
    for name, run in (("start", trained.sft), ("best", trained.grpo)):
        expander = eval.Expander(str(run), eval.EvalOptions((), prompt="plain", max_tokens=12), silent)
        rewards = [score(q, text).reward for q, text in zip(queries, expander.answer(queries), strict=True)]
        np.testing.assert_allclose(found["greedy"][name], np.mean(rewards), atol=1e-6)
    for row in (found["sampled"], found["greedy"]):
        assert row["low"] <= row["difference"] <= row["high"] and 0 < row["p"] <= 1


def test_the_kl_of_the_best_adapter_is_without_dropout(trained: Trained, tmp_path: Path) -> None:
    """By hand from the logits, after a step's own functions were traced with a dropout of a half."""
    config = grpo_config(trained.rows, trained.sft, tmp_path / "grpo")
    config = replace(config, lora=replace(config.lora, dropout=0.5))
    loaded = load_trained(str(trained.sft), say=silent)
    add_lora(loaded, config.lora, 1)
    model, queries = loaded.model, ["clean lamp", "move sofa"]
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape, key=mx.random.key(3))
    prompts = ExpansionPrompts(load_tokenizer(trained.base))
    reward = {"score": (1.0, lambda pairs: [0.0 for _ in pairs])}
    trainer = GrpoTrainer(config, loaded, prompts, queries, queries, reward, data_name="rows", say=silent)
    written = trainer.answers(queries, greedy(8))
    model.train()
    trainer._before(trainer._parts(queries, written, np.zeros(2))[0], 0)
    model.eval()
    parts = []
    for query, row in zip(queries, written, strict=True):
        start = prompts.prompt(query)
        ids = mx.array([[*start, *row.ids, *([prompts.end_id] if row.ended else [])]])

        def found(ids: mx.array = ids, first: int = len(start) - 1) -> np.ndarray:
            logits = np.array(model(ids))[0, first:-1].astype(np.float64)
            norms = np.log(np.exp(logits).sum(axis=-1))
            return logits[np.arange(len(logits)), np.array(ids)[0, first + 1 :]] - norms

        own = found()
        with without_adapter(model):
            apart = found() - own
        parts.append(np.exp(apart) - apart - 1)
    expected = np.concatenate(parts).mean()
    assert expected > 1e-4
    np.testing.assert_allclose(trainer._kl(queries, written), expected, rtol=0.02)


def test_starting_over_deletes_nothing_that_the_run_begins_at(trained: Trained, tmp_path: Path) -> None:
    fresh = ExpansionOptions(fresh=True)
    before = (trained.sft / "best" / "adapters.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"model\.sft .* lies in model\.output .* --fresh deletes"):
        train_grpo(grpo_config(trained.rows, trained.sft, trained.sft), fresh, silent)
    assert (trained.sft / "best" / "adapters.safetensors").read_bytes() == before
    with pytest.raises(UserError, match=r"model\.base .* lies in model\.output"):
        train_sft(sft_config(trained.rows, trained.base, trained.base.parent), fresh, silent)


def test_grpo_takes_the_type_of_its_config_and_notes_the_collection_it_was_rewarded_on(
    trained: Trained, tmp_path: Path
) -> None:
    config = grpo_config(trained.rows, trained.sft, tmp_path / "grpo", max_completion_length=4)
    reward = replace(
        config.reward, score=0.0, retrieval=1.0, retrieval_data="generated", retrieval_encoder="none"
    )
    config = replace(
        config,
        model=replace(config.model, torch_dtype="bfloat16"),
        training=replace(config.training, max_steps=1, batch_size=8, gradient_accumulation_steps=1),
        evaluation=replace(config.evaluation, queries=4, max_tokens=4),
        dataset=replace(config.dataset, name=str(tmp_path / "no rows"), max_samples=4),
        reward=reward,
    ).validate()
    said: list[str] = []
    run = train_grpo(config, OPTIONS, said.append)
    assert "queries are those of generated: dataset.name is not read" in said
    assert load_trained(str(run), say=silent).model.layers[0].mlp.up_proj.weight.dtype == mx.bfloat16
    assert read_json(run / "best" / "training.json")["data"]["name"].startswith("generated")
    inputs = read_json(run / "config.json")["inputs"]
    assert inputs["retrieval"] == load_ranking_data("generated").fingerprint


def test_prompts_that_the_sft_model_has_not_learned_are_named(trained: Trained, tmp_path: Path) -> None:
    config, dry = grpo_config(trained.rows, trained.sft, tmp_path / "grpo"), ExpansionOptions(dry_run=True)
    said: list[str] = []
    train_grpo(config, dry, said.append)
    assert not [line for line in said if "warning" in line]
    other = replace(config, prompt=replace(config.prompt, system="consumer", no_think=False))
    train_grpo(other, dry, said.append)
    told = [line.partition(": set it")[0] for line in said if "warning" in line]
    assert told == [
        "warning: prompt.system is 'consumer', the SFT model learned with 'none'",
        "warning: prompt.no_think is False, the SFT model learned with True",
    ]
    foreign = shutil.copytree(trained.sft, tmp_path / "foreign")  # an adapter whose training.json says less
    (foreign / "best" / "training.json").write_text("{}")
    said.clear()
    train_grpo(replace(other, model=replace(other.model, sft=str(foreign))), dry, said.append)
    assert not [line for line in said if "warning" in line]


def test_a_head_of_its_own_is_trained_and_fused(trained: Trained, tmp_path: Path) -> None:
    base = write_expander(tmp_path / "base", trained.rows, tie_word_embeddings=False)
    run = train_sft(sft_config(trained.rows, base, tmp_path / "sft", max_steps=1), OPTIONS, silent)
    assert {"lm_head.weight", "model.embed_tokens.weight"} < set(adapter(run))
    convert.convert(convert.ConvertOptions(str(run), tmp_path / "out", types=("F32",), run=False), silent)
    ids = mx.array([[300, 5, 7]])
    ours, plain = load_trained(str(run), say=silent).model(ids), load_base(Origin(base)).model(ids)
    fused = load_trained(str(tmp_path / "out" / "hf"), say=silent).model(ids)
    np.testing.assert_allclose(np.array(fused), np.array(ours), atol=1e-5)
    assert float(mx.abs(ours - plain).max()) > 1e-3


def test_a_trained_model_is_its_fused_checkpoint(trained: Trained, tmp_path: Path) -> None:
    """convert.py's hf/ gives the logits of base + SFT + GRPO, and eval.py judges both alike."""
    files = convert.convert(
        convert.ConvertOptions(str(trained.grpo), tmp_path / "out", types=("F16", "q8_0"), run=False), silent
    )
    assert [file.name for file in files] == ["out-f16.gguf", "out-q8_0.gguf"]
    ids = mx.array([[300, 5, 7, 250, 33]])
    ours = load_trained(str(trained.grpo), say=silent).model(ids)
    fused = load_trained(str(tmp_path / "out" / "hf"), say=silent).model(ids)
    plain = load_base(Origin(trained.base)).model(ids)
    np.testing.assert_allclose(np.array(fused), np.array(ours), atol=1e-5)
    assert float(mx.abs(ours - plain).max()) > 1e-2
    history = read_json(tmp_path / "out" / "hf" / "training.json")
    assert [part["config"]["lora"]["rank"] for part in history["adapters"]] == [4, 4]
    template = read_json(trained.base / "tokenizer_config.json")["chat_template"]
    assert read_json(tmp_path / "out" / "hf" / "tokenizer_config.json")["chat_template"] == template


def test_eval_writes_tables_and_outputs_beside_the_template(trained: Trained, tmp_path: Path) -> None:
    options = eval.EvalOptions(
        (str(trained.sft), str(trained.grpo)),
        max_queries=3,
        sampled=True,
        grammar=True,
        max_tokens=12,
        golden=str(trained.rows),
        retrieval="generated",
        max_retrieval_queries=2,
        encoder="none",
        output=tmp_path / "eval",
    )
    evaluation = eval.evaluate(options, silent)
    written = json.loads((tmp_path / "eval" / "expansion.json").read_text())
    assert list(written["models"]) == ["sft", "grpo", TEMPLATE] == list(evaluation.results)
    assert "<html" in (tmp_path / "eval" / "expansion.html").read_text().lower()
    text = evaluation.text()
    assert "RM3" in text and "Against golden rows" in text
    again = eval.evaluate(options, silent)
    assert [r.text for r in again.results["sft"]] == [r.text for r in evaluation.results["sft"]]


def test_what_eval_cannot_do_is_said_before_a_model_is_loaded(trained: Trained, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for wrong, told in (
        ({"max_queries": -1}, r"--max-queries is -1; allowed: 1 or more"),
        ({"max_tokens": 0, "seed": -1}, r"--max-tokens is 0.*--seed is -1; allowed: 0 or more"),
        ({"max_retrieval_queries": 0}, r"--max-retrieval-queries is 0"),
        ({"output": file}, r"cannot be written"),
        ({"output": file / "below"}, r"cannot be written"),
    ):
        options = eval.EvalOptions((str(tmp_path / "no model"),), **({"output": tmp_path / "out"} | wrong))
        with pytest.raises(UserError, match=told):
            eval.evaluate(options, silent)
    same = (str(tmp_path / "a"), str(tmp_path / "b"), f"{tmp_path}/a/")
    with pytest.raises(UserError, match=r"given more than once: .*/a\. Name each model once"):
        eval.evaluate(eval.EvalOptions(same, output=tmp_path / "out"), silent)


def test_convert_replaces_no_files_that_are_not_its_own(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files and no earlier export"):
        convert.convert(convert.ConvertOptions(str(trained.sft), tmp_path, run=False), silent)
    assert (tmp_path / "README.md").read_text() == "mine"


def crash_in(monkeypatch: pytest.MonkeyPatch, kind: Any, step: int) -> None:
    """Let step number `step` fail once, after what the last state holds."""
    plain: Callable[[Any, int], Any] = kind.train_step

    def failing(self: Any, number: int) -> Any:
        if number == step:
            raise RuntimeError("killed")
        return plain(self, number)

    monkeypatch.setattr(kind, "train_step", failing)


def test_sft_goes_on_bit_for_bit(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sft_config(trained.rows, trained.base, tmp_path / "sft")
    with monkeypatch.context() as patch:
        crash_in(patch, SftTrainer, 4)
        with pytest.raises(RuntimeError, match="killed"):
            train_sft(config, OPTIONS, silent)
    said: list[str] = []
    assert_same(train_sft(config, OPTIONS, said.append), trained.sft)
    assert "resumed at step 2 of 6" in said


def test_grpo_goes_on_bit_for_bit(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = grpo_config(trained.rows, trained.sft, tmp_path / "grpo")
    with monkeypatch.context() as patch:
        crash_in(patch, GrpoTrainer, 3)
        with pytest.raises(RuntimeError, match="killed"):
            train_grpo(config, OPTIONS, silent)
    said: list[str] = []
    assert_same(train_grpo(config, OPTIONS, said.append), trained.grpo)
    assert "resumed at step 2 of 3" in said


@pytest.mark.slow
def test_a_quantised_base_keeps_the_sft_adapter_frozen_beside_it(trained: Trained, tmp_path: Path) -> None:
    config = sft_config(trained.rows, trained.base, tmp_path / "sft", max_steps=2)
    config = replace(
        config,
        model=replace(config.model, load_in_4bit=True),
        lora=replace(config.lora, train_embeddings=False),
    ).validate()
    sft = train_sft(config, OPTIONS, silent)
    grpo = grpo_config(trained.rows, sft, tmp_path / "grpo")
    run = train_grpo(replace(grpo, training=replace(grpo.training, max_steps=1)), OPTIONS, silent)
    assert lines_of(run, "train")[0]["kl"] == 0.0
    loaded = load_trained(str(run), say=silent)
    layer = loaded.model.layers[0].self_attn.q_proj
    assert isinstance(layer, LoRALinear) and isinstance(layer.linear, LoRALinear)
    ids = mx.array([[300, 5, 7, 250, 33]])
    convert.convert(convert.ConvertOptions(str(run), tmp_path / "out", types=("F32",), run=False), silent)
    fused = load_trained(str(tmp_path / "out" / "hf"), say=silent).model(ids)
    np.testing.assert_allclose(np.array(fused), np.array(loaded.model(ids)), atol=1e-4)


def test_grpo_stops_where_no_reward_differs(trained: Trained, tmp_path: Path) -> None:
    config = grpo_config(trained.rows, trained.sft, tmp_path / "grpo", max_completion_length=1, patience=2)
    config = replace(config, reward=replace(config.reward, score=0.0, strict=1.0))
    assert score_strict("clean lamp", "lex").reward == 0  # one token is no line
    with pytest.raises(UserError, match=r"step 2: for 2 steps no group's rewards differed"):
        train_grpo(config, OPTIONS, silent)


def test_grpo_stops_where_the_kl_runs_away(trained: Trained, tmp_path: Path) -> None:
    config = grpo_config(trained.rows, trained.sft, tmp_path / "grpo", max_kl=1e-9)
    with pytest.raises(UserError, match=r"step 2: the KL to the SFT model is .*above grpo\.max_kl"):
        train_grpo(config, OPTIONS, silent)


def test_a_finished_run_of_other_settings_is_not_touched(trained: Trained) -> None:
    config = sft_config(trained.rows, trained.base, trained.sft, learning_rate=0.02)
    before = (trained.sft / "final" / "adapters.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"learning_rate(?s:.*)Give this one another --output, or delete"):
        train_sft(config, OPTIONS, silent)
    assert (trained.sft / "final" / "adapters.safetensors").read_bytes() == before


def test_without_hub_and_base_the_tiny_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    rows = write_rows(tmp_path / "rows")
    config = sft_config(rows, Path("Qwen/Qwen3-1.7B"), tmp_path / "run")
    with pytest.raises(UserError, match=r"Qwen3-1\.7B(?s:.*)--base tiny"):
        train_sft(config, OPTIONS, silent)
    assert not (tmp_path / "run").exists()


def changed(base: Path, folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a checkpoint with one JSON file changed."""
    import shutil

    shutil.copytree(base, folder)
    content = read_json(folder / file)
    change(content)
    (folder / file).write_text(json.dumps(content))
    return folder


def sft_on(rows: Path, base: Path, folder: Path) -> SftConfig:
    return sft_config(rows, base, folder / "run")


def test_a_base_that_is_wrong_is_named(trained: Trained, tmp_path: Path) -> None:
    other = changed(trained.base, tmp_path / "a", "config.json", lambda c: c.update(model_type="llama"))
    with pytest.raises(UserError, match=r"model_type is 'llama'; this command trains qwen3"):
        train_sft(sft_on(trained.rows, other, tmp_path), OPTIONS, silent)
    bare = changed(trained.base, tmp_path / "b", "tokenizer_config.json", lambda c: c.pop("chat_template"))
    with pytest.raises(UserError, match="has no chat template"):
        train_sft(sft_on(trained.rows, bare, tmp_path), OPTIONS, silent)
    wide = changed(trained.base, tmp_path / "c", "config.json", lambda c: c.update(intermediate_size=96))
    with pytest.raises(UserError, match=r"cannot be loaded as Qwen3(?s:.*)mlp"):
        train_sft(sft_on(trained.rows, wide, tmp_path), OPTIONS, silent)
    small = write_expander(tmp_path / "d", trained.rows, vocab_size=300)
    (small / "tokenizer.json").write_bytes((trained.base / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match=r"the tokenizer has \d+ tokens and the model a vocabulary of 300"):
        train_sft(sft_on(trained.rows, small, tmp_path), OPTIONS, silent)
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_does_not_fit_is_named(trained: Trained, tmp_path: Path) -> None:
    for wrong in ("keys", "rank"):

        def emptied(content: dict[str, Any], wrong: str = wrong) -> None:
            content["lora_parameters"][wrong] = 0

        bad = changed(trained.sft / "best", tmp_path / f"bad {wrong}", "adapter_config.json", emptied)
        with pytest.raises(UserError, match=r"expected `keys`, the names of the adapted layers"):
            load_trained(str(bad), say=silent)
    other = write_expander(tmp_path / "other", trained.rows, intermediate_size=96)
    with pytest.raises(UserError, match=r"wrong shape: .*mlp"):
        load_trained(str(trained.sft), str(other), silent)
    with pytest.raises(UserError, match="no adapter there"):
        train_grpo(grpo_config(trained.rows, tmp_path / "none", tmp_path / "g"), OPTIONS, silent)


def test_rows_that_are_too_long_or_bad_stop_the_run(trained: Trained, tmp_path: Path) -> None:
    config = sft_config(trained.rows, trained.base, tmp_path / "run", max_length=20)
    with pytest.raises(UserError, match=r"20 of 20 rows are longer than training\.max_length"):
        train_sft(config, OPTIONS, silent)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"query": "a b", "output": [["lexical", "x"]]}\n{"query": "c", "output": [["lex", " "]]}\n'
    )
    with pytest.raises(UserError, match=r"rows\.jsonl:1.*'lexical'(?s:.*)rows\.jsonl:2.*not blank"):
        train_sft(sft_config(rows, trained.base, tmp_path / "run"), OPTIONS, silent)


def yaml_of(config: Any, file: Path) -> Path:
    """A config as the YAML that a user would write."""
    file.write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(config)))))
    return file


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = yaml_of(sft_config(trained.rows, trained.base, tmp_path / "run"), tmp_path / "sft.yaml")
    main(["sft", "--config", str(file), "--dry-run", "--training.epochs", "1"])
    said = capsys.readouterr().out
    assert "3 steps" in said and "on 7 layers and the embeddings" in said and "nothing was trained" in said
    assert not (tmp_path / "run").exists()


def test_the_tiny_base_is_made_by_the_command(tmp_path: Path, trained: Trained) -> None:
    config = replace(SftConfig().tiny(), dataset=replace(SftConfig().dataset, name=str(trained.rows)))
    config = replace(config, model=replace(config.model, output=str(tmp_path / "run")))
    config = replace(config, training=replace(config.training, max_steps=1, eval_steps=9))
    config = replace(config, evaluation=replace(config.evaluation, queries=1, max_tokens=2)).validate()
    run = train_sft(config, OPTIONS, silent)
    assert read_json(run / "base" / "config.json")["model_type"] == "qwen3"
    assert (run / "best" / "adapters.safetensors").exists()
    load_trained(str(run), say=silent)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "grpo"])
def test_a_run_that_was_killed_goes_on_bit_for_bit(trained: Trained, tmp_path: Path, command: str) -> None:
    """kill -9 after the first state; the same command then ends in the same adapters."""
    output = tmp_path / command
    configs = {
        "sft": lambda: sft_config(trained.rows, trained.base, output),
        "grpo": lambda: grpo_config(trained.rows, trained.sft, output),
    }
    file = yaml_of(configs[command](), tmp_path / "config.yaml")
    words = [sys.executable, str(ROOT / "mlx_impl/train.py"), command, "--config", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not [p for p in output.glob("state/*") if p.name.isdigit()]:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (output / "results.json").exists(), "it was killed too late"
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout
    assert_same(output, trained.sft if command == "sft" else trained.grpo)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_four_commands_run_from_end_to_end_without_a_download(tmp_path: Path) -> None:
    """What a user types; the tiny model has learned the form: the strict score is above 0."""

    def run(script: str, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, str(ROOT / "mlx_impl" / script), *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    sft, grpo, judged, model = (str(tmp_path / name) for name in ("sft", "grpo", "eval", "model"))
    run("train.py", "sft", "--base", "tiny", "--output", sft)
    run("train.py", "grpo", "--base", "tiny", "--model.sft", sft, "--output", grpo)
    run("eval.py", grpo, sft, "--max-tokens", "120", "--output", judged)
    said = run("convert.py", grpo, "--output", model, "--types", "F16", "Q8_0")
    losses = [line["loss"] for line in lines_of(Path(sft), "dev")]
    assert losses[-1] < 1.2 and lines_of(Path(sft), "dev")[-1]["score"] > 0.6
    results = read_json(tmp_path / "eval" / "expansion.json")["models"]
    assert np.mean([answer["scores"]["strict"]["percentage"] for answer in results["sft"]]) > 0
    assert said.count("tensors verified") == 2 and "export QMD_GENERATE_MODEL=" in said
    assert {path.name for path in Path(model).iterdir()} >= {"Modelfile", "README.md", "hf"}
