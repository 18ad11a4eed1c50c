"""The trainer of a reranker; the loop itself is common.reranker.training's.

Twin: mlx_impl/training/loop.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from common.backends import checkpoint_identity
from common.config import RerankerConfig
from common.data.pipeline import ListBatch
from common.errors import UserError
from common.reranker.prepare import Prepared, plan_batches
from common.reranker.training import DevSet, RerankerLoop, check_model
from jax_impl.loading import LoadedReranker, load_cross_encoder, save_cross_encoder
from jax_impl.models.lora import add_lora, trainable
from jax_impl.scoring import JaxEncoder, JaxOriginal, JaxScorer, accelerator, default_dtype
from jax_impl.training.optimizer import learning_rate, make_optimizer
from jax_impl.training.parallel import Devices, current
from jax_impl.training.state import StateFolder
from jax_impl.training.step import Batch, Moment, TrainState, make_step


class Trainer(RerankerLoop):
    """One run of a recipe on all devices of all processes. Raises UserError, see RerankerLoop."""

    def __init__(
        self, config: RerankerConfig, prepared: Prepared, *, say: Callable[[str], None] = print
    ) -> None:
        super().__init__(config, prepared, say=say)
        train = config.train
        self.device, self.processes, self.devices = accelerator(), current(), Devices(train.parallel)
        self.dtype = default_dtype(train.precision)
        self.loaded: LoadedReranker = _load(config, self.base, self.dtype)
        check_model(config, self.loaded.config["model_type"], self.loaded.settings["head"])
        original = self._frozen()
        aligns = self._aligns(self.loaded.model.encoder.config.hidden_size)
        encoder = JaxEncoder(self.base) if aligns else None
        plan = self.processes.in_turn(
            lambda: plan_batches(config, prepared, self.tokenizer, encoder, original)
        )
        kind = jax.devices()[0].device_kind
        self._planned(plan, f"{self.devices.count} {kind} device(s), {self.dtype}")
        self._report_devices()
        graphdef, learned, fixed = nnx.split(self.loaded.model, _learns(config), ...)  # type: ignore[misc]
        optimizer = make_optimizer(train, self.steps)
        key = jax.random.fold_in(jax.random.key(train.seed), 1)
        dropout = train.hidden_dropout > 0 or train.attention_dropout > 0
        self._step = make_step(config, graphdef, optimizer, key if dropout else None, self.devices)
        self._share = self.devices.share(config.lists_per_step, train.micro_batches)
        state = TrainState(learned, fixed, optimizer.init(learned), jnp.zeros((), jnp.int32))
        self._same_start(state)
        self.state: TrainState = self.devices.replicate(state)
        self.dev = DevSet(config, prepared, self.tokenizer)
        self._scorer = JaxScorer(self.loaded.model, self.tokenizer, name="dev")

    def _same_start(self, state: TrainState) -> None:
        """Refuse processes that would train something else than the first one does."""
        if self.processes.count == 1:
            return
        weight = sum(float(np.abs(np.asarray(x, np.float64)).sum()) for x in jax.tree.leaves(state.learned))
        mine = [float(self.steps), float(len(self.plan.lists)), weight]
        theirs = self.processes.told(mine)
        with self.processes.together():
            if mine != theirs:
                raise UserError(
                    f"process {self.processes.index} has steps, lists and sum of parameters {mine}, the "
                    f"first one {theirs}: give all processes the same command, files and versions."
                )
        self.devices.meet()

    def _frozen(self) -> JaxOriginal | None:
        """The base before any step, where the recipe preserves what it says."""
        if not self.config.preserves:
            return None
        self._original = checkpoint_identity(self.base, str(self.dtype))
        states = self.config.retrain.resonance_alignment > 0
        return JaxOriginal(self.loaded.model, self.tokenizer, self._original, states=states)

    def _report_devices(self) -> None:
        if self.processes.count > 1:
            self.say(f"{self.processes.count} processes; this one, the first, scores dev and writes")
        part = self.config.lists_per_step // self.config.train.micro_batches
        if self.devices.count > 1 and part % self.devices.count:
            empty = -part % self.devices.count
            self.say(
                f"{part} lists of a micro-batch leave {empty} of {part + empty} places on "
                f"{self.devices.count} devices empty: the same result, at the cost of a full batch"
            )

    def _states(self, folder: Path) -> StateFolder:
        return StateFolder(folder)

    def _save_state(self, states: StateFolder, notes: dict[str, Any]) -> None:
        states.save(self.devices.whole(self.state), notes)

    def _load_state(self, states: StateFolder) -> dict[str, Any]:
        loaded, notes = states.load(self.devices.whole(self.state))
        self.state = self.devices.replicate(loaded)
        return notes

    def _steps_done(self) -> int:
        return int(self.devices.local(self.state.step))

    def _batches(self) -> Any:
        return self.plan.loader(self.steps, self._share)

    def _one_step(self, step: int, batch: ListBatch) -> dict[str, jax.Array]:
        placed = self.devices.place(Batch(*(getattr(batch, name) for name in Batch._fields)))
        self.state, logged = self._step(self.state, placed, Moment(*self._moment(step)))
        return logged

    def _learning_rate(self, step: int) -> float:
        return float(learning_rate(self.config.train, self.steps)(step - 1))

    def scorer(self) -> JaxScorer:
        self._scorer.set_state(self._parameters())
        return self._scorer

    def write(self, directory: Path, training: dict[str, Any], card: str) -> None:
        nnx.update(self.loaded.model, self._parameters())
        save_cross_encoder(
            directory, self.loaded, training=training, tokenizer_save=self.tokenizer.save, card=card
        )

    def _parameters(self) -> Any:
        return nnx.merge_state(*self.devices.local((self.state.learned, self.state.fixed)))


def _load(config: RerankerConfig, directory: Path, dtype: DTypeLike) -> LoadedReranker:
    train, lora = config.train, config.model.lora
    loaded = load_cross_encoder(
        directory,
        config.model,
        dtype=dtype,
        seed=train.seed,
        dropout=(train.hidden_dropout, train.attention_dropout),
    )
    if config.model.use_lora:
        try:
            rngs = nnx.Rngs(train.seed)
            add_lora(loaded.model.encoder, lora.rank, lora.alpha, lora.targets, rngs=rngs)
        except ValueError as error:
            raise UserError(f"model.lora.targets: {error}") from None
    return loaded


def _learns(config: RerankerConfig) -> Any:
    """Which parameters learn. The bias b only under a pointwise loss: elsewhere its gradient is rounding
    noise, which Adam would blow up to full steps."""
    learns: Any = trainable if config.model.use_lora else nnx.Param
    return learns if config.train.objective == "bce" else nnx.All(learns, nnx.Not(nnx.PathContains("b")))
