"""Every setting, once: frozen dataclasses with units and ranges, read from a recipe, overridden by flags."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from common.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Start = Literal["auto", "sentence_encoder", "cross_encoder", "masked_lm"]
Mode = Literal["superposition", "resonance", "entanglement", "adaptation"]
PhaseName = Literal["superposition", "collapse", "resonance", "auto"]
Objective = Literal[
    "quantum", "listwise", "bce", "ranknet", "lambda", "listnet", "plistmle", "margin_mse", "soft_labels"
]
TEACHER_OBJECTIVES = ("margin_mse", "soft_labels")  # learn from a teacher's scores
FirstStage = Literal["bm25", "dense", "rrf"]
Head = Literal["resonance", "cls", "real", "real_part", "root_fidelity", "block_fidelity", "overlap"]
# head -> the projectors it goes with
HEAD_PROJECTORS: dict[str, tuple[str, ...]] = {
    "resonance": ("cartesian", "polar"),
    "cls": ("cartesian", "polar"),
    "real": ("cartesian",),
    "real_part": ("cartesian",),
    "root_fidelity": ("cartesian", "polar"),
    "block_fidelity": ("cartesian", "polar"),
    "overlap": ("polar",),
}
FIDELITY_BLOCKS = 8  # of block_fidelity
Options = TypeVar("Options")
Recipe = TypeVar("Recipe", bound="DataclassInstance")
Settings = TypeVar("Settings")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021); merged into the weights when a checkpoint is saved."""

    rank: int = 16
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of the encoder's linear layers that get an adapter (`query`, `value`); empty: all of them."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    base: str = "default"
    """Model name or directory; `default` is the packaged all-MiniLM-L6-v2."""
    start: Start = "auto"
    """How the head begins; `auto` reads it off the checkpoint (DESIGN section 3)."""
    projector: Literal["cartesian", "polar"] = "cartesian"
    head: Head = "resonance"
    """The number that gamma multiplies in the score, of the two sides' states.

    resonance: r, the real part of their inner product. cls: none, the score is u.h_CLS alone.
    Controls of r: real, the cosine of a real projection of width 2C that starts as the cartesian one;
    real_part, cartesian with B = 0, which stays 0; overlap, BC of polar states, as if every phase were 0.
    Blind to a common phase: root_fidelity, |<psi|chi>|; block_fidelity, the root of the weighted mean of the
    fidelities of 8 blocks, each normalised, with learned weights that start equal."""
    complex_width: int | None = None
    """Complex amplitudes C; the encoder's width when absent."""
    passage_segment: Literal[0, 1] | None = None
    """Segment id of the passage. When absent, what an existing cross-encoder's tokenizer says, and 0 for
    other bases: the retriever's own habit and the portable form."""
    use_lora: bool = False
    lora: LoraConfig = LoraConfig()


@dataclasses.dataclass(frozen=True)
class DataConfig:
    name: str = "pydocs"
    """`pydocs`, a .jsonl/.json file of triples, a BEIR or TREC folder, or a hub dataset. Or several, joined
    by `+`, each with `@N` to keep at most N of its training queries; a query's candidates are of its
    own source."""
    train_split: str = "train"
    dev_split: str = "dev"
    test_split: str = "test"
    encoder: str = "default"
    """Model name or directory of the bi-encoder behind the dense first stage."""
    max_samples: int | None = None
    """At most this many training queries, drawn with `train.seed`; all when absent."""
    list_size: int = 6
    """Candidates in a training list, positives included."""
    max_positives: int = 1
    """Positives in a training list, the best graded; among equal grades drawn anew each epoch."""
    positives: Literal["all", "retrieved"] = "all"
    """`retrieved` shows only those among the first stage's best (100 or more), and drops queries without any:
    where a query has dozens of labels, most of them far from its words, all of them would teach that what
    is near is wrong."""
    negatives: Literal["auto", "bm25", "dense", "rrf", "judged", "given", "random"] = "auto"
    """Where negatives are drawn from: the top of a first stage, passages judged irrelevant (among several
    sources rrf for those that judge none), those given with a query's row, or anywhere. `auto`: the given
    ones where a query has some, else rrf."""
    mined: str | None = None
    """A file of scripts/mine_negatives.py, mined from this very data: its negatives count as given."""
    negative_pool: int = 30
    """Hardest negatives kept for a query; a list draws from them anew each epoch."""
    max_query_tokens: int = 64
    max_passage_tokens: int = 192
    in_batch_negatives: int = 0
    """Candidates of a list that are the best positives of other, unrelated queries of its batch."""
    teacher: str | None = None
    """A TREC run file with a teacher's scores of training pairs, for the objectives margin_mse and
    soft_labels; rows with `positive_scores` and `negative_scores` bring their own."""
    # fmt: off
    length_buckets: tuple[int, ...] = (
        32, 48, 64, 96, 128, 160, 192, 208, 224, 240, 256, 288, 320, 352, 384, 448, 512,
    )
    # fmt: on
    """The padded lengths in use, in tokens; each is compiled once."""
    flipped_labels: float = 0.0
    """Share of the training lists whose best positive and a negative change places, drawn with `train.seed`:
    to measure what wrong labels do."""
    related_threshold: float = 0.5
    """Two queries with a cosine below this are unrelated."""
    on_bad_row: Literal["error", "skip"] = "error"


@dataclasses.dataclass(frozen=True)
class QuantumConfig:
    mode: Mode = "superposition"
    """Which terms join the ranking loss; `adaptation` retrains an existing checkpoint with it alone."""
    phase: PhaseName = "auto"
    resonance_threshold: float = 0.7
    """Fidelity above which a pair counts as relevant, in [0, 1]."""
    resonance_weight: float = 0.3
    resonance_sharpness: float = 10.0
    """Slope κ of the resonance term around the threshold."""
    entanglement_weight: float = 0.3
    entanglement_margin: float = 0.3
    """Overlap that unrelated queries may keep, in [-1, 1]."""
    temperature_start: float = 2.0
    temperature_end: float = 1.0
    entropy_bonus: float = 0.1
    alignment_weight: float = 3.0
    """Holds the states to the base's own of each text alone until the collapse ends, with every objective; a
    sentence encoder's start only."""
    portable_weight: float = 1.0
    """Weight of the portable score's distillation from the full one; 0 turns it off."""


@dataclasses.dataclass(frozen=True)
class RetrainConfig:
    """An existing checkpoint of ours (`model.base`) learns new data; its frozen original holds it back.

    The two weights go with every mode and objective. The original's scores and states are computed once.
    """

    preserve_knowledge: float = 0.0
    """Weight of KL(original || new) over each list, >= 0; 0 turns it off."""
    resonance_alignment: float = 0.0
    """Weight of 1 - Re<original|new> of the query's and the passage's states, >= 0; 0 turns it off."""
    old_data: str | None = None
    """Data of the old domain, as `data.name`; its lists are preserved too. Its labels are never read, and a
    folder may come without."""
    old_split: str = "train"
    """Whose queries are preserved, where the old data has splits; else all of them."""
    old_queries: int | None = 1000
    """At most this many of them, drawn with `train.seed`; all when absent."""
    old_batch_size: int = 4
    """Lists of the old domain in a step, beside `train.batch_size` new ones."""
    analyze_existing: bool = False
    """Analyses the original on the new data's dev split before training."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    objective: Objective = "quantum"
    teacher_temperature: float = 1.0
    """Softens both distributions of soft_labels."""
    epochs: float = 1.0
    min_steps: int = 0
    """Goes on past `epochs` to this many steps: what a few hundred queries need."""
    max_steps: int | None = None
    """Stops earlier than `epochs`; the length of the run when `epochs` is 0."""
    batch_size: int = 8
    """Lists in an optimizer step, over all devices and micro-batches."""
    micro_batches: int = 1
    """Parts a step is accumulated from: lowers memory and keeps the result, except that the entanglement term
    sees only the pairs of queries within a part."""
    learning_rate: float = 5e-5
    portable_rate: float = 1.0
    """Times the learning rate, of the pooler and the classifier: the portable score begins from nothing."""
    warmup: float = 0.1
    """Share of the steps with a rising rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.01
    """On weights only: never on biases and norms."""
    max_grad_norm: float = 1.0
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.0
    """Off by default."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation; `auto` is bfloat16 for JAX on GPU, float32 elsewhere. Parameters stay float32."""
    separable_start: float = 0.0
    """Share of the steps, below 1, in which attention between query and passage opens linearly from none; 0
    is open from the first. Every evaluation is open. BERT, RoBERTa, XLM-R and ELECTRA only."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How JAX spreads a step over several devices: `jit` over a mesh, or `pmap`; the same trajectory up to
    rounding."""
    seed: int = 0
    evaluations: int = 3
    """How often dev is scored during training, evenly spaced, the end included."""
    patience: int | None = None
    """Evaluations without a better dev metric before training stops early; never when absent."""
    checkpoint_every: int = 50
    """Steps between states that an interrupted run resumes from."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    first_stage: Literal["auto"] | FirstStage = "auto"
    """Whose candidates are reranked, and whose scores are fused in; `auto` is the one that ranks dev best."""
    candidates: Literal["retrieved", "judged"] = "retrieved"
    """The first stage's top passages, or exactly the judged passages of a query, whatever `depth` says (of
    several sources, of those that judge irrelevant passages; on dev their `dev_depth` best)."""
    depth: int = 50
    """Candidates reranked for a query."""
    dev_queries: int | None = None
    """At most this many dev queries are scored during training."""
    dev_depth: int = 20
    metric: str = "nDCG@10"
    """Chooses the best checkpoint and the fusion weight; an ir-measures name."""
    fusion_grid: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
    """Weights of the first stage tried on dev; contains 0."""


@dataclasses.dataclass(frozen=True)
class RerankerConfig:
    """A recipe for a reranker: `python scripts/train.py --config configs/quantum_resonance.py`."""

    name: str = "quantum_resonance"
    """The run's folder below `runs/`: one name, no path."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    quantum: QuantumConfig = QuantumConfig()
    train: TrainConfig = TrainConfig()
    retrain: RetrainConfig = RetrainConfig()
    evaluation: EvalConfig = EvalConfig()

    @property
    def preserves(self) -> bool:
        """Whether the loss holds the model to its frozen original."""
        return self.retrain.preserve_knowledge > 0 or self.retrain.resonance_alignment > 0

    @property
    def retrains(self) -> bool:
        """Whether this is a retraining: `model.base` must be a checkpoint of ours, and lists are fixed."""
        return self.quantum.mode == "adaptation" or self.preserves or self.retrain.analyze_existing

    @property
    def lists_per_step(self) -> int:
        """New lists, and those of the old domain where there is one."""
        return self.train.batch_size + (self.retrain.old_batch_size if self.retrain.old_data else 0)

    @property
    def entangles(self) -> bool:
        """Whether the loss has an entanglement term."""
        quantum = self.quantum
        if self.train.objective != "quantum" or quantum.mode not in ("resonance", "entanglement"):
            return False
        return quantum.entanglement_weight > 0

    def head_checks(self, head: str) -> list[tuple[str, Any, bool, str]]:
        """(field, value, whether it may go with `head`, what is allowed): a term on what no score reads would
        train nothing that ranks."""
        mode, weight = self.quantum.mode, self.retrain.resonance_alignment
        on_states = self.train.objective == "quantum" and mode in ("resonance", "entanglement")
        blind = "under model.head 'cls', whose score reads no state"
        return [
            (
                "quantum.mode",
                mode,
                not (head == "cls" and on_states),
                f"'superposition', 'adaptation' {blind}",
            ),
            ("retrain.resonance_alignment", weight, not (head == "cls" and weight > 0), f"0 {blind}"),
            (
                "quantum.entanglement_weight",
                self.quantum.entanglement_weight,
                not (head == "overlap" and self.entangles),
                "0 under model.head 'overlap', whose score sees no phase: phases alone could satisfy it",
            ),
        ]

    def changed(self, **parts: Any) -> RerankerConfig:
        """The recipe with other settings: config.changed(name="mine", train={"epochs": 2, "seed": 1})."""
        return with_settings(self, parts)

    def validate(self) -> RerankerConfig:
        """Return self, or raise a UserError that lists every field out of range."""
        if wrong := list(misfits(self)):
            raise UserError("setting of the wrong kind: " + "; ".join(wrong))
        q, d, t, e, r = self.quantum, self.data, self.train, self.evaluation, self.retrain
        width, head = self.model.complex_width, self.model.head
        projectors = HEAD_PROJECTORS[head]
        folder = is_folder_name(self.name)
        checks = [
            ("name", self.name, folder, "a folder's name, without / and no dot first"),
            (
                "model.projector",
                self.model.projector,
                self.model.projector in projectors,
                f"{' or '.join(map(repr, projectors))} under model.head {head!r}",
            ),
            *self.head_checks(head),
            ("quantum.resonance_threshold", q.resonance_threshold, 0 <= q.resonance_threshold <= 1, "[0, 1]"),
            ("quantum.resonance_weight", q.resonance_weight, q.resonance_weight >= 0, ">= 0"),
            ("quantum.resonance_sharpness", q.resonance_sharpness, q.resonance_sharpness > 0, "> 0"),
            ("quantum.entanglement_weight", q.entanglement_weight, q.entanglement_weight >= 0, ">= 0"),
            (
                "quantum.entanglement_margin",
                q.entanglement_margin,
                abs(q.entanglement_margin) <= 1,
                "[-1, 1]",
            ),
            ("quantum.temperature_start", q.temperature_start, q.temperature_start > 0, "> 0"),
            ("quantum.temperature_end", q.temperature_end, q.temperature_end > 0, "> 0"),
            ("quantum.entropy_bonus", q.entropy_bonus, q.entropy_bonus >= 0, ">= 0"),
            ("quantum.alignment_weight", q.alignment_weight, q.alignment_weight >= 0, ">= 0"),
            ("quantum.portable_weight", q.portable_weight, q.portable_weight >= 0, ">= 0"),
            ("retrain.preserve_knowledge", r.preserve_knowledge, r.preserve_knowledge >= 0, ">= 0"),
            ("retrain.resonance_alignment", r.resonance_alignment, r.resonance_alignment >= 0, ">= 0"),
            (
                "retrain.old_data",
                r.old_data,
                r.old_data is None or self.preserves,
                "with preserve_knowledge or resonance_alignment above 0",
            ),
            ("retrain.old_queries", r.old_queries, r.old_queries is None or r.old_queries > 0, ">= 1"),
            ("retrain.old_batch_size", r.old_batch_size, r.old_batch_size >= 1, ">= 1"),
            ("data.max_samples", d.max_samples, d.max_samples is None or d.max_samples > 0, ">= 1"),
            ("data.list_size", d.list_size, d.list_size >= 2, ">= 2"),
            ("data.max_positives", d.max_positives, 1 <= d.max_positives < d.list_size, "[1, list_size - 1]"),
            ("data.negative_pool", d.negative_pool, d.negative_pool >= 1, ">= 1"),
            ("data.max_query_tokens", d.max_query_tokens, d.max_query_tokens >= 1, ">= 1"),
            ("data.max_passage_tokens", d.max_passage_tokens, d.max_passage_tokens >= 1, ">= 1"),
            ("data.length_buckets", d.length_buckets, _increasing(d.length_buckets), "increasing, >= 8"),
            (
                "data.negatives",
                d.negatives,
                d.mined is None or d.negatives in ("auto", "given"),
                "'auto' or 'given' with data.mined, whose negatives would be left out",
            ),
            (
                "data.in_batch_negatives",
                d.in_batch_negatives,
                0 <= d.in_batch_negatives <= min(d.list_size - d.max_positives - 1, t.batch_size - 1),
                "0 to list_size - max_positives - 1, below batch_size",
            ),
            (
                "data.in_batch_negatives",
                d.in_batch_negatives,
                not (self.retrains and d.in_batch_negatives),
                "0 in a retraining, whose lists are fixed",
            ),
            ("data.flipped_labels", d.flipped_labels, 0 <= d.flipped_labels <= 1, "[0, 1]"),
            ("train.teacher_temperature", t.teacher_temperature, t.teacher_temperature > 0, "> 0"),
            ("data.related_threshold", d.related_threshold, 0 <= d.related_threshold <= 1, "[0, 1]"),
            ("train.epochs", t.epochs, t.epochs >= 0 and (t.epochs > 0 or t.max_steps), "> 0, or max_steps"),
            ("train.min_steps", t.min_steps, t.min_steps >= 0, ">= 0"),
            ("train.max_steps", t.max_steps, t.max_steps is None or t.max_steps > 0, ">= 1"),
            ("train.portable_rate", t.portable_rate, t.portable_rate > 0, "> 0"),
            ("train.batch_size", t.batch_size, t.batch_size >= 1, ">= 1"),
            (
                "train.micro_batches",
                t.micro_batches,
                t.micro_batches >= 1 and t.batch_size % t.micro_batches == 0,
                "a divisor of batch_size",
            ),
            (
                "train.micro_batches",
                t.micro_batches,
                t.micro_batches < 1 or self.lists_per_step % t.micro_batches == 0,
                "a divisor of retrain.old_batch_size too",
            ),
            ("train.learning_rate", t.learning_rate, 0 < t.learning_rate < 1, "(0, 1)"),
            ("train.warmup", t.warmup, 0 <= t.warmup < 1, "[0, 1)"),
            ("train.weight_decay", t.weight_decay, t.weight_decay >= 0, ">= 0"),
            ("train.max_grad_norm", t.max_grad_norm, t.max_grad_norm > 0, "> 0"),
            ("train.hidden_dropout", t.hidden_dropout, 0 <= t.hidden_dropout <= 0.95, "[0, 0.95]"),
            (
                "train.attention_dropout",
                t.attention_dropout,
                0 <= t.attention_dropout <= 0.95,
                "[0, 0.95]",
            ),
            ("train.separable_start", t.separable_start, 0 <= t.separable_start < 1, "[0, 1)"),
            ("train.seed", t.seed, 0 <= t.seed < 2**31, "[0, 2^31)"),
            ("train.evaluations", t.evaluations, t.evaluations >= 1, ">= 1"),
            ("train.patience", t.patience, t.patience is None or t.patience >= 1, ">= 1"),
            ("train.checkpoint_every", t.checkpoint_every, t.checkpoint_every >= 1, ">= 1"),
            ("evaluation.depth", e.depth, e.depth >= 1, ">= 1"),
            ("evaluation.dev_depth", e.dev_depth, e.dev_depth >= 2, ">= 2"),
            ("evaluation.dev_queries", e.dev_queries, e.dev_queries is None or e.dev_queries > 0, ">= 1"),
            (
                "evaluation.fusion_grid",
                e.fusion_grid,
                0.0 in e.fusion_grid and min(e.fusion_grid) >= 0,
                "numbers >= 0 that contain 0",
            ),
            ("model.lora.rank", self.model.lora.rank, self.model.lora.rank >= 1, ">= 1"),
            ("model.lora.alpha", self.model.lora.alpha, self.model.lora.alpha > 0, "> 0"),
            ("model.complex_width", width, width is None or width >= 1, ">= 1"),
        ]
        wrong = [
            f"{field} is {value!r}; allowed: {allowed}" for field, value, good, allowed in checks if not good
        ]
        if wrong:
            raise UserError("setting out of range: " + "; ".join(wrong))
        return self


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where a run lives; not part of its recipe."""

    runs: Path = Path("runs")
    """Folder of all runs."""
    fresh: bool = False
    """Start over: delete the run's folder instead of resuming it."""
    backend: Literal["auto", "jax", "mlx"] = "auto"
    evaluate_test: bool = True
    """Evaluate the test split at the end; without, a run ends with its checkpoints."""
    evaluate_start: bool = False
    """Put the untrained start into that table too."""
    max_minutes: float | None = None
    """End the training at its first evaluation after so many minutes, and go on as at its end."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where several processes train one run (JAX); srun and mpirun tell it."""
    processes: int | None = None
    """How many processes there are, one command each, on one host or many."""
    process: int | None = None
    """Which of them this one is, from 0."""


def with_settings(recipe: Recipe, parts: Mapping[str, Any]) -> Recipe:
    """A recipe with other settings; a mapping stands for some of a part's."""
    settings = {
        part: dataclasses.replace(getattr(recipe, part), **new) if isinstance(new, Mapping) else new
        for part, new in parts.items()
    }
    return dataclasses.replace(recipe, **settings)


def is_folder_name(name: str) -> bool:
    """Whether a run's folder can have this name: no path, and no dot first."""
    return bool(name) and name[0] != "." and not set(name) & set("/\\\0")


def misfits(config: Any, prefix: str = "") -> Iterator[str]:
    """What is wrong with the types and choices of a config's fields: a recipe is code that nothing checks."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from misfits(value, name + ".")
        elif not _fits(value, hints[field.name]):
            choices = [repr(choice) for hint in _alternatives(hints[field.name]) for choice in _choices(hint)]
            near = difflib.get_close_matches(repr(value), choices, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield f"{name} is {value!r}; allowed: {_in_words(hints[field.name])}{hint}"


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if len(_alternatives(hint)) > 1:
        return any(_fits(value, part) for part in _alternatives(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:  # neither NaN nor infinite, nor a whole number beyond the range
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max
    return isinstance(value, hint)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _in_words(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return f"several of {_in_words(get_args(hint)[0])}"
    words = {
        int: "a whole number",
        float: "a finite number",
        str: "text",
        bool: "True or False",
        NoneType: "None",
    }
    return " or ".join(
        ", ".join(map(repr, _choices(part))) or words.get(part, str(part)) for part in _alternatives(hint)
    )


def _increasing(values: Sequence[int]) -> bool:
    return bool(values) and values[0] >= 8 and all(a < b for a, b in itertools.pairwise(values))


def recipe_kinds() -> tuple[type, ...]:
    """Every class that a recipe may return."""
    from common.expansion.recipe import ExpansionRecipe  # which are written with this module's checks
    from common.language.config import LANGUAGE_RECIPES

    return (RerankerConfig, *LANGUAGE_RECIPES, ExpansionRecipe)


def load_recipe(path: str, preset: str | None = None) -> Any:
    """The config that a recipe file returns from `get_config(preset)`; a UserError names what is wrong."""
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.py")], n=1)
        hint = f"; did you mean {file.parent / near[0]}?" if near else ""
        raise UserError(
            f"no recipe at {path}{hint} (recipes are the files of configs/: run from the root of the clone, "
            "or name one by --config FILE)"
        )
    module = _recipe_module(file)
    presets: dict[str, Any] = getattr(module, "PRESETS", {})
    if preset is not None and preset not in presets:
        near = difflib.get_close_matches(preset, presets, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"{path} has no preset {preset!r}; it has: {', '.join(sorted(presets)) or 'none'}.{hint}"
        )
    with _explained(file):
        return module.get_config(preset) if presets else module.get_config()


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Turn what is wrong with a recipe's code into a UserError; an unknown setting gets the nearest one."""
    try:
        yield
    except (SyntaxError, ImportError, NameError, TypeError, AttributeError) as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        known = sorted(set().union(*map(_field_names, recipe_kinds())))
        ends = {name.rsplit(".", 1)[-1]: name for name in known}
        near = nearest(unknown[1], ends, 0.6) if unknown else None
        hint = f"; did you mean {ends[near]}?" if near else ""
        raise UserError(
            f"{file}: the recipe cannot be read ({type(error).__name__}: {error}){hint}"
        ) from error


def _recipe_module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file}: a recipe is a Python file (.py) with a function get_config()")
    module = importlib.util.module_from_spec(spec)
    with _explained(file):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{file}: has no get_config(); a recipe returns its settings from this function")
    return module


def parse_command(
    description: str,
    argv: Sequence[str] | None = None,
    options: type[Options] = RunOptions,  # type: ignore[assignment]
) -> tuple[RerankerConfig, Options]:
    """parse_recipe for a command that is about rerankers; UserError for another kind of recipe."""
    config, given = parse_recipe(description, argv, options)
    if not isinstance(config, RerankerConfig):
        raise UserError(
            f"--config: {config.name} is the recipe of a {type(config).__name__}, and this command is for "
            "rerankers: name a recipe such as configs/quantum_resonance.py"
        )
    return config, given


def parse_recipe(
    description: str,
    argv: Sequence[str] | None = None,
    options: type[Options] = RunOptions,  # type: ignore[assignment]
    config_path: str | None = "configs/quantum_resonance.py",
) -> tuple[Any, Options]:
    """Read `--config FILE [--preset P] [--field.name value ...]` into a validated recipe and run options.

    `--data X` is short for `--data.name X`. `options` is a dataclass of the command's own flags.
    """
    argv = [_spelled_out(word) for word in (sys.argv[1:] if argv is None else argv)]
    config_path, argv = take_flag(argv, "--config", config_path)
    preset, argv = take_flag(argv, "--preset", None)
    if config_path is None:
        raise UserError("--config FILE is missing: a recipe of configs/")
    recipe = load_recipe(config_path, preset)
    if hasattr(recipe, "tiny"):  # a base that is made here, with settings of its own
        base, rest = take_flag(argv, "--base", None)
        recipe, argv = (recipe.tiny(), rest) if base == "tiny" else (recipe, argv)
    settings, run = parse_settings(description, argv, recipe, options)
    return settings.validate(), run


def parse_settings(
    description: str | None, argv: Sequence[str], default: Settings, options: type[Options]
) -> tuple[Settings, Options]:
    """Read `--field.name value ...` over the settings of `default`, a dataclass, and a command's own flags.

    UserError for an unknown flag names the nearest.
    """
    import tyro

    command = dataclasses.make_dataclass(
        "Command",
        [
            ("run", Annotated[options, tyro.conf.arg(name="")], dataclasses.field(default=options())),
            (
                "settings",
                Annotated[type(default), tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands],
                dataclasses.field(default=default),
            ),
        ],
        frozen=True,
    )
    known = _field_names(type(default)) | _field_names(options)
    _refuse_unknown(argv, known)
    parsed: Any = tyro.cli(command, args=argv, description=description)
    return parsed.settings, parsed.run


def _spelled_out(word: str) -> str:
    return word.replace("--data", "--data.name", 1) if word.partition("=")[0] == "--data" else word


def take_flag(argv: list[str], flag: str, default: str | None) -> tuple[str | None, list[str]]:
    """Remove `flag value` or `flag=value` from argv; the last one wins."""
    rest, value, index = [], default, 0
    while index < len(argv):
        word = argv[index]
        if word == flag:
            if index + 1 == len(argv):
                raise UserError(f"{flag} needs a value")
            value, index = argv[index + 1], index + 2
        elif word.startswith(flag + "="):
            value, index = word[len(flag) + 1 :], index + 1
        else:
            rest.append(word)
            index += 1
    return value, rest


def _field_names(kind: type, prefix: str = "") -> set[str]:
    """Dotted names of every setting of a config class."""
    names: set[str] = set()
    defaults = kind()
    for field in dataclasses.fields(kind):
        value = getattr(defaults, field.name)
        name = prefix + field.name
        names |= _field_names(type(value), name + ".") if dataclasses.is_dataclass(value) else {name}
    return names


def nearest(name: str, known: Iterable[str], cutoff: float) -> str | None:
    """The setting that is meant: of the same last word or its initials (`lr`), else the nearest spelling."""
    last = name.rpartition(".")[2]
    ends = {key: key.rpartition(".")[2].split("_") for key in sorted(known)}
    same = [key for key, end in ends.items() if last in ("_".join(end), "".join(word[0] for word in end))]
    near = difflib.get_close_matches(name, same or ends, n=1, cutoff=0.0 if same else cutoff)
    return near[0] if near else None


def _refuse_unknown(argv: Sequence[str], known: set[str]) -> None:
    for word in argv:
        if not word.startswith("--") or word == "--help":
            continue
        name = word[2:].split("=", 1)[0].replace("-", "_")
        plain = name.replace(".no_", ".").removeprefix("no_")
        if name in known or plain in known:
            continue
        near = nearest(name, known, 0.4)
        hint = f"; did you mean --{near.replace('_', '-')}?" if near else ""
        raise UserError(f"unknown setting {word.split('=', 1)[0]}{hint} (--help lists all)")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)
