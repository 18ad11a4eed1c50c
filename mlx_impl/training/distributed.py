"""Data parallel over processes, one a Mac: `mlx.launch` starts them, `mx.distributed` joins them.

Every process holds the whole model and plans the same batches. It encodes its share of a micro-batch's rows,
sees the outputs of all rows, and gradients are summed: terms between queries need nothing of their own.
Process 0 evaluates and owns the run's folder. No twin: jax_impl has meshes.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from common.errors import UserError
from common.processes import Processes

_LEAVING = bytes(32)  # said in place of a hash by a process that will not train


class World:
    """The processes of one run; alone without `mlx.launch`, and then nothing is sent anywhere."""

    met = False  # whether the processes of this run have found each other, in `agree` or `leave`

    def __init__(self) -> None:
        self.group = mx.distributed.init()
        self.rank, self.size = self.group.rank(), self.group.size()
        self.processes = Processes(self.rank, self.size, self._gather) if self.size > 1 else Processes()

    def share(self, rows: int) -> slice:
        """This process's rows of a micro-batch."""
        return slice(self.rank * rows // self.size, (self.rank + 1) * rows // self.size)

    def gathered(self, outputs: Any) -> Any:
        """A tree of arrays [N, ...] of `share` as one of all rows; a gradient reaches the own ones alone."""
        if self.size == 1:
            return outputs
        own: list[mx.array] = []
        tree_map(own.append, outputs)
        count = own[0].shape[0]
        packed = mx.concatenate([x.reshape(count, -1) for x in own], axis=1)  # [N, W], one message
        everyone = mx.distributed.all_gather(mx.stop_gradient(packed), group=self.group)
        first = self.rank * count
        joined = mx.concatenate([everyone[:first], packed, everyone[first + count :]])
        borders = np.cumsum([x.size // count for x in own])[:-1].tolist()
        parts = iter(mx.split(joined, borders, axis=1))
        return tree_map(lambda x: next(parts).reshape(-1, *x.shape[1:]), outputs)

    def summed(self, gradients: Any) -> Any:
        """The sum of all processes' gradients."""
        if self.size == 1:
            return gradients
        return tree_map(lambda x: x * self.size, nn.average_gradients(gradients, self.group))

    def from_first(self, value: Any) -> Any:
        """The first process's value, made of what JSON holds."""
        if self.size == 1:
            return value
        first = self.processes.first
        text = np.frombuffer(json.dumps(value if first else None).encode(), np.uint8)
        length = int(np.array(self._sum(mx.array(len(text) if first else 0))))
        sent = mx.array(text.astype(np.int32)) if first else mx.zeros(length, mx.int32)
        return json.loads(np.array(self._sum(sent)).astype(np.uint8).tobytes())

    def fill_from_first(self, tree: Any) -> None:
        """Replace every array of a tree by the first process's, in the container that holds it."""
        if self.size == 1:
            return
        first = self.processes.first
        for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
            if isinstance(value, mx.array):
                tree[key] = self._sum(value if first else mx.zeros_like(value))
            elif isinstance(value, dict | list):
                self.fill_from_first(value)

    def agree(self, what: Any) -> None:
        """Meet the others, and see that all have the same: UserError, or the end when the first one left."""
        if self.size == 1:
            return
        said = self._meet(hashlib.sha256(json.dumps(what, default=str, sort_keys=True).encode()).digest())
        if said[0] == _LEAVING:  # it has said why
            raise SystemExit(0)
        for rank, one in enumerate(said):
            if one == _LEAVING:
                raise UserError(f"process {rank} could not begin; its own message says why.")
            if one != said[0]:
                raise UserError(
                    f"process {rank} has other settings, data, base model, code or version of MLX than "
                    "process 0: every Mac needs the same (give --data a file or folder copied to each)."
                )

    def leave(self) -> None:
        """Tell the others, unless they were met already, that this process will not train."""
        if self.size > 1 and not World.met:
            self._meet(_LEAVING)

    def _meet(self, digest: bytes) -> list[bytes]:
        World.met = True
        own = mx.array(np.frombuffer(digest, np.uint8).astype(np.int32))
        everyone = np.array(mx.distributed.all_gather(own, group=self.group)).astype(np.uint8)
        return [row.tobytes() for row in everyone.reshape(self.size, -1)]

    def _gather(self, row: list[float]) -> list[list[float]]:
        """float64 as bytes, which no device rounds."""
        own = mx.array(np.asarray(row, np.float64).view(np.uint8).astype(np.int32))
        everyone = np.array(mx.distributed.all_gather(own, group=self.group)).astype(np.uint8)
        return [list(map(float, values)) for values in everyone.reshape(self.size, -1).view(np.float64)]

    def _sum(self, value: mx.array) -> mx.array:
        total = mx.distributed.all_sum(value, group=self.group)
        mx.eval(total)  # everywhere in the same order
        return total
