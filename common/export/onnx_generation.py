"""The Engine of common.language.generation for an exported language model: onnxruntime, step by step.

Written by jax_impl/export/onnx_language.py. Nothing of JAX or MLX is needed here, nor a checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.checkpoint import CONFIG_FILE, ONNX_FILE
from common.errors import UserError, listed
from common.export.onnx_scoring import available_cores, open_session
from common.language.architectures import DecoderConfig, InfinitoConfig, LanguageModelConfig, language_config

KIND = "language-model"
CONTRACT = """`attention_mask` is 1 at tokens, those of the past included, and 0 at padding, which may stand
anywhere; `position_ids` count the tokens of a text or segment from 0. `num_logits_to_keep` says of how many
last columns logits are wanted, 0 for all. `new_segment` (of a model with a memory) is 1 where a segment
begins: what the row's past holds is then written to its memory, and no longer seen. The past begins with
zeros, of no columns."""
Shape = tuple[int | str, ...]
SPARE = 64  # columns of a cache that no row needs any more, before they are taken out


def model_inputs(config: LanguageModelConfig) -> dict[str, Shape]:
    """The inputs of a model's graph but its past, int64, as CONTRACT says: name -> shape."""
    found: dict[str, Shape] = {
        "input_ids": ("rows", "tokens"),
        "attention_mask": ("rows", "past + tokens"),
        "position_ids": ("rows", "tokens"),
        "num_logits_to_keep": (),
    }
    return found | ({"new_segment": ("rows",)} if has_memory(config) else {})


def past_inputs(config: LanguageModelConfig) -> dict[str, Shape]:
    """What a graph takes as `past` and gives back as `present`, float32: name -> shape."""
    blocks = config if isinstance(config, DecoderConfig) else config.blocks()
    cached: Shape = ("rows", blocks.key_value_heads, "past", blocks.head_width)
    layers = range(blocks.num_hidden_layers)
    found = {f"past_key_values.{n}.{part}": cached for n in layers for part in ("key", "value")}
    if isinstance(config, InfinitoConfig) and config.remembers:
        slots, width, heads = config.memory_slots, config.hidden_size, config.num_attention_heads
        recalled: Shape = ("rows", heads, slots + 1, width // heads)
        found |= {
            "past_states": ("rows", "past", width),
            "past_memory.slots": ("rows", slots, width),
            "past_memory.importance": ("rows", slots),
            "past_memory.age": ("rows", slots),
            "past_recalled.key": recalled,
            "past_recalled.value": recalled,
        }
    return found


def present_name(past: str) -> str:
    """The output that becomes the input `past` of the next call."""
    return past.replace("past_key_values", "past").replace("past", "present", 1)


def has_memory(config: LanguageModelConfig) -> bool:
    """Whether a model has a memory of slots."""
    return isinstance(config, InfinitoConfig) and config.remembers


@dataclasses.dataclass
class Reading:
    """What a model knows of N rows."""

    past: dict[str, Any]  # of onnxruntime, by the name of its input
    mask: NDArray[np.int64]  # [N, P], 1 at tokens of the past that are seen
    length: NDArray[np.int64]  # [N], tokens of the present segment
    fresh: NDArray[np.bool_]  # [N], rows whose next token begins a segment


class OnnxLanguageModel:
    """The graph of an exported directory. UserError for a corrupt file, and for one of another model."""

    def __init__(self, directory: Path) -> None:
        self._session, settings = open_session(directory, KIND, available_cores())
        self.config = language_config(settings, directory / CONFIG_FILE)
        self.names = past_inputs(self.config)
        self._check(directory / ONNX_FILE)
        self._asked = ["logits", *map(present_name, self.names)]

    def start(self, rows: int) -> Reading:
        """Rows that have read nothing."""
        from onnxruntime import OrtValue

        sizes = {"rows": rows, "past": 0}
        past = {
            name: OrtValue.ortvalue_from_numpy(
                np.zeros([sizes[n] if isinstance(n, str) else n for n in shape], np.float32)
            )
            for name, shape in self.names.items()
        }
        nothing = np.zeros((rows, 0), np.int64)
        return Reading(past, nothing, np.zeros(rows, np.int64), np.ones(rows, bool))

    def read(
        self, state: Reading, ids: NDArray[np.int64], real: NDArray[np.bool_], keep: int
    ) -> tuple[Reading, NDArray[np.float32]]:
        """(state, logits [N, keep or S, V]) after ids [N, S], of which `real` ones are no padding."""
        from onnxruntime import OrtValue

        fresh = state.fresh[:, None]
        began = np.where(state.fresh, 0, state.length)
        positions = began[:, None] + np.cumsum(real, axis=1) - 1
        seen = state.mask * ~fresh
        given = {
            "input_ids": ids,
            # a graph with a memory reads what it writes there: it hides the past of a new segment itself
            "attention_mask": np.concatenate(
                (state.mask if has_memory(self.config) else seen, real), 1, dtype=np.int64
            ),
            "position_ids": np.maximum(positions, 0),
            "num_logits_to_keep": np.asarray(keep),
            "new_segment": state.fresh,
        }
        feeds = {
            name: OrtValue.ortvalue_from_numpy(np.asarray(given[name], np.int64, order="C"))
            for name in model_inputs(self.config)
        }
        logits, *present = self._session.run_with_ort_values(self._asked, feeds | state.past)
        past = dict(zip(self.names, present, strict=True))
        mask = np.concatenate((seen, real), axis=1, dtype=np.int64)
        after = Reading(past, mask, began + real.sum(axis=1), np.zeros(len(ids), bool))
        return self._compacted(after), logits.numpy()

    def _compacted(self, state: Reading) -> Reading:
        """The same without most of the columns that nobody sees."""
        from onnxruntime import OrtValue

        longest = int(state.mask.sum(axis=1).max(initial=0))
        if state.mask.shape[1] <= 2 * longest + SPARE:
            return state
        # the tokens of each row, in order, behind what is left of its padding
        places = np.argsort(state.mask, axis=1, kind="stable")[:, state.mask.shape[1] - longest :]
        past = dict(state.past)
        for name, shape in self.names.items():
            if "past" in shape:
                axis = shape.index("past")
                size = [len(places), *[1] * (len(shape) - 1)]
                size[axis] = longest
                kept = np.take_along_axis(past[name].numpy(), places.reshape(size), axis)
                past[name] = OrtValue.ortvalue_from_numpy(np.ascontiguousarray(kept))
        return dataclasses.replace(state, past=past, mask=np.take_along_axis(state.mask, places, 1))

    def _check(self, file: Path) -> None:
        """UserError for a graph that is not of this config.json."""
        found = {item.name: tuple(item.shape) for item in self._session.get_inputs()}
        expected = model_inputs(self.config) | self.names
        found |= {item.name: tuple(item.shape) for item in self._session.get_outputs()}
        expected |= {present_name(name): shape for name, shape in self.names.items()}
        expected["logits"] = ("rows", "kept", self.config.vocab_size)
        problems = [
            f"{name}: expected {_said(expected.get(name))}, found {_said(found.get(name))}"
            for name in sorted(expected.keys() | found.keys())
            if not _alike(expected.get(name), found.get(name))
        ]
        if problems:
            raise UserError(
                f"{file}: a graph that is not of the model in {CONFIG_FILE} beside it:\n{listed(problems)}\n"
                "Copy both files from one export, or export it again."
            )


class OnnxEngine:
    """A language model as common.language.generation.Engine."""

    def __init__(self, model: OnnxLanguageModel) -> None:
        self._model, config = model, model.config
        self.context: int | None = config.context
        self.segmented = isinstance(config, InfinitoConfig)
        self.vocab_size = config.vocab_size

    def start(self, rows: int, capacity: int) -> Reading:
        """Rows that have read nothing; a cache here grows as it needs to."""
        return self._model.start(rows)

    def read(
        self,
        state: Reading,
        ids: NDArray[np.int32],
        counts: NDArray[np.int32],
        explore: tuple[int, int] | None = None,
    ) -> tuple[Reading, NDArray[np.float32]]:
        """As common.language.generation.Engine; logits [N, V]. UserError for exploration of a memory."""
        if explore is not None and has_memory(self._model.config):
            raise UserError(
                "an ONNX export has no exploration: leave it out, or generate with the checkpoint that was "
                "exported"
            )
        width = max(int(counts.max(initial=0)), 1)
        real = np.arange(width) >= width - counts[:, None]  # tokens at the right end: the last has the logits
        moved = np.zeros(real.shape, np.int64)
        moved[real] = ids[np.arange(ids.shape[1]) < counts[:, None]]
        state, logits = self._model.read(state, moved, real, keep=1)
        return state, logits[:, 0]

    def renew(self, state: Reading, rows: NDArray[np.bool_]) -> Reading:
        """End the segment of these rows [N]; it is written to the memory when they read on."""
        return dataclasses.replace(state, fresh=state.fresh | rows)


def load_engine(directory: Path) -> OnnxEngine:
    """The language model of an exported directory, ready to generate. Raises UserError."""
    return OnnxEngine(OnnxLanguageModel(Path(directory)))


def _alike(expected: Shape | None, found: Sequence[Any] | None) -> bool:
    """Whether two shapes have the same fixed sizes at the same places."""
    if expected is None or found is None or len(expected) != len(found):
        return False
    return all(
        a == b or (isinstance(a, str) and isinstance(b, str)) for a, b in zip(expected, found, strict=True)
    )


def _said(shape: Sequence[Any] | None) -> str:
    return "nothing" if shape is None else str(list(shape))
