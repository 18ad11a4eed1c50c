"""The trainer of a language model; the loop itself is common.language_training's.

Twin: mlx_impl/training/language.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common.config_language import LanguageRecipe
from common.data.language import LanguageBatch
from common.errors import UserError
from common.language_training import LanguageLoop
from common.prepare_language import PreparedLanguage
from jax_impl.language import build_language_model, load_language_model, save_language_model
from jax_impl.language_scoring import JaxSegmentScorer
from jax_impl.scoring import accelerator, default_dtype
from jax_impl.training.language_step import LanguageInput, LanguageState, make_language_step
from jax_impl.training.optimizer import learning_rate, make_optimizer
from jax_impl.training.parallel import Devices
from jax_impl.training.state import StateFolder


class LanguageTrainer(LanguageLoop):
    """One run of a recipe on all devices of this process. Raises UserError, see LanguageLoop."""

    def __init__(
        self, recipe: LanguageRecipe, prepared: PreparedLanguage, *, say: Callable[[str], None] = print
    ) -> None:
        super().__init__(recipe, prepared, say=say)
        train = recipe.train
        self.device, self.devices = accelerator(), Devices()
        if train.batch_size % self.devices.count:
            raise UserError(
                f"train.batch_size {train.batch_size} does not divide over {self.devices.count} devices; "
                "choose a multiple."
            )
        dtype = default_dtype(train.precision)
        if self.base is None:
            self.model = build_language_model(self.model_config, dtype=dtype, seed=train.seed)
        else:
            self.model, _ = load_language_model(self.base, dtype=dtype, **recipe.rates)
        graphdef, learned = nnx.split(self.model)
        optimizer = make_optimizer(train, self.steps)
        key = jax.random.fold_in(jax.random.key(train.seed), 1)
        self._step = make_language_step(recipe, graphdef, optimizer, key, self.devices)
        state = LanguageState(
            learned=learned,
            optimizer=optimizer.init(learned),
            step=jnp.zeros((), jnp.int32),
            memory=self.model.empty_memory(train.batch_size),
            average=jax.tree.map(jnp.copy, learned) if train.average else None,
        )
        self.state: LanguageState = self.devices.replicate(state)
        self._scorer = JaxSegmentScorer(self.model)
        self.say(f"{self.devices.count} {jax.devices()[0].device_kind} device(s), {dtype}")

    def _states(self, folder: Path) -> StateFolder:
        return StateFolder(folder)

    def _save_state(self, states: StateFolder, notes: dict[str, Any]) -> None:
        states.save(self.state, notes)

    def _load_state(self, states: StateFolder) -> dict[str, Any]:
        loaded, notes = states.load(self.state)
        self.state = self.devices.replicate(loaded)
        return notes

    def _steps_done(self) -> int:
        return int(self.state.step)

    def _one_step(self, batch: LanguageBatch) -> dict[str, jax.Array]:
        parts = LanguageInput(*(getattr(batch, name) for name in LanguageInput._fields))
        self.state, logged = self._step(self.state, self.devices.place(parts))
        return logged

    def _learning_rate(self, step: int) -> float:
        return float(learning_rate(self.recipe.train, self.steps)(step - 1))

    def scorer(self) -> JaxSegmentScorer:
        self._scorer.set_state(self._weights())
        return self._scorer

    def write(self, directory: Path, training: dict[str, Any], card: str) -> None:
        nnx.update(self.model, self._weights())
        save_language_model(
            directory,
            self.model,
            self.model_config,
            training=training,
            tokenizer_save=self.tokenizer.save,
            card=card,
            extra={"eos_token_id": self.tokenizer.end, "bos_token_id": self.tokenizer.end},
        )

    def _weights(self) -> Any:
        state = self.state
        return self.devices.local(state.learned if state.average is None else state.average)
