"""The trainer of a reranker; the loop itself is common.reranker.training's.

Twin: jax_impl/training/loop.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from common.backends import checkpoint_identity
from common.config import RerankerConfig, to_dict
from common.data.pipeline import ListBatch
from common.errors import UserError
from common.reranker.prepare import Prepared, plan_batches
from common.reranker.training import DevSet, RerankerLoop, check_model
from common.runs import environment
from mlx_impl.loading import LoadedReranker, load_cross_encoder, save_cross_encoder
from mlx_impl.models.dropout import fold_in
from mlx_impl.models.layers import Rngs
from mlx_impl.models.lora import add_lora, freeze, trainable
from mlx_impl.scoring import MlxEncoder, MlxOriginal, MlxScorer, accelerator, default_dtype
from mlx_impl.training.distributed import World
from mlx_impl.training.optimizer import learning_rate, make_optimizer
from mlx_impl.training.state import StateFolder
from mlx_impl.training.step import Batch, Moment, TrainState, make_step


class Trainer(RerankerLoop):
    """One run of a recipe on a device of each process. Raises UserError, see RerankerLoop."""

    def __init__(
        self, config: RerankerConfig, prepared: Prepared, *, say: Callable[[str], None] = print
    ) -> None:
        if config.train.parallel != "jit":
            raise UserError(
                f"train.parallel {config.train.parallel} is JAX's: add --backend jax, or leave it out."
            )
        super().__init__(config, prepared, say=say)
        train = config.train
        self.device, self.world = accelerator(), World()
        self.processes = self.world.processes
        self.dtype = default_dtype(train.precision)
        self.loaded: LoadedReranker = _load(config, self.base, self.dtype)
        check_model(config, self.loaded.config["model_type"], self.loaded.settings["head"])
        original = self._frozen()
        aligns = self._aligns(self.loaded.model.encoder.config.hidden_size)
        encoder = MlxEncoder(self.base) if aligns else None
        plan = plan_batches(config, prepared, self.tokenizer, encoder, original)
        self._meet()
        self._planned(plan, f"{self.processes.count} x {mx.default_device()}, {self.dtype}")
        model = self.loaded.model
        freeze(model, _learns(config))
        key = fold_in(mx.random.key(train.seed), 1)
        dropout = train.hidden_dropout > 0 or train.attention_dropout > 0
        self.state = TrainState(model, make_optimizer(train, self.steps))
        self._step = make_step(config, self.state, key if dropout else None, self.world)
        self.dev = DevSet(config, prepared, self.tokenizer)
        self._scorer = MlxScorer(self.loaded.model, self.tokenizer, name="dev")

    def _meet(self) -> None:
        """See that the processes can share a step, and that all begin with the same."""
        config, size = self.config, self.processes.count
        if config.lists_per_step // config.train.micro_batches % size:
            beside = " + retrain.old_batch_size" if config.retrain.old_data else ""
            raise UserError(
                f"train.batch_size{beside} {config.lists_per_step} / micro_batches "
                f"{config.train.micro_batches} does not divide over {size} devices; choose a multiple."
            )
        if size == 1:
            return
        old = None if self.prepared.old is None else len(self.prepared.old)
        data = [self.prepared.data.fingerprint, len(self.prepared.training), old]
        base, here = checkpoint_identity(self.base), environment()
        self.world.agree([to_dict(config), data, base, here["git_commit"], here["versions"].get("mlx")])

    def _frozen(self) -> MlxOriginal | None:
        """The base before any step, where the recipe preserves what it says."""
        if not self.config.preserves:
            return None
        self._original = checkpoint_identity(self.base, str(self.dtype))
        states = self.config.retrain.resonance_alignment > 0
        return MlxOriginal(self.loaded.model, self.tokenizer, self._original, states=states)

    def _restore(self, states: Any) -> dict[str, Any]:
        """As the first process finds it, who has the run's folder."""
        notes: dict[str, Any] = self.world.from_first(
            super()._restore(states) if self.processes.first else None
        )
        for tree in self.state.arrays():
            self.world.fill_from_first(tree)
        return notes

    def _states(self, folder: Path) -> StateFolder:
        return StateFolder(folder)

    def _save_state(self, states: StateFolder, notes: dict[str, Any]) -> None:
        if self.processes.first:
            states.save(self.state, notes)

    def _load_state(self, states: StateFolder) -> dict[str, Any]:
        self.state, notes = states.load(self.state)
        return notes

    def _steps_done(self) -> int:
        return int(self.state.step)

    def _batches(self) -> Any:
        return self.plan.loader(self.steps)

    def _one_step(self, step: int, batch: ListBatch) -> dict[str, mx.array]:
        placed = Batch(*(mx.array(getattr(batch, name)) for name in Batch._fields))
        return self._step(placed, Moment(*self._moment(step)))

    def _learning_rate(self, step: int) -> float:
        return float(learning_rate(self.config.train, self.steps)(step - 1))

    def scorer(self) -> MlxScorer:
        return self._scorer

    def write(self, directory: Path, training: dict[str, Any], card: str) -> None:
        save_cross_encoder(
            directory, self.loaded, training=training, tokenizer_save=self.tokenizer.save, card=card
        )


def _load(config: RerankerConfig, directory: Path, dtype: mx.Dtype) -> LoadedReranker:
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
            rngs = Rngs(train.seed)
            add_lora(loaded.model.encoder, lora.rank, lora.alpha, lora.targets, rngs=rngs)
        except ValueError as error:
            raise UserError(f"model.lora.targets: {error}") from None
    return loaded


def _learns(config: RerankerConfig) -> Callable[[tuple[str | int, ...], mx.array], bool]:
    """Which parameters learn. The bias b only under a pointwise loss: elsewhere its gradient is rounding
    noise, which Adam would blow up to full steps."""

    def learns(path: tuple[str | int, ...], value: mx.array) -> bool:
        if path[-1] == "b" and config.train.objective != "bce":
            return False
        return trainable(path, value) if config.model.use_lora else True

    return learns
