"""Retraining a checkpoint: what it keeps of the original, what it computes once, what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.checkpoint import read_json, read_tensors
from common.config import RerankerConfig
from common.errors import UserError
from common.runs import read_metrics
from jax_impl.scoring import JaxOriginal, load_scorer
from jax_impl.training import loop
from tests.tiny import FILLER, PARTNERS, TOPIC_WORDS, WORDS, World, train

FILES = ("model.safetensors", "resonance.safetensors")


@dataclass(frozen=True)
class Domains:
    """A checkpoint trained on the tiny world (the old domain), and new data that contradict it."""

    world: World
    base: Path
    new: Path

    def config(self, **retrain: Any) -> RerankerConfig:
        """24 steps of adaptation on the new data, fast enough to forget."""
        config = self.world.config(max_steps=24, evaluations=2, learning_rate=3e-3, checkpoint_every=4)
        return replace(
            config,
            name="retrained",
            model=replace(config.model, base=str(self.base)),
            data=replace(config.data, name=str(self.new), encoder=str(self.world.base)),
            quantum=replace(config.quantum, mode="adaptation", phase="resonance"),
            retrain=replace(config.retrain, **retrain),
        )

    @property
    def kept(self) -> RerankerConfig:
        """With everything that preserves, at weights that show."""
        return self.config(
            preserve_knowledge=20.0,
            resonance_alignment=5.0,
            old_data=str(self.world.data),
            old_batch_size=4,
        )


@pytest.fixture(scope="module")
def domains(world: World, tmp_path_factory: pytest.TempPathFactory) -> Domains:
    root = tmp_path_factory.mktemp("domains")
    train(world.config(max_steps=30, evaluations=1, learning_rate=3e-3), root)
    rng = np.random.default_rng(1)
    rows = []
    for thing in range(len(TOPIC_WORDS) * 6):  # a thing's partner is now the one of another thing
        topic, other = TOPIC_WORDS[thing // 6], thing // 6 * 6 + (thing + 1) % 6
        passage = " ".join([topic, PARTNERS[other], *rng.choice(FILLER, rng.integers(2, 12))])
        rows.append({"query": f"{topic} {WORDS[thing]}", "positive": passage})
    (root / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Domains(world, root / "tiny" / "best", root / "new.jsonl")


def train_lines(runs: Path) -> list[dict[str, Any]]:
    lines = [line for line in read_metrics(runs / "retrained") if line["kind"] == "train"]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def old_scores(directory: Path, world: World) -> np.ndarray:
    """Scores of old queries with each passage of their topic, [queries, 6], less the mean of a query."""
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    pairs = [
        (a["query"], b["positive"]) for n, a in enumerate(rows) for b in rows[n // 6 * 6 : n // 6 * 6 + 6]
    ]
    scores = load_scorer(directory).score(*map(list, zip(*pairs, strict=True))).score.reshape(-1, 6)
    return scores - scores.mean(axis=1, keepdims=True)


def test_preserving_moves_the_old_domain_s_scores_less_and_still_learns(
    domains: Domains, tmp_path: Path
) -> None:
    moved = {}
    before = old_scores(domains.base, domains.world)
    for name, config in (("free", domains.config()), ("kept", domains.kept)):
        train(config, tmp_path / name)
        final = tmp_path / name / "retrained" / "final"
        moved[name] = float(np.abs(old_scores(final, domains.world) - before).mean())
        assert not np.array_equal(
            *(
                read_tensors(place)["bert.embeddings.word_embeddings.weight"]
                for place in (domains.base, final)
            )
        )
    assert moved["kept"] < 0.5 * moved["free"]
    terms = {"preserve", "preserve_query", "preserve_passage"}
    kept, free = train_lines(tmp_path / "kept"), train_lines(tmp_path / "free")
    assert terms <= set(kept[0]) and not terms & set(free[0])
    for term in terms:  # nothing to preserve before the first step
        assert kept[0][term] == pytest.approx(0.0, abs=1e-4) and kept[-1][term] > 1e-5


def test_an_interrupted_retraining_ends_in_the_same_bits_and_scores_the_original_once(
    domains: Domains, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESONANCE_CACHE", str(tmp_path / "cache"))
    scored = []
    outputs = JaxOriginal.outputs

    def counted(self: JaxOriginal, encodeds: Any, on_batch: Any = None) -> np.ndarray:
        scored.append(len(encodeds))
        return outputs(self, encodeds, on_batch)

    monkeypatch.setattr(JaxOriginal, "outputs", counted)
    train(domains.kept, tmp_path / "whole")
    lists = 49 + len({json.loads(line)["query"] for line in domains.new.read_text().splitlines()})
    assert 0 < sum(scored) <= 4 * lists
    scored.clear()

    make = loop.make_step

    def broken(*arguments: Any) -> Any:
        step = make(*arguments)

        def run(state: Any, *rest: Any) -> Any:
            if int(state.step) == 10:
                raise KeyboardInterrupt
            return step(state, *rest)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_step", broken)
        with pytest.raises(KeyboardInterrupt):
            train(domains.kept, tmp_path / "cut")
    said: list[str] = []
    train(domains.kept, tmp_path / "cut", say=said.append)
    assert "resumed at step 8 of 24" in said and scored == []
    for file in FILES:
        ours, expected = (tmp_path / name / "retrained" / "final" / file for name in ("cut", "whole"))
        assert ours.read_bytes() == expected.read_bytes()
    assert train_lines(tmp_path / "cut") == train_lines(tmp_path / "whole")


def test_a_base_that_changed_under_an_interrupted_retraining_is_refused(
    domains: Domains, tmp_path: Path
) -> None:
    base = shutil.copytree(domains.base, tmp_path / "base")
    config = domains.config(preserve_knowledge=1.0)
    config = replace(
        config,
        model=replace(config.model, base=str(base)),
        train=replace(config.train, max_steps=2, evaluations=1),
    )
    train(config, tmp_path)
    settings = read_json(base / "config.json")
    (base / "config.json").write_text(json.dumps(settings | {"changed": True}))
    with pytest.raises(UserError, match=r"has changed since this run began(?s:.*)start over with --fresh"):
        train(config, tmp_path)


def test_a_run_s_folder_is_a_base_and_the_retrained_one_is_a_base_again(
    domains: Domains, tmp_path: Path
) -> None:
    config = domains.config(preserve_knowledge=1.0)
    config = replace(
        config,
        model=replace(config.model, base=str(domains.base.parent)),
        train=replace(config.train, max_steps=2, evaluations=1),
    )
    said: list[str] = []
    train(config, tmp_path, say=said.append)
    again = replace(
        config, name="again", model=replace(config.model, base=str(tmp_path / "retrained" / "best"))
    )
    train(again, tmp_path, say=said.append)
    began = [
        line for line in said if line.startswith("start: a run's checkpoint that began as sentence_encoder")
    ]
    assert len(began) == 2


def test_too_few_old_lists_for_a_step_are_said(domains: Domains, tmp_path: Path) -> None:
    config = domains.config(
        preserve_knowledge=1.0, old_data=str(domains.world.data), old_queries=3, old_batch_size=4
    )
    with pytest.raises(
        UserError, match=r"3 lists cannot fill the 4 of each step; lower retrain\.old_batch_size"
    ):
        train(config, tmp_path)
