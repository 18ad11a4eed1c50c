"""Many devices, many processes: where a step's arrays lie, what it sums over devices, how processes meet.

Data parallel: parameters and optimizer lie whole on every device, lists are spread. jit over a mesh, or pmap
with the same step body. No twin: mlx_impl/training/distributed.py has mx.distributed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from common.data.pipeline import Share, device_order
from common.errors import UserError
from common.processes import Launch, Processes
from common.progress import hush

Tree = TypeVar("Tree")
AXIS = "data"
HEARTBEAT_SECONDS = 60  # without a sign of life, a process is dead and all others are ended
SHUTDOWN_SECONDS = 15  # that a process which ends waits for the others


class Devices:
    """All devices of a run, or `devices` of this process, as one axis; `axis` is its name inside a pmap, None
    inside a jit over the mesh."""

    def __init__(
        self, parallel: Literal["jit", "pmap"] = "jit", devices: Sequence[jax.Device] | None = None
    ) -> None:
        count = len(devices or jax.devices())
        self.mesh = jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
        self.axis = AXIS if parallel == "pmap" else None
        self.count = self.mesh.size
        self._devices = list(self.mesh.devices.flat)
        self._everywhere = NamedSharding(self.mesh, PartitionSpec())

    def meet(self) -> None:
        """The first sum over all devices, to be called when all processes are there.

        On CPU a first one fails where a process comes more than 30 seconds late, as after compiling a step;
        later ones wait.
        """
        rows = NamedSharding(self.mesh, PartitionSpec(AXIS))
        ones = jax.make_array_from_process_local_data(rows, np.ones(len(self._here()), np.float32))
        jax.jit(jnp.sum, out_shardings=self._everywhere)(ones).block_until_ready()

    def share(self, lists: int, parts: int) -> Share | None:
        """What this process holds of a step of `lists` in `parts` micro-batches; None: all, as it is."""
        if self.count == 1:
            return None
        order = device_order(lists, parts, self.count)
        own = [device.process_index == jax.process_index() for device in self._devices]
        return Share(order[own].ravel(), order.ravel())

    def compile(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """step(state, batch, moment) on all devices; the state is donated and comes back as it lay."""
        if self.axis is None:
            return jax.jit(step, donate_argnums=0, out_shardings=self._everywhere)
        return jax.pmap(step, axis_name=AXIS, in_axes=(0, 0, None), donate_argnums=0, devices=self._devices)

    def replicate(self, tree: Tree) -> Tree:
        """A state on every device, as the compiled step takes it."""
        if self.axis is not None:
            here = self._here()
            stacked = NamedSharding(Mesh(np.asarray(here), (AXIS,)), PartitionSpec(AXIS))

            def copies(x: jax.Array) -> jax.Array:
                one = np.asarray(x)[None]
                shape = (len(here), *x.shape)
                return jax.make_array_from_callback(shape, stacked, lambda _: one)

            return jax.tree.map(copies, tree)
        if jax.process_count() == 1:
            return jax.device_put(tree, self._everywhere)
        put = jax.make_array_from_process_local_data
        return jax.tree.map(lambda x: put(self._everywhere, np.asarray(x), x.shape), tree)

    def place(self, batch: Tree) -> Tree:
        """This process's rows of a batch, NumPy, on its devices."""
        if self.axis is not None:
            count = len(self._here())
            return jax.tree.map(lambda x: x.reshape(count, len(x) // count, *x.shape[1:]), batch)
        rows = NamedSharding(self.mesh, PartitionSpec(AXIS))
        if jax.process_count() == 1:
            return jax.device_put(batch, rows)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)

    def whole(self, tree: Tree) -> Tree:
        """A state as arrays whole on every device of the mesh: what Orbax saves, on any number of them."""
        if self.axis is None:
            return tree

        def one(x: jax.Array) -> jax.Array:
            copies = [shard.data.reshape(x.shape[1:]) for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape[1:], self._everywhere, copies)

        return jax.tree.map(one, tree)

    def local(self, tree: Tree) -> Tree:
        """A state as arrays of this process's first device alone, to compute with apart from the others."""
        return jax.tree.map(lambda x: x.addressable_shards[0].data, self.whole(tree))

    def _here(self) -> list[jax.Device]:
        return [device for device in self._devices if device.process_index == jax.process_index()]


def summed(tree: Tree, axis: str | None) -> Tree:
    """The sum over the devices of a pmap; inside a jit a sum over rows is one over devices already."""
    return tree if axis is None else jax.lax.psum(tree, axis)


def gathered(tree: Tree, axis: str | None) -> Tree:
    """The rows of all devices of a pmap, in their order, with a gradient to where they came from."""
    return tree if axis is None else jax.lax.all_gather(tree, axis, tiled=True)


def once(tree: Tree, axis: str | None) -> Tree:
    """What all devices of a pmap have computed of gathered rows, to be summed: the first one's counts."""
    if axis is None:
        return tree
    return jax.tree.map(lambda x: jnp.where(jax.lax.axis_index(axis) == 0, x, jnp.zeros_like(x)), tree)


def join(launch: Launch) -> Processes:
    """Meet the other processes of the run (UserError if they do not come); all but the first fall silent."""
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.processes,
            launch.process,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        where = launch.coordinator or "what the cluster says"
        raise UserError(f"the processes of the run did not meet at {where}: {error}") from error
    processes = current()
    if not processes.first:
        hush()
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, to the end of the process
    return processes


def current() -> Processes:
    """The processes that were joined, or this one alone."""
    if jax.process_count() == 1:
        return Processes()
    return Processes(jax.process_index(), jax.process_count(), _gather)


def _gather(row: list[float]) -> list[list[float]]:
    """float64 as bytes: JAX would round it. An all-gather, which waits as long as it takes."""
    everyone = multihost_utils.process_allgather(np.asarray(row, np.float64).view(np.uint8))
    return [list(map(float, values)) for values in np.asarray(everyone).view(np.float64)]
