"""The heads of both backends: against the float64 reference, each other, and what they control.

Values, and gradients by the vectors of both sides and by every parameter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.checkpoint import HEAD_FILE, read_config, read_tensors
from common.config import FIDELITY_BLOCKS, HEAD_PROJECTORS, ModelConfig
from common.errors import UserError
from common.reference import projector as reference
from common.reference.cases import float32_exact, numeric_gradient
from common.runs import read_metrics
from common.text import PairTokenizer
from tests.parity.backends import LOSS_TOLERANCE, Backend, Jax, Mlx, check, mix, mixed
from tests.parity.test_models import compare, cross_encoders, draw, pair_outputs, randomise
from tests.tiny import World, train, write_base

Twins = tuple[Jax, Mlx]
D, C = 5, 2 * FIDELITY_BLOCKS
PAIRS = [(head, projector) for head, projectors in HEAD_PROJECTORS.items() for projector in projectors]


def make_head(backend: Backend, head: str, projector: str, seed: int, width: int = C) -> Any:
    module = backend.module("models.cross_encoder")
    return module.ResonanceHead(D, width, projector, head, rngs=backend.rngs(seed % 2**31))


def number(head: Any, query: Any, passage: Any) -> Any:
    return head.compare(head.projector(query), head.projector(passage))


def expected(head: str, weights: dict[str, np.ndarray], query: np.ndarray, passage: np.ndarray) -> np.ndarray:
    """The reference's number, of a head with checkpoint tensors `weights`."""

    def of(name: str) -> np.ndarray:
        value = weights[f"projector.{name}"]
        return value.T if value.ndim == 2 else value

    def state(hidden: np.ndarray) -> reference.State:
        if "projector.proj.weight" in weights:
            return reference.real(hidden, of("proj.weight"))
        if "projector.proj_re.weight" in weights:
            return reference.cartesian(hidden, of("proj_re.weight"), of("proj_im.weight"))
        names = ("magnitude.weight", "magnitude.bias", "phase.weight", "phase.bias")
        return reference.polar(hidden, *map(of, names))

    learned = [weights["compare.logits"]] if "compare.logits" in weights else []
    return reference.HEADS[head](state(query), state(passage), *learned)


@pytest.mark.parametrize(("head", "projector"), PAIRS)
def test_a_head_and_its_gradients_are_the_reference_s(
    backend: Backend, head: str, projector: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    made = make_head(backend, head, projector, seed)
    start = backend.parameters(made)
    drawn = {name: float32_exact(value + rng.normal(0, 0.5, value.shape)) for name, value in start.items()}
    backend.set_parameters(made, drawn)
    query, passage = float32_exact(rng.normal(size=(2, 3, D)))
    share = mix((3,), np.random.default_rng(seed))

    def theirs(query: np.ndarray, passage: np.ndarray, **changed: np.ndarray) -> np.ndarray:
        return expected(head, drawn | changed, query, passage)

    label, pair = f"heads, {head} of {projector}", f"{backend.name} with the reference"
    (found,), by_weights = backend.results(made, lambda *x: [number(*x)], seed, query, passage)
    check(label, pair, found, theirs(query, passage), LOSS_TOLERANCE)
    ((by_query, by_passage),) = backend.gradients(
        lambda *x: mixed(backend, [number(made, *x)], seed), (0, 1)
    )(query, passage)
    by_hand = numeric_gradient(lambda x: float(share @ theirs(x, passage)), query)
    check(f"{label} gradient by query", pair, by_query, by_hand, LOSS_TOLERANCE)
    by_hand = numeric_gradient(lambda x: float(share @ theirs(query, x)), passage)
    check(f"{label} gradient by passage", pair, by_passage, by_hand, LOSS_TOLERANCE)
    assert by_weights.keys() == drawn.keys()
    for name, gradient in by_weights.items():
        if name in ("u", "gamma", "b"):
            continue

        def moved(x: np.ndarray, name: str = name) -> float:
            return float(share @ theirs(query, passage, **{name: x}))

        check(
            f"{label} gradient by {name}",
            pair,
            gradient,
            numeric_gradient(moved, drawn[name]),
            LOSS_TOLERANCE,
        )


def both(backend: Backend, seed: int, *heads: tuple[str, str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The number of each head as it starts from one seed, and its gradient by the query."""
    query, passage = float32_exact(np.random.default_rng(seed).normal(size=(2, 4, D)))
    found = []
    for head, projector in heads:
        made = make_head(backend, head, projector, seed)
        (value,) = backend.values(lambda *x, m=made: [number(m, *x)])(query, passage)
        ((gradient,),) = backend.gradients(lambda *x, m=made: mixed(backend, [number(m, *x)], seed))(
            query, passage
        )
        found.append((value, gradient))
    return found


def test_a_real_head_of_twice_the_width_starts_as_the_cartesian_r(backend: Backend, seed: int) -> None:
    cartesian, real = both(backend, seed, ("resonance", "cartesian"), ("real", "cartesian"))
    for ours, theirs in zip(real, cartesian, strict=True):
        check("heads, real", f"{backend.name} with cartesian r", ours, theirs, 1e-6)
    assert np.abs(real[1]).max() > 1e-3
    # and it is the cosine, computed without any state
    made = make_head(backend, "real", "cartesian", seed)
    kernel = backend.parameters(made)["projector.proj.weight"].T
    assert kernel.shape == (D, 2 * C)
    query, passage = float32_exact(np.random.default_rng(seed).normal(size=(2, 4, D))) @ kernel
    cosine = (query * passage).sum(-1) / np.linalg.norm(query, axis=-1) / np.linalg.norm(passage, axis=-1)
    check("heads, real", f"{backend.name} with the cosine", real[0], cosine, 1e-6)


def test_the_overlap_is_the_polar_fidelity_of_agreeing_phases_from_the_same_start(
    backend: Backend, seed: int
) -> None:
    starts = [
        backend.parameters(make_head(backend, head, "polar", seed)) for head in ("resonance", "overlap")
    ]
    assert starts[0].keys() == starts[1].keys()
    assert all((starts[0][name] == starts[1][name]).all() for name in starts[0])
    made = make_head(backend, "overlap", "polar", seed)
    query, passage = float32_exact(np.random.default_rng(seed).normal(size=(2, 4, D)))
    (value,), gradients = backend.results(made, lambda *x: [number(*x)], seed, query, passage)
    assert np.abs(gradients["projector.phase.weight"]).max() < 1e-6  # no phase is seen
    silent = starts[0] | {
        name: 0 * starts[0][name] for name in ("projector.phase.weight", "projector.phase.bias")
    }
    check(
        "heads, overlap",
        f"{backend.name} with the reference",
        value,
        expected("root_fidelity", silent, query, passage),
        LOSS_TOLERANCE,
    )


def test_no_imaginary_part_grows_where_it_starts_at_zero(backend: Backend, seed: int) -> None:
    made = make_head(backend, "real_part", "cartesian", seed)
    assert not backend.parameters(made)["projector.proj_im.weight"].any()
    query, passage = float32_exact(np.random.default_rng(seed).normal(size=(2, 4, D)))
    _, gradients = backend.results(made, lambda *x: [number(*x)], seed, query, passage)
    assert not gradients["projector.proj_im.weight"].any() and gradients["projector.proj_re.weight"].any()


def test_one_block_is_the_whole_fidelity_and_equal_weights_are_the_mean(backend: Backend, seed: int) -> None:
    rng = np.random.default_rng(seed)
    states = float32_exact(rng.normal(size=(4, 3, C)))
    module = backend.module("models.heads")

    def value(blocks: int) -> np.ndarray:
        made = module.BlockFidelity()
        if blocks != FIDELITY_BLOCKS:
            made.logits = type(made.logits)(backend.array(np.zeros(blocks, np.float32)))
        outputs = backend.values(lambda a, b, c, d: [made((a, b), (c, d))])
        return outputs(*map(np.float32, states))[0]

    psi, chi = reference.normalise(*states[:2]), reference.normalise(*states[2:])
    check(
        "heads, one block",
        f"{backend.name} with the reference",
        value(1),
        reference.root_fidelity(psi, chi),
        LOSS_TOLERANCE,
    )
    parts = [
        [reference.normalise(*(x[:, place : place + 2] for x in side)) for side in (states[:2], states[2:])]
        for place in range(0, C, 2)
    ]
    fidelity = np.mean([reference.root_fidelity(*part) ** 2 for part in parts], axis=0)
    check(
        "heads, equal blocks",
        f"{backend.name} with the reference",
        value(FIDELITY_BLOCKS),
        np.sqrt(fidelity),
        LOSS_TOLERANCE,
    )


@pytest.mark.parametrize("head", HEAD_PROJECTORS)
def test_orthogonal_and_empty_states_have_finite_numbers_and_gradients(
    backend: Backend, head: str, seed: int
) -> None:
    made = make_head(backend, head, HEAD_PROJECTORS[head][0], seed)
    query = float32_exact(np.random.default_rng(seed).normal(size=(2, D)))
    for other in (0 * query, query * [[0, 1, 0, 1, 0]]):
        (value,), gradients = backend.results(made, lambda *x: [number(*x)], seed, 0 * query, other)
        assert np.isfinite(value).all() and all(np.isfinite(x).all() for x in gradients.values())


@pytest.mark.parametrize("head", [head for head in HEAD_PROJECTORS if head != "resonance"])
def test_a_cross_encoder_with_a_head_agrees_with_its_twin(
    twins: Twins, head: str, seed: int, tmp_path: Path
) -> None:
    case = draw(seed, tmp_path / "base")
    projector = HEAD_PROJECTORS[head][-1]
    models = cross_encoders(twins, tmp_path / "base", head=head, projector=projector, complex_width=8)
    randomise(twins, models, seed)
    results = [
        backend.results(model, lambda *x, b=backend: pair_outputs(b, *x), seed, case.input_ids, case.sides)
        for backend, model in zip(twins, models, strict=True)
    ]
    compare(f"cross-encoder with a head, {head}", "jax with mlx", *results)
    still = {name for name, gradient in results[0][1].items() if not gradient.any()}
    unread = {"resonance.gamma"} if head == "cls" else set()
    assert {name for name in still if not name.endswith("key.bias")} == unread


@pytest.mark.parametrize("openness", [0.0, 0.3, 1.0])
def test_a_half_open_cross_encoder_agrees_with_its_twin(
    twins: Twins, openness: float, seed: int, tmp_path: Path
) -> None:
    case = draw(seed, tmp_path / "base")
    models = cross_encoders(twins, tmp_path / "base", complex_width=4)
    randomise(twins, models, seed)

    def outputs(model: Any, ids: Any, sides: Any, share: Any) -> list[Any]:
        out = model(ids, sides, None, share)
        return [out.score, out.portable, out.resonance]

    inputs = case.input_ids[:-1], case.sides[:-1], np.float32(openness)
    (jax_values, jax_gradients), (mlx_values, mlx_gradients) = (
        b.results(m, outputs, seed, *inputs) for b, m in zip(twins, models, strict=True)
    )
    for ours, theirs in zip(mlx_values, jax_values, strict=True):
        check(f"separable start, {openness}", "jax with mlx", ours, theirs, 1e-4)
    assert jax_gradients.keys() == mlx_gradients.keys()
    for name, gradient in jax_gradients.items():
        check(
            f"separable start, {openness}, gradient of {name}",
            "mlx with jax",
            mlx_gradients[name],
            gradient,
            1e-4,
        )


def test_closed_attention_leaves_the_query_as_if_alone_and_open_attention_is_the_usual_one(
    backend: Backend, seed: int, tmp_path: Path
) -> None:
    case = draw(seed, tmp_path / "base")
    (model,) = cross_encoders((backend,), tmp_path / "base")  # type: ignore[arg-type]
    module = backend.module("models.cross_encoder")
    ids, sides = case.input_ids[:-2], case.sides[:-2]

    def hidden(sides: Any, openness: float) -> np.ndarray:
        between = module.between_sides(backend.array(sides), openness)
        found = model.encoder(backend.array(ids), backend.array(sides > 0), None, None, between)
        return np.asarray(found, np.float64)

    query = (sides == 1)[..., None]
    alone = hidden(np.where(sides == 1, sides, 0), 1.0)
    check(
        "separable start, closed",
        f"{backend.name} with the query alone",
        hidden(sides, 0.0) * query,
        alone * query,
        1e-5,
    )
    assert np.abs((hidden(sides, 1.0) - alone) * query).max() > 1e-3
    usual = np.asarray(model.encoder(backend.array(ids), backend.array(sides > 0)), np.float64)
    check("separable start, open", f"{backend.name} with the usual encoder", hidden(sides, 1.0), usual, 1e-6)


def settings(head: str) -> ModelConfig:
    return ModelConfig(head=head, projector=HEAD_PROJECTORS[head][-1])  # type: ignore[arg-type]


@pytest.fixture
def saved(backend: Backend, seed: int, tmp_path: Path) -> dict[str, Path]:
    """A checkpoint of each head, written by the backend, no parameter where it began."""
    base = write_base(tmp_path / "base", seed=seed)
    loading, found = backend.module("loading"), {}
    for head in ("cls", "real", "block_fidelity", "overlap"):
        loaded = loading.load_cross_encoder(base, settings(head), seed=1)
        randomise((backend,), [loaded.model], seed)  # type: ignore[arg-type]
        found[head] = tmp_path / head
        loading.save_cross_encoder(
            found[head], loaded, training={}, tokenizer_save=PairTokenizer(base).save, card="# tiny\n"
        )
    return found


def scores(backend: Backend, directory: Path, model: ModelConfig) -> np.ndarray:
    """Full and portable score and the head's number of a few pairs."""
    loaded = backend.module("loading").load_cross_encoder(directory, model)
    rng = np.random.default_rng(0)
    ids, sides = rng.integers(5, 100, (4, 12), dtype=np.int32), np.array([[1] * 5 + [2] * 7] * 4, np.int8)
    return np.stack(backend.values(lambda *x: list(loaded.model(*x)[:3]))(ids, sides))


def test_a_checkpoint_keeps_its_head_in_both_backends_and_its_portable_score_in_transformers(
    twins: Twins, saved: dict[str, Path]
) -> None:
    for head, directory in saved.items():
        assert read_config(directory)["resonance"]["head"] == head
        ours, theirs = (scores(b, directory, ModelConfig()) for b in twins)  # the recipe names no head
        check(f"saved heads, {head}", "jax with mlx", ours, theirs, 1e-4)
        assert ours[2].any() == (head != "cls")
        if head != "cls":
            with pytest.raises(UserError, match=f"head is 'cls', the checkpoint has '{head}'"):
                scores(twins[0], directory, ModelConfig(head="cls"))
        assert not any(key.startswith("resonance") for key in read_tensors(directory))
    assert "compare.logits" in read_tensors(saved["block_fidelity"] / HEAD_FILE)
    torch = pytest.importorskip("torch", reason="the oracle needs torch: install the extra `peers`")
    from transformers import BertForSequenceClassification

    rng = np.random.default_rng(0)
    ids = torch.tensor(rng.integers(5, 100, (4, 12)))
    for directory in saved.values():
        oracle = BertForSequenceClassification.from_pretrained(directory, dtype=torch.float64).eval()
        portable = oracle(ids, torch.ones_like(ids)).logits[:, 0].detach().numpy()
        check(
            "saved heads, portable",
            "jax with transformers",
            scores(twins[0], directory, ModelConfig())[1],
            portable,
            1e-4,
        )


def test_a_checkpoint_without_a_head_s_name_has_the_resonance_and_an_unknown_one_is_refused(
    backend: Backend, seed: int, tmp_path: Path
) -> None:
    base, loading = write_base(tmp_path / "base", seed=seed), backend.module("loading")
    loaded = loading.load_cross_encoder(base, ModelConfig(), seed=1)
    randomise((backend,), [loaded.model], seed)  # type: ignore[arg-type]
    where = tmp_path / "saved"
    loading.save_cross_encoder(
        where, loaded, training={}, tokenizer_save=PairTokenizer(base).save, card="# tiny\n"
    )
    before = scores(backend, where, ModelConfig())
    config = read_config(where)
    for head in (None, "spin"):
        config["resonance"].pop("head", None)
        config["resonance"] |= {"head": head} if head else {}
        (where / "config.json").write_text(json.dumps(config))
        if head is None:
            assert (scores(backend, where, ModelConfig()) == before).all()
        else:
            with pytest.raises(UserError, match="head is 'spin'; allowed: resonance, cls"):
                scores(backend, where, ModelConfig())


def test_a_sentence_encoder_without_resonance_begins_from_a_small_random_reading_of_cls(
    backend: Backend, seed: int, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", seed=seed)
    (base / "modules.json").write_text("[]")
    for head, gamma in (("cls", 0.0), ("root_fidelity", 20.0)):
        loaded = backend.module("loading").load_cross_encoder(base, settings(head), seed=seed % 2**31)
        values = backend.parameters(loaded.model)
        assert loaded.settings["start"] == "sentence_encoder" and values["resonance.gamma"] == gamma
        assert values["resonance.u"].any() == (head == "cls")
    with pytest.raises(UserError, match="into 8 blocks, and this one has a width of 12: choose a multiple"):
        wide = ModelConfig(head="block_fidelity", complex_width=12)
        backend.module("loading").load_cross_encoder(base, wide)


def test_a_separable_start_trains_on_closed_attention_and_evaluates_on_open(
    backend: Backend, world: World, tmp_path: Path
) -> None:
    logged = []
    for share in (0.0, 0.5):
        config = world.config(max_steps=1, evaluations=1, separable_start=share)
        train(config, tmp_path / str(share), backend=backend.name)
        logged.append(read_metrics(tmp_path / str(share) / "tiny"))
    (open_start, open_step, _), (start, step, _) = logged
    assert start["kind"] == "dev" and start["nDCG@10"] == open_start["nDCG@10"]
    assert start["score_spread"] == pytest.approx(open_start["score_spread"], abs=1e-6)
    assert step["openness"] == 0.0 and "openness" not in open_step
    assert abs(step["rank"] - open_step["rank"]) > 1e-3
