"""The trainer of a language model; the loop itself is common.language.training's.

Twin: mlx_impl/training/language.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.backends import checkpoint_identity
from common.data.language import LanguageBatch, PackedRows
from common.data.teacher import StoredOutputs, stored_outputs
from common.errors import UserError
from common.language.config import LanguageRecipe
from common.language.prepare import PreparedLanguage
from common.language.training import LanguageLoop
from common.reranker.prepare import cache_root
from jax_impl.generation import ModelEngine
from jax_impl.language import build_language_model, load_language_model, save_language_model
from jax_impl.language_scoring import ModelScorer
from jax_impl.losses.language import certainty, entropy, store_teacher
from jax_impl.models.decoder import LanguageModel
from jax_impl.models.lora import add_lora
from jax_impl.scoring import accelerator, default_dtype
from jax_impl.training.language_step import (
    LanguageInput,
    LanguageState,
    Resting,
    make_language_step,
    packed,
)
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
        self.adapt(nnx.Rngs(train.seed))
        graphdef, learned, resting = nnx.split(self.model, _learns(recipe), ...)  # type: ignore[misc]
        optimizer = make_optimizer(train, self.steps)
        key = jax.random.fold_in(jax.random.key(train.seed), 1)
        self._scorer, self._engine = ModelScorer(self.model), ModelEngine(self.model)
        taught, self._stored = self._teach(dtype)
        said = None if taught is None else nnx.state(taught)
        self._resting: Resting = self.devices.replicate(Resting(resting, said))
        self._step = make_language_step(
            recipe,
            graphdef,
            optimizer,
            key,
            self.devices,
            self.steps,
            None if taught is None else nnx.graphdef(taught),
        )
        state = LanguageState(
            learned=learned,
            optimizer=optimizer.init(learned),
            step=jnp.zeros((), jnp.int32),
            memory=self.model.empty_memory(train.batch_size),
            average=jax.tree.map(jnp.copy, learned) if train.average else None,
        )
        self.state: LanguageState = self.devices.replicate(state)
        learns = sum(x.size for x in jax.tree.leaves(learned))
        kind = jax.devices()[0].device_kind
        self.say(f"{learns:,} parameters learn; {self.devices.count} {kind} device(s), {dtype}")

    def adapt(self, rngs: nnx.Rngs) -> None:
        """Put adapters on the model, where the recipe asks for them. UserError for a target it has not."""
        lora = self.recipe.lora
        if not lora.rank:
            return
        try:
            add_lora(self.model, lora.rank, lora.alpha, lora.targets, rngs=rngs)
        except ValueError as error:
            raise UserError(f"lora.targets: {error}") from None

    def _teach(self, dtype: Any) -> tuple[LanguageModel | None, StoredOutputs | None]:
        """The teacher that runs in every step, or what was stored of it; neither without one."""
        if self.teacher is None:
            return None, None
        model, _ = load_language_model(self.teacher, dtype=dtype)
        graphdef, state = nnx.split(model)

        @jax.jit
        def sure(state: Any, ids: Any, segments: Any) -> jax.Array:
            logits = nnx.merge(graphdef, state)(ids, segments).logits
            return certainty(entropy(logits), logits.shape[-1])

        self.ask_teacher(lambda ids, segments: np.asarray(sure(state, ids, segments)), self._scorer.context)
        settings = self.recipe.distillation
        if not settings.stored:
            return model, None
        if not isinstance(self.plan, PackedRows):
            raise UserError(
                "distillation.stored needs rows that are packed: set it to 0 for Infinito and fine-tuning"
            )
        k, temperature = min(settings.stored, self.model_config.vocab_size), settings.temperature

        @jax.jit
        def outputs(state: Any, ids: Any, segments: Any) -> jax.Array:
            logits = nnx.merge(graphdef, state)(ids, segments).logits
            return packed(store_teacher(logits, k, temperature))

        stored = stored_outputs(
            lambda ids, segments: np.asarray(outputs(state, ids, segments)),
            checkpoint_identity(self.teacher, str(dtype), k, temperature),
            self.plan,
            cache_root() / "teachers",
            self.recipe.train.batch_size,
        )
        return None, stored

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

    def _one_step(self, step: int, batch: LanguageBatch) -> dict[str, jax.Array]:
        stored: Any = np.zeros((len(batch.reset), 0, 0), np.float32)
        if self._stored is not None:
            stored = self._stored.rows(batch.row_index)
        arrays: Any = (batch.input_ids, batch.labels, batch.mask, batch.segments, batch.reset)
        placed = self.devices.place(LanguageInput(*(*arrays, stored)))
        self.state, logged = self._step(self.state, placed, self._resting)
        return logged

    def _learning_rate(self, step: int) -> float:
        return float(learning_rate(self.recipe.train, self.steps)(step - 1))

    def scorer(self) -> ModelScorer:
        self._scorer.set_state(self._weights())
        return self._scorer

    def engine(self) -> ModelEngine:
        self._engine.set_state(self._weights())
        return self._engine

    def write(self, directory: Path, training: dict[str, Any], card: str) -> None:
        nnx.update(self.model, self._weights())
        save_language_model(
            directory,
            self.model,
            self.model_config,
            training=training,
            tokenizer_save=self.save_tokenizer,
            card=card,
            extra=self.token_ids(),
        )

    def _weights(self) -> Any:
        state = self.state
        learned = state.learned if state.average is None else state.average
        return nnx.merge_state(self.devices.local(learned), self.devices.local(self._resting.base))


def _learns(recipe: LanguageRecipe) -> Any:
    """A filter of parameters by their path."""
    return lambda path, _: recipe.lora.learns(path)
