"""What a language model is made of: its settings, once, and what its config.json says.

Llama and Qwen3 checkpoints (Touvron et al. 2023, arXiv:2302.13971; Qwen Team 2025, arXiv:2505.09388), Indra,
and Infinito with its controls (DESIGN section 3).
Models: {jax_impl,mlx_impl}/models/{decoder,indra,infinito,lstm}.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

import numpy as np

from common.errors import UserError

Family = Literal["llama", "qwen3"]
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
LANGUAGE_MODELS = (*ARCHITECTURES, "indra", "infinito")  # model_type of a config.json
# Tensors that a checkpoint may have and a model has not: buffers that old versions of transformers wrote.
DROPPABLE = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
QWEN3_HEAD_DIM = 128  # where a Qwen3 config.json does not say


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and later stretch low frequencies (`rope_type` llama3), as their config.json has it."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A Llama or Qwen3 decoder, under the names of its config.json; its blocks are those of Indra too."""

    family: Family = "llama"
    """qwen3 normalises queries and keys of each head."""
    vocab_size: int = 32000
    hidden_size: int = 256
    intermediate_size: int = 688
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    """Fewer than heads: each is shared by several (GQA). As many when absent."""
    head_dim: int | None = None
    """Width of a head; hidden_size / heads when absent."""
    max_position_embeddings: int = 256
    """The context: the longest input, in tokens."""
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    tie_word_embeddings: bool = True
    embedding_dropout: float = 0.0
    """Of each number that the first layer reads, in [0, 1); all rates hold in training only."""
    word_dropout: float = 0.0
    """Of a whole token's embedding."""
    hidden_dropout: float = 0.0
    """Of what attention and MLP add, and of the last states."""
    attention_dropout: float = 0.0

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // max(self.num_attention_heads, 1)

    @property
    def context(self) -> int:
        return self.max_position_embeddings

    def inverse_frequencies(self) -> list[float]:
        """Radians a position for each pair of a head's numbers, [K/2]."""
        width, scaling = self.head_width, self.rope_scaling
        plain = [self.rope_theta ** (-2 * i / width) for i in range(width // 2)]
        return plain if scaling is None else [_stretched(frequency, scaling) for frequency in plain]

    def problems(self, prefix: str = "") -> list[str]:
        """Every field out of range, in words, its name behind `prefix`."""
        heads, groups = self.num_attention_heads, self.key_value_heads
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        return _problems(
            prefix,
            [
                *_positive(self, (*sizes, "max_position_embeddings")),
                ("num_key_value_heads", groups, heads % max(groups, 1) == 0, f"a divisor of {heads} heads"),
                (
                    "hidden_size",
                    self.hidden_size,
                    self.head_dim is not None or self.hidden_size % max(heads, 1) == 0,
                    f"a multiple of {heads} heads",
                ),
                ("head_dim", self.head_width, self.head_width > 0 and self.head_width % 2 == 0, "even, >= 2"),
                ("rms_norm_eps", self.rms_norm_eps, self.rms_norm_eps > 0, "> 0"),
                ("rope_theta", self.rope_theta, self.rope_theta > 0, "> 0"),
                *_rates(self),
            ],
        )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Of a checkpoint's config.json; ValueError names a variant that is not computed here."""
        family = config.get("model_type")
        if family not in ARCHITECTURES:
            raise ValueError(f"model_type is {family!r}; allowed: {', '.join(ARCHITECTURES)}")
        for key, usual in (("hidden_act", "silu"), ("mlp_bias", False), ("use_sliding_window", False)):
            if config.get(key, usual) != usual:
                raise ValueError(f"{key} is {config[key]!r}; only {usual!r} is computed here")
        if others := set(config.get("layer_types") or ()) - {"full_attention"}:
            raise ValueError(f"layer_types has {sorted(others)}; only 'full_attention' is computed here")
        known = {field.name for field in dataclasses.fields(cls)} - {"family", "rope_scaling", "rope_theta"}
        settings = {key: config[key] for key in known if config.get(key) is not None and "dropout" not in key}
        settings.setdefault("tie_word_embeddings", False)
        settings.setdefault("rms_norm_eps", 1e-6)
        if family == "qwen3":
            settings.setdefault("head_dim", QWEN3_HEAD_DIM)
        missing = {"vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"} - settings.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        theta, scaling = _rope(config)
        made = cls(**settings, family=family, rope_theta=theta, rope_scaling=scaling)
        if wrong := made.problems():
            raise ValueError("; ".join(wrong))
        return made

    def to_dict(self) -> dict[str, Any]:
        """A config.json that transformers loads; training's rates of dropout are not part of it."""
        settings = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if "dropout" not in field.name and not field.name.startswith(("family", "rope"))
        }
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_scaling is not None:
            rope |= {"rope_type": "llama3", **dataclasses.asdict(self.rope_scaling)}
        return settings | {
            "model_type": self.family,
            "architectures": [ARCHITECTURES[self.family]],
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_width,
            "hidden_act": "silu",
            "rope_parameters": rope,
            "rope_theta": self.rope_theta,
        }


@dataclasses.dataclass(frozen=True)
class IndraConfig:
    """Embedding -> projector -> decoder blocks -> second projector -> logits (DESIGN section 3, Indra)."""

    vocab_size: int = 32000
    hidden_size: int = 128
    intermediate_size: int = 344
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    context: int = 128
    """The longest input, in tokens."""
    projector: Literal["polar", "cartesian", "none"] = "polar"
    """none: the same blocks without projectors, which knows no phase: the control."""
    complex_width: int = 128
    """Complex amplitudes C of both states."""
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = True
    embedding_dropout: float = 0.0
    word_dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0

    def blocks(self) -> DecoderConfig:
        """The decoder blocks."""
        return _blocks(self, self.intermediate_size)

    def problems(self, prefix: str = "") -> list[str]:
        """Every field out of range, in words."""
        own = _positive(self, ("complex_width",))
        return [*_block_problems(self.blocks(), prefix), *_problems(prefix, own)]

    def to_dict(self) -> dict[str, Any]:
        return _own_dict(self, "indra")


@dataclasses.dataclass(frozen=True)
class InfinitoConfig:
    """Decoder blocks, one of which reads an external memory (DESIGN section 3, Infinito), and its controls.

    The defaults are the reference recipe of 71 M parameters.
    """

    vocab_size: int = 50257
    hidden_size: int = 640
    intermediate_size: int = 1568
    num_hidden_layers: int = 8
    num_attention_heads: int = 10
    context: int = 256
    """Tokens of a segment, all that attention sees at once."""
    architecture: Literal["infinito", "transformer", "lstm"] = "infinito"
    """transformer, lstm: controls with as many parameters, the memory's spent on wider MLPs, or all of them
    on `lstm_layers` layers of LSTM."""
    memory_slots: int = 256
    """N. 0 is without memory and its parameters."""
    memory_writes: int = 64
    """The most important positions of a segment that are written, at most `memory_slots`."""
    memory_layer: int | None = None
    """The block, from 0, before whose output is passed on the memory is read; the middle one when absent."""
    memory_decay: float = 0.95
    """What a slot keeps of its importance after each segment, in (0, 1]."""
    exploration: float = 0.1
    """Standard deviation of the noise on memory queries, >= 0."""
    lstm_layers: int = 3
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = True
    embedding_dropout: float = 0.0
    word_dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0

    @property
    def reads_at(self) -> int:
        """The block that reads the memory."""
        return self.num_hidden_layers // 2 if self.memory_layer is None else self.memory_layer

    @property
    def remembers(self) -> bool:
        """Whether there is a memory of slots."""
        return self.architecture == "infinito" and self.memory_slots > 0

    def blocks(self) -> DecoderConfig:
        """The decoder blocks; those of the control transformer are wider by the memory's parameters."""
        inner = self.intermediate_size
        if self.architecture == "transformer" and self.memory_slots > 0:
            width = self.hidden_size
            inner += round(_memory_parameters(width) / (3 * width * self.num_hidden_layers))
        return _blocks(self, inner)

    def lstm_width(self) -> int:
        """The state's width of the control LSTM, whose parameters are as many as the model's."""
        target = parameter_count(dataclasses.replace(self, architecture="infinito"))
        low, high = 1, 4 * self.hidden_size + self.vocab_size
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _lstm_parameters(self, middle) <= target else (low, middle)
        nearest = (low, high)
        return min(nearest, key=lambda width: abs(_lstm_parameters(self, width) - target))

    def problems(self, prefix: str = "") -> list[str]:
        """Every field out of range, in words."""
        slots, writes, layers = self.memory_slots, self.memory_writes, self.num_hidden_layers
        own = [
            ("memory_slots", slots, slots >= 0, ">= 0"),
            ("memory_writes", writes, 1 <= writes <= max(slots, 1) or not slots, "[1, memory_slots]"),
            ("memory_layer", self.memory_layer, 0 <= self.reads_at < layers, f"[0, {layers - 1}]"),
            ("memory_decay", self.memory_decay, 0 < self.memory_decay <= 1, "(0, 1]"),
            ("exploration", self.exploration, self.exploration >= 0, ">= 0"),
            *_positive(self, ("lstm_layers",)),
        ]
        return [*_block_problems(self.blocks(), prefix), *_problems(prefix, own)]

    def to_dict(self) -> dict[str, Any]:
        return _own_dict(self, "infinito")


LanguageModelConfig = DecoderConfig | IndraConfig | InfinitoConfig


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """A student's loss: w_ce CE + w_kd(t) T^2 KL(teacher || student) + w_pm L_pm (DESIGN section 3)."""

    teacher: str | None = None
    """A Llama or Qwen3 checkpoint with the student's vocabulary; without one the loss is CE."""
    cross_entropy_weight: float = 1.0
    start_weight: float = 0.01
    """w_kd at the first step; linear to `end_weight`."""
    end_weight: float = 0.05
    temperature: float = 2.0
    """T, > 0."""
    phase_magnitude_weight: float = 0.1
    """w_pm, of the second state's agreement with the teacher's certainty; Indra with a projector only."""
    stored: int = 0
    """Teacher logits kept of each token, computed once; 0 runs the teacher in every step."""

    def weight(self, progress: Any) -> Any:
        """w_kd at a share of the training in [0, 1]."""
        return self.start_weight + (self.end_weight - self.start_weight) * progress

    def problems(self, prefix: str = "") -> list[str]:
        """Every field out of range, in words."""
        weights = ("cross_entropy_weight", "start_weight", "end_weight", "phase_magnitude_weight", "stored")
        checks = [(name, getattr(self, name), getattr(self, name) >= 0, ">= 0") for name in weights]
        return _problems(prefix, [*checks, ("temperature", self.temperature, self.temperature > 0, "> 0")])


def language_config(config: Mapping[str, Any], where: object) -> LanguageModelConfig:
    """The settings that a directory's config.json holds; UserError when it is no language model's."""
    kinds: dict[str, type[IndraConfig] | type[InfinitoConfig]] = {
        "indra": IndraConfig,
        "infinito": InfinitoConfig,
    }
    kind = str(config.get("model_type"))
    try:
        if kind in ARCHITECTURES:
            return DecoderConfig.from_dict(config)
        if kind not in kinds:
            allowed = ", ".join(LANGUAGE_MODELS)
            raise ValueError(f"model_type is {config.get('model_type')!r}; language models: {allowed}")
        known = {field.name for field in dataclasses.fields(kinds[kind])}
        made = kinds[kind](**{key: value for key, value in config.items() if key in known})
        if wrong := made.problems():
            raise ValueError("; ".join(wrong))
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}. Choose another model, or copy its config.json again.") from None
    return made


def tied_tensors(
    config: LanguageModelConfig, tensors: Mapping[str, np.ndarray], where: object
) -> dict[str, np.ndarray]:
    """A checkpoint's tensors without the copy of the embeddings that some carry as `lm_head`.

    UserError when the two differ: config.json then says wrongly that they are tied.
    """
    head, table = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if (
        not (isinstance(config, DecoderConfig) and config.tie_word_embeddings)
        or head is None
        or table is None
    ):
        return dict(tensors)
    if not np.array_equal(head, table):
        raise UserError(
            f"{where}: lm_head.weight differs from embed_tokens.weight, but tie_word_embeddings is true "
            "in config.json. Set it to false there, or remove the tensor that is wrong."
        )
    return {key: value for key, value in tensors.items() if key != "lm_head.weight"}


def parameter_count(config: LanguageModelConfig) -> int:
    """How many numbers a model of these settings learns."""
    if isinstance(config, InfinitoConfig) and config.architecture == "lstm":
        return _lstm_parameters(config, config.lstm_width())
    blocks = config if isinstance(config, DecoderConfig) else config.blocks()
    count = _decoder_parameters(blocks)
    if isinstance(config, InfinitoConfig) and config.remembers:
        count += _memory_parameters(config.hidden_size)
    if isinstance(config, IndraConfig) and config.projector != "none":
        biases = 2 if config.projector == "polar" else 0
        width, states = config.hidden_size, config.complex_width
        count += 2 * (2 * width * states + biases * states + 2 * states * width)
    return count


def _decoder_parameters(config: DecoderConfig) -> int:
    width, queries = config.hidden_size, config.num_attention_heads * config.head_width
    shared = config.key_value_heads * config.head_width
    attention = 2 * width * (queries + shared)
    if config.attention_bias:
        attention += queries + 2 * shared + width
    if config.family == "qwen3":
        attention += 2 * config.head_width
    layer = attention + 3 * width * config.intermediate_size + 2 * width
    tables = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    return tables + config.num_hidden_layers * layer + width


def _memory_parameters(width: int) -> int:
    """Four projections, norm, null slot, gate, importance."""
    return 4 * width**2 + 4 * width + 1


def _lstm_parameters(config: InfinitoConfig, hidden: int) -> int:
    width = config.hidden_size
    tables = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    first = 4 * hidden * (width + hidden + 1)
    rest = (config.lstm_layers - 1) * 4 * hidden * (2 * hidden + 1)
    return tables + first + rest + hidden * width


def _blocks(config: IndraConfig | InfinitoConfig, inner: int) -> DecoderConfig:
    shared = {field.name for field in dataclasses.fields(DecoderConfig)}
    same = {field.name for field in dataclasses.fields(config)} & shared
    settings = {name: getattr(config, name) for name in same} | {"intermediate_size": inner}
    return DecoderConfig(**settings, max_position_embeddings=config.context)


def _block_problems(blocks: DecoderConfig, prefix: str) -> list[str]:
    return [problem.replace("max_position_embeddings", "context") for problem in blocks.problems(prefix)]


def _own_dict(config: IndraConfig | InfinitoConfig, kind: str) -> dict[str, Any]:
    return {"model_type": kind, "architectures": [kind.capitalize()], **dataclasses.asdict(config)}


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, in the hub's spelling or transformers' newer one."""
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or rope
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope_type is {kind!r}; only 'default' and 'llama3' are computed here")
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    if missing := [name for name in names if name not in scaling]:
        raise ValueError(f"its rope scaling lacks {', '.join(missing)}")
    return theta, RopeScaling(**{name: scaling[name] for name in names})


def _stretched(frequency: float, scaling: RopeScaling) -> float:
    """1/factor of it below low_freq_factor turns within the old context, itself above high_freq_factor."""
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = min(1.0, max(0.0, (turns - low) / (high - low)))
    return (1 - kept) * frequency / scaling.factor + kept * frequency


def _positive(config: Any, names: Iterable[str]) -> list[tuple[str, Any, bool, str]]:
    return [(name, getattr(config, name), getattr(config, name) >= 1, ">= 1") for name in names]


def _rates(config: DecoderConfig) -> list[tuple[str, Any, bool, str]]:
    names = ("embedding_dropout", "word_dropout", "hidden_dropout", "attention_dropout")
    return [(name, getattr(config, name), 0 <= getattr(config, name) <= 0.95, "[0, 0.95]") for name in names]


def _problems(prefix: str, checks: Iterable[tuple[str, Any, bool, str]]) -> list[str]:
    return [
        f"{prefix}{name} is {value!r}; allowed: {allowed}"
        for name, value, good, allowed in checks
        if not good
    ]
