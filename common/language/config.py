"""The recipes of language models: decoder, Indra, Infinito, and fine-tuning of one that is trained.

Settings of the models: architectures.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Self

from common.config import LoraConfig, is_folder_name, misfits, with_settings
from common.errors import UserError
from common.language.architectures import (
    DecoderConfig,
    DistillationConfig,
    IndraConfig,
    InfinitoConfig,
    LanguageModelConfig,
)

__all__ = [
    "LANGUAGE_RECIPES",
    "MODEL_REMEDY",
    "TEACHER_REMEDY",
    "DecoderConfig",
    "DecoderRecipe",
    "DistillationConfig",
    "FineTuneRecipe",
    "IndraConfig",
    "IndraRecipe",
    "InfinitoConfig",
    "InfinitoRecipe",
    "LanguageDataConfig",
    "LanguageEvalConfig",
    "LanguageLoraConfig",
    "LanguageRecipe",
    "LanguageTrainConfig",
]

# what to do where a model is not found: common.hub.resolve_model
MODEL_REMEDY = "Name a checkpoint directory or a run of configs/{infinito_small,indra,...}.py."
TEACHER_REMEDY = (
    "Give the path of a downloaded Llama or Qwen3 checkpoint, or train a teacher here: "
    "python scripts/train.py --config configs/indra.py --preset teacher"
)


@dataclasses.dataclass(frozen=True)
class LanguageDataConfig:
    name: str = "pydocs"
    """`pydocs` (the documentation here), `wikitext-2`, `alpaca`, `mixed` (both), a folder in WikiText's form,
    a .txt file, or a .jsonl file of rows: instruction + output, text + summary, question + answer,
    prompt + completion, or text."""
    form: Literal["literal", "detokenised"] = "detokenised"
    """WikiText as its files have it, the form of the literature's tables, or as one would type it."""
    tokenizer: str = "bpe"
    """`bpe` is trained on the training split; else a name (gpt2, llama2), a file or a folder. A base brings
    its own."""
    vocab_size: int = 8192
    """Tokens of `bpe`, >= 512."""
    mask_unknown: bool = True
    """Neither the loss nor perplexity counts `<unk>`; the literal form always counts it."""
    mask_prompt: bool = False
    """Of instruction rows the answer alone is counted: for fine-tuning."""
    max_dev_documents: int | None = None
    """At most this many documents of dev are scored during training, the first ones."""


@dataclasses.dataclass(frozen=True)
class LanguageTrainConfig:
    epochs: float = 1.0
    min_steps: int = 0
    """Goes on past `epochs` to this many steps."""
    max_steps: int | None = None
    """Stops earlier than `epochs`; the length of the run when `epochs` is 0."""
    batch_size: int = 16
    """Rows, or streams, in a step over all devices."""
    unroll: int = 1
    """Segments of a row in a step; >= 2 lets gradients flow through a memory."""
    reset_rate: float = 0.0
    """Chance that a segment begins with an empty memory, beside those that begin an article; in [0, 1)."""
    learning_rate: float = 1e-3
    warmup: float = 0.05
    """Share of the steps with a rising rate."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    weight_decay: float = 0.1
    """On weights only: never on biases and norms."""
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    """Share of the target that lies evenly on the vocabulary, in [0, 1); in training only."""
    average: float = 0.0
    """Decay of a running mean of the weights, which then is what is evaluated and saved; 0 is without."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation; `auto` is bfloat16 for JAX on GPU, float32 elsewhere. Parameters stay float32."""
    seed: int = 0
    evaluations: int = 4
    """How often dev is scored during training, evenly spaced, the end included."""
    patience: int | None = None
    """Evaluations without a better dev result before training stops early; never when absent."""
    best: Literal["perplexity", "score"] = "perplexity"
    """Which dev figure chooses best/; `score` where a recipe has one (configs/expansion_sft.py)."""
    checkpoint_every: int = 100
    """Steps between states that an interrupted run resumes from."""

    @property
    def portable_rate(self) -> float:
        """No part of a language model has a rate of its own."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class LanguageLoraConfig(LoraConfig):
    """Low-rank adapters on a base, which rests; merged into the weights when a checkpoint is saved."""

    rank: int = 0
    """0: no adapters, every parameter learns."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter (`q_proj`, `v_proj`); empty: all of them."""
    train_embeddings: bool = False
    """Embeddings and head learn in full beside the adapters."""

    def learns(self, path: Sequence[str | int]) -> bool:
        """Whether the parameter at an attribute path learns."""
        embeds = self.train_embeddings and bool({"embed_tokens", "lm_head"} & set(path))
        return not self.rank or embeds or path[-1] in ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class LanguageEvalConfig:
    batch_size: int = 16
    """Rows scored at once."""
    stride: int | None = None
    """Tokens between the beginnings of two windows; the context when absent. Smaller: each token is seen with
    more before it, and takes longer."""


@dataclasses.dataclass(frozen=True)
class LanguageRecipe:
    """What the recipes of all language models share; `model` is what each adds."""

    name: str = "language"
    """The run's folder below `runs/`: one name, no path."""
    base: str | None = None
    """A checkpoint directory or run to go on from: its settings and tokenizer stand for `model` (but for the
    rates of dropout) and `data.tokenizer`. Fresh when absent."""
    data: LanguageDataConfig = LanguageDataConfig()
    train: LanguageTrainConfig = LanguageTrainConfig()
    lora: LanguageLoraConfig = LanguageLoraConfig()
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)
    evaluation: LanguageEvalConfig = LanguageEvalConfig()
    model: Any = None

    @property
    def rates(self) -> dict[str, float]:
        """Rates of dropout, under the names of a model's settings."""
        names = ("embedding_dropout", "word_dropout", "hidden_dropout", "attention_dropout")
        return {name: getattr(self.model, name) for name in names}

    @property
    def scored(self) -> bool:
        """Whether what the model generates on dev is scored."""
        return False

    @property
    def max_dev_documents(self) -> int | None:
        """How much of dev is scored during training."""
        return self.data.max_dev_documents

    @property
    def masks_unknown(self) -> bool:
        """Whether `<unk>` is left out of what is counted."""
        return self.data.mask_unknown and self.data.form != "literal"

    def changed(self, **parts: Any) -> Self:
        """The recipe with other settings: recipe.changed(name="mine", train={"epochs": 2})."""
        return with_settings(self, parts)

    def validate(self) -> Self:
        """Return self, or raise a UserError that lists every field out of range."""
        if wrong := list(misfits(self)):
            raise UserError("setting of the wrong kind: " + "; ".join(wrong))
        wrong = [
            *(
                f"{field} is {value!r}; allowed: {allowed}"
                for field, value, good, allowed in self._checks()
                if not good
            ),
            *([] if self.model is None else self.model.problems("model.")),
            *self.distillation.problems("distillation."),
        ]
        if wrong:
            raise UserError("setting out of range: " + "; ".join(wrong))
        return self

    def _checks(self) -> list[tuple[str, Any, bool, str]]:
        t, e, lora = self.train, self.evaluation, self.lora
        folder = is_folder_name(self.name)
        context = None if self.model is None else self.model.context
        zero_to_one = ("reset_rate", "warmup", "label_smoothing", "average")
        counts = ("batch_size", "unroll", "evaluations", "checkpoint_every")
        return [
            ("name", self.name, folder, "a folder's name, without / and no dot first"),
            *self._data_checks(),
            ("lora.rank", lora.rank, lora.rank >= 0, ">= 0"),
            ("lora.alpha", lora.alpha, lora.alpha > 0, "> 0"),
            ("lora.rank", lora.rank, not lora.rank or self.base is not None, "0 without a --base that rests"),
            (
                "train.best",
                t.best,
                t.best == "perplexity" or self.scored,
                "perplexity: nothing is scored here",
            ),
            ("train.epochs", t.epochs, t.epochs >= 0 and (t.epochs > 0 or t.max_steps), "> 0, or max_steps"),
            ("train.min_steps", t.min_steps, t.min_steps >= 0, ">= 0"),
            ("train.max_steps", t.max_steps, _absent_or_positive(t.max_steps), ">= 1"),
            ("train.learning_rate", t.learning_rate, 0 < t.learning_rate < 1, "(0, 1)"),
            ("train.weight_decay", t.weight_decay, t.weight_decay >= 0, ">= 0"),
            ("train.max_grad_norm", t.max_grad_norm, t.max_grad_norm > 0, "> 0"),
            ("train.seed", t.seed, 0 <= t.seed < 2**31, "[0, 2^31)"),
            ("train.patience", t.patience, _absent_or_positive(t.patience), ">= 1"),
            ("evaluation.batch_size", e.batch_size, e.batch_size >= 1, ">= 1"),
            (
                "evaluation.stride",
                e.stride,
                e.stride is None or 1 <= e.stride <= (context or e.stride),
                f"1 to the context, {context}" if context else ">= 1",
            ),
            *((f"train.{n}", getattr(t, n), 0 <= getattr(t, n) < 1, "[0, 1)") for n in zero_to_one),
            *((f"train.{n}", getattr(t, n), getattr(t, n) >= 1, ">= 1") for n in counts),
            (
                "train.unroll",
                t.unroll,
                t.unroll == 1 or self.model is None or isinstance(self.model, InfinitoConfig),
                "1 but for Infinito: the rows of other models do not go on",
            ),
        ]

    def _data_checks(self) -> list[tuple[str, Any, bool, str]]:
        d = self.data
        return [
            ("data.vocab_size", d.vocab_size, d.vocab_size >= 512, ">= 512"),
            ("data.max_dev_documents", d.max_dev_documents, _absent_or_positive(d.max_dev_documents), ">= 1"),
        ]


@dataclasses.dataclass(frozen=True)
class DecoderRecipe(LanguageRecipe):
    """A plain Llama or Qwen3 decoder: a teacher, or a control."""

    name: str = "decoder"
    model: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)


@dataclasses.dataclass(frozen=True)
class IndraRecipe(LanguageRecipe):
    """Indra: `python scripts/train.py --config configs/indra.py`."""

    name: str = "indra"
    model: IndraConfig = dataclasses.field(default_factory=IndraConfig)


@dataclasses.dataclass(frozen=True)
class InfinitoRecipe(LanguageRecipe):
    """Infinito: `python scripts/train.py --config configs/infinito.py`."""

    name: str = "infinito"
    model: InfinitoConfig = dataclasses.field(default_factory=InfinitoConfig)


@dataclasses.dataclass(frozen=True)
class FineTuneRecipe(LanguageRecipe):
    """A trained model of any kind goes on with a task: `configs/finetune.py`."""

    name: str = "finetune"
    data: LanguageDataConfig = LanguageDataConfig(name="alpaca", mask_prompt=True)
    context: int | None = None
    """Tokens of a row; the base's own context when absent, 1024 at most."""
    on_long_row: Literal["error", "skip"] = "error"
    """A row longer than that: stop, or leave it out of training and say how many."""
    model: LanguageModelConfig | None = None
    """Settings of the base, which are read from it."""

    @property
    def remedy(self) -> str | None:
        """What to do where the base is not found; the usual advice when None."""
        return MODEL_REMEDY

    @property
    def whole_rows(self) -> bool:
        """Whether a row must fit the context; Infinito reads on with its memory."""
        return not isinstance(self.model, InfinitoConfig)

    def _checks(self) -> list[tuple[str, Any, bool, str]]:
        return [
            *super()._checks(),
            ("base", self.base, bool(self.base), "a checkpoint or run to begin with: --base runs/NAME"),
            ("context", self.context, self.context is None or self.context >= 8, ">= 8"),
        ]


LANGUAGE_RECIPES = (DecoderRecipe, IndraRecipe, InfinitoRecipe, FineTuneRecipe)


def _absent_or_positive(value: int | None) -> bool:
    return value is None or value >= 1
