"""Both backends behind one face, so that a parity test is written once: NumPy in, float64 NumPy out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

from common import keymap
from common.reference.cases import parity_error

LOSS_TOLERANCE = 1e-5  # losses and projector
MODEL_TOLERANCE = 1e-4  # whole models and their gradients
# Compiling takes nearly all the time of a test.
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

Function = Callable[..., Any]
Arrays = list[np.ndarray]


class Found(NamedTuple):
    """One comparison: `what` is "subject, detail", `pair` "jax with mlx" or "jax with an oracle"."""

    what: str
    pair: str
    error: float
    tolerance: float


FOUND: list[Found] = []  # of this session; the table of `make parity`


def check(what: str, pair: str, ours: Any, theirs: Any, tolerance: float) -> None:
    """Assert that two results agree, and print by how much they do not."""
    _compared(Found(what, pair, parity_error(ours, theirs), tolerance))


def check_all(
    what: str, pair: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float
) -> None:
    """The same for named arrays: as many, under the same names."""
    assert ours.keys() == theirs.keys()
    errors = {name: parity_error(ours[name], theirs[name]) for name in ours}
    worst = max(errors, key=lambda name: errors[name])
    _compared(Found(f"{what} by {worst}", pair, errors[worst], tolerance))


def _compared(found: Found) -> None:
    FOUND.append(found)
    told = f"parity of {found.what}, {found.pair}: {found.error:.1e}"
    print(told)
    assert found.error <= found.tolerance, f"{told} > {found.tolerance:g}"


def table(found: Sequence[Found]) -> list[str]:
    """Lines of Markdown, a row for each subject and oracle: worst errors, tolerance, where it is worst."""
    rows: dict[tuple[str, str], list[Found]] = {}
    oracles: dict[str, str] = {}
    for one in found:
        oracle = one.pair.split(" with ")[1]
        if oracle != "mlx":
            oracles.setdefault(one.what.split(", ")[0], oracle)
    for one in found:
        subject, oracle = one.what.split(", ")[0], one.pair.split(" with ")[1]
        rows.setdefault((subject, oracles.get(subject, "") if oracle == "mlx" else oracle), []).append(one)
    lines = [
        "| what | oracle | jax | mlx | jax with mlx | tolerance | comparisons | nearest to its tolerance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (subject, oracle), all_of in rows.items():
        cells = []
        for pair in (f"jax with {oracle}", f"mlx with {oracle}", "jax with mlx"):
            errors = [one.error for one in all_of if one.pair == pair]
            cells.append(f"{max(errors):.1e}" if errors else "")
        nearest = max(all_of, key=lambda one: one.error / one.tolerance)
        tolerances = " to ".join(f"{t:g}" for t in sorted({one.tolerance for one in all_of}))
        detail = nearest.what.partition(", ")[2]
        lines.append(
            f"| {subject} | {oracle} | {' | '.join(cells)} | {tolerances} | {len(all_of)} | {detail} |"
        )
    return lines


def mix(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random weights, so that a gradient sees every number of an output."""
    return rng.normal(size=shape) / np.sqrt(max(1, np.prod(shape)))


def mixed(backend: Backend, outputs: Sequence[Any], seed: int) -> Any:
    """The sum of all outputs under `mix`."""
    rng = np.random.default_rng(seed)
    return sum((backend.array(mix(output.shape, rng)) * output).sum() for output in outputs)


class Jax:
    """JAX, compiled."""

    name = "jax"

    def module(self, path: str) -> Any:
        return importlib.import_module(f"jax_impl.{path}")

    def rngs(self, seed: int) -> Any:
        from flax import nnx

        return nnx.Rngs(seed)

    def array(self, values: Any) -> Any:
        import jax.numpy as jnp

        return jnp.asarray(values)

    def stack(self, values: Sequence[Any]) -> Any:
        import jax.numpy as jnp

        return jnp.stack(values)

    def values(self, function: Function) -> Callable[..., Arrays]:
        """`function` of arrays as one of NumPy arrays; its results flattened."""
        import jax

        compiled = jax.jit(function, compiler_options=QUICK)
        return lambda *inputs: [
            np.asarray(x, np.float64) for x in jax.tree.leaves(compiled(*map(self.array, inputs)))
        ]

    def gradients(self, function: Function, wrt: Sequence[int] = (0,)) -> Callable[..., list[Arrays]]:
        """For each number that `function` returns, its gradients by the arguments `wrt`."""
        import jax

        compiled = jax.jit(jax.jacrev(lambda *x: jax.tree.leaves(function(*x)), argnums=tuple(wrt)))
        return lambda *inputs: [
            [np.asarray(x, np.float64) for x in row] for row in compiled(*map(self.array, inputs))
        ]

    def parameters(self, model: Any) -> dict[str, np.ndarray]:
        """Parameters under their checkpoint keys, in the checkpoint's layout."""
        from flax import nnx

        return self._keyed(nnx.state(model, nnx.Param))

    def set_parameters(self, model: Any, values: dict[str, np.ndarray]) -> None:
        from flax import nnx

        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            key, transform = keymap.to_checkpoint(path)
            variable[...] = self.array(keymap.apply(transform, values[key].astype(np.float32)))

    def results(
        self, model: Any, function: Function, seed: int, *inputs: Any
    ) -> tuple[Arrays, dict[str, np.ndarray]]:
        """The list of arrays `function(model, *inputs)`, and the gradient of their `mixed` sum by every
        parameter."""
        import jax
        from flax import nnx

        graphdef, state = nnx.split(model)

        def total(state: Any, *arrays: Any) -> Any:
            outputs = function(nnx.merge(graphdef, state), *arrays)
            return mixed(self, outputs, seed), outputs

        compiled = jax.jit(jax.grad(total, has_aux=True), compiler_options=QUICK)
        gradient, outputs = compiled(state, *map(self.array, inputs))
        return [np.asarray(x, np.float64) for x in outputs], self._keyed(gradient)

    def tree(self, model: Any) -> Any:
        """The tree of a model's parameters as the optimizer has it."""
        from flax import nnx

        return nnx.state(model, nnx.Param)

    def named(self, tree: Any) -> dict[str, Any]:
        """The leaves of such a tree under their checkpoint keys."""
        from flax import nnx

        return {keymap.to_checkpoint(path)[0]: leaf.get_value() for path, leaf in nnx.to_flat_state(tree)}

    def _keyed(self, state: Any) -> dict[str, np.ndarray]:
        from flax import nnx

        keyed = {}
        for path, variable in nnx.to_flat_state(state):
            key, transform = keymap.to_checkpoint(path)
            keyed[key] = keymap.apply(transform, np.asarray(variable[...], np.float64))
        return keyed


class Mlx:
    """MLX, eager."""

    name = "mlx"

    def module(self, path: str) -> Any:
        return importlib.import_module(f"mlx_impl.{path}")

    def rngs(self, seed: int) -> Any:
        return self.module("models.layers").Rngs(seed)

    def array(self, values: Any) -> Any:
        import mlx.core as mx

        values = np.asarray(values)
        narrow = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}.get(values.dtype)
        return mx.array(values if narrow is None else values.astype(narrow))

    def stack(self, values: Sequence[Any]) -> Any:
        import mlx.core as mx

        return mx.stack(list(values))

    def values(self, function: Function) -> Callable[..., Arrays]:
        return lambda *inputs: self._leaves(function(*map(self.array, inputs)))

    def gradients(self, function: Function, wrt: Sequence[int] = (0,)) -> Callable[..., list[Arrays]]:
        import mlx.core as mx
        from mlx.utils import tree_flatten

        def of(number: int, inputs: Sequence[Any]) -> Arrays:
            gradient = mx.grad(lambda *x: tree_flatten(function(*x))[number][1], argnums=list(wrt))
            return self._leaves(gradient(*inputs))

        def all_of(*inputs: Any) -> list[Arrays]:
            arrays = [self.array(x) for x in inputs]
            return [of(number, arrays) for number in range(len(tree_flatten(function(*arrays))))]

        return all_of

    def parameters(self, model: Any) -> dict[str, np.ndarray]:
        return self._keyed(model.parameters())

    def set_parameters(self, model: Any, values: dict[str, np.ndarray]) -> None:
        model.load_weights([(key, self.array(value)) for key, value in values.items()])

    def results(
        self, model: Any, function: Function, seed: int, *inputs: Any
    ) -> tuple[Arrays, dict[str, np.ndarray]]:
        import mlx.nn as nn

        def total(*arrays: Any) -> Any:
            outputs = function(model, *arrays)
            return mixed(self, outputs, seed), outputs

        (_, outputs), gradient = nn.value_and_grad(model, total)(*map(self.array, inputs))
        return self._leaves(outputs), self._keyed(gradient)

    def tree(self, model: Any) -> Any:
        return model.parameters()

    def named(self, tree: Any) -> dict[str, Any]:
        from mlx.utils import tree_flatten

        return dict(tree_flatten(tree))

    def _keyed(self, tree: Any) -> dict[str, np.ndarray]:
        from mlx.utils import tree_flatten

        return {key: np.array(value).astype(np.float64) for key, value in tree_flatten(tree)}

    def _leaves(self, tree: Any) -> Arrays:
        return list(self._keyed(tree).values())


Backend = Jax | Mlx


def backend_of(name: str) -> Backend:
    """The backend of a name; skips the test where MLX is not installed."""
    if name == "jax":
        return Jax()
    pytest.importorskip("mlx.core", reason="needs MLX: install the extra `mlx`")
    return Mlx()
