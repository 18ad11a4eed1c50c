"""The trainer of a language model; the loop itself is common.language.training's.

Twin: jax_impl/training/language.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from common.backends import checkpoint_identity
from common.data.language import LanguageBatch, PackedRows
from common.data.teacher import StoredOutputs, stored_outputs
from common.errors import UserError
from common.language.config import LanguageRecipe
from common.language.prepare import PreparedLanguage
from common.language.training import LanguageLoop
from common.reranker.prepare import cache_root
from mlx_impl.generation import ModelEngine
from mlx_impl.language import build_language_model, load_language_model, save_language_model
from mlx_impl.language_scoring import ModelScorer
from mlx_impl.losses.language import certainty, entropy, store_teacher
from mlx_impl.models.decoder import LanguageModel
from mlx_impl.models.dropout import fold_in
from mlx_impl.models.layers import Rngs, given_parameters
from mlx_impl.models.lora import add_lora, freeze
from mlx_impl.scoring import accelerator, default_dtype
from mlx_impl.training.language_step import LanguageInput, LanguageState, make_language_step, packed
from mlx_impl.training.optimizer import learning_rate, make_optimizer
from mlx_impl.training.state import StateFolder


class LanguageTrainer(LanguageLoop):
    """One run of a recipe on this process's device. Raises UserError, see LanguageLoop."""

    def __init__(
        self, recipe: LanguageRecipe, prepared: PreparedLanguage, *, say: Callable[[str], None] = print
    ) -> None:
        super().__init__(recipe, prepared, say=say)
        train = recipe.train
        self.device = accelerator()
        dtype = default_dtype(train.precision)
        if self.base is None:
            self.model = build_language_model(self.model_config, dtype=dtype, seed=train.seed)
        else:
            self.model, _ = load_language_model(self.base, dtype=dtype, **recipe.rates)
        self.adapt(Rngs(train.seed))
        memory = self.model.empty_memory(train.batch_size)
        self.state = LanguageState(
            self.model,
            make_optimizer(train, self.steps),
            None if memory is None else memory._asdict(),
            tree_map(mx.array, self.model.trainable_parameters()) if train.average else None,
        )
        self._scorer, self._engine = ModelScorer(self.model), ModelEngine(self.model)
        taught, self._stored = self._teach(dtype)
        key = fold_in(mx.random.key(train.seed), 1)
        self._step = make_language_step(recipe, self.state, key, self.steps, taught)
        flat: Any = tree_flatten(self.model.trainable_parameters())
        learns = sum(value.size for _, value in flat)
        self.say(f"{learns:,} parameters learn; {mx.default_device()}, {dtype}")

    def adapt(self, rngs: Rngs) -> None:
        """Put adapters on the model, where the recipe asks for them. UserError for a target it has not."""
        lora = self.recipe.lora
        if not lora.rank:
            return
        try:
            add_lora(self.model, lora.rank, lora.alpha, lora.targets, rngs=rngs)
        except ValueError as error:
            raise UserError(f"lora.targets: {error}") from None
        freeze(self.model, lambda path, _: lora.learns(path))

    def _teach(self, dtype: Any) -> tuple[LanguageModel | None, StoredOutputs | None]:
        """The teacher that runs in every step, or what was stored of it; neither without one."""
        if self.teacher is None:
            return None, None
        model, _ = load_language_model(self.teacher, dtype=dtype)

        def sure(ids: np.ndarray, segments: np.ndarray) -> np.ndarray:
            logits = model(mx.array(ids), mx.array(segments)).logits
            return np.asarray(certainty(entropy(logits), logits.shape[-1]))

        self.ask_teacher(sure, self._scorer.context)
        settings = self.recipe.distillation
        if not settings.stored:
            return model, None
        if not isinstance(self.plan, PackedRows):
            raise UserError(
                "distillation.stored needs rows that are packed: set it to 0 for Infinito and fine-tuning"
            )
        k, temperature = min(settings.stored, self.model_config.vocab_size), settings.temperature

        def outputs(ids: np.ndarray, segments: np.ndarray) -> np.ndarray:
            logits = model(mx.array(ids), mx.array(segments)).logits
            return np.asarray(packed(store_teacher(logits, k, temperature)))

        stored = stored_outputs(
            outputs,
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
        _, notes = states.load(self.state)
        return notes

    def _steps_done(self) -> int:
        return int(self.state.step)

    def _one_step(self, step: int, batch: LanguageBatch) -> dict[str, mx.array]:
        stored = np.zeros((len(batch.reset), 0, 0), np.float32)
        if self._stored is not None:
            stored = self._stored.rows(batch.row_index)
        arrays = (batch.input_ids, batch.labels, batch.mask, batch.segments, batch.reset, stored)
        return self._step(LanguageInput(*map(mx.array, arrays)))

    def _learning_rate(self, step: int) -> float:
        return float(learning_rate(self.recipe.train, self.steps)(step - 1))

    def scorer(self) -> ModelScorer:
        self._scorer.set_state(self.state.average)
        return self._scorer

    def engine(self) -> ModelEngine:
        self._engine.set_state(self.state.average)
        return self._engine

    def write(self, directory: Path, training: dict[str, Any], card: str) -> None:
        with given_parameters(self.model, self.state.average):
            save_language_model(
                directory,
                self.model,
                self.model_config,
                training=training,
                tokenizer_save=self.save_tokenizer,
                card=card,
                extra=self.token_ids(),
            )
