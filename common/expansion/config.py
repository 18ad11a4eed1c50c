"""Settings of the query expansion's training, once, with units and ranges; read from QMD's own YAML schema.

Every key of that schema is used, or refused by name with the reason. Source: tobi/qmd, finetune/configs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from common.config import misfits, nearest, parse_settings, take_flag
from common.data.records import OnBadRow
from common.errors import UserError, listed
from common.expansion.prompts import System

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TINY = "tiny"  # the base that is made here
TINY_REMEDY = (
    "Check the spelling and the network, give the path of a downloaded Qwen3 checkpoint directory, or run "
    "the embedded default, which needs no download: --base tiny"
)
LossType = Literal["grpo", "dr_grpo", "bnpo", "dapo"]


@dataclass(frozen=True)
class BaseConfig:
    base: str = "Qwen/Qwen3-1.7B"
    """Qwen3 checkpoint directory, name on the hub, or `tiny`: a small random one made here."""
    output: str = "runs/qmd-sft"
    """The run's folder."""
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the base's weights; auto: as stored, float32 on a CPU."""
    load_in_4bit: bool = False
    """Quantise the base to 4 bits (QLoRA)."""
    load_in_8bit: bool = False


@dataclass(frozen=True)
class GrpoBaseConfig(BaseConfig):
    base: str = ""
    """The base of the SFT model; empty: the one that it was trained on."""
    output: str = "runs/qmd-grpo"
    sft: str = "runs/qmd-sft"
    """Run or adapter of the SFT that the fresh adapter begins at; `none`: the base itself."""


@dataclass(frozen=True)
class DatasetConfig:
    name: str = "tobil/qmd-query-expansion-train"
    """File, folder, pattern with `*`, hub dataset, or `generated`: rows that need no download."""
    split: str = "train"
    eval_split: str = ""
    """Split of validation rows; empty: `validation` or `val`, else a tenth is cut off."""
    max_samples: int | None = None
    """Use at most this many training rows."""
    held_out: str = ""
    """File of evaluation queries (QMD's evals/queries.txt): rows that ask one of them are left out."""
    trim_hyde: bool = False
    """Cut hydes to the 200 characters that the score pays for."""
    on_bad_row: OnBadRow = "error"


@dataclass(frozen=True)
class TrainingConfig:
    epochs: float = 5.0
    max_steps: int | None = None
    """Stop after this many optimizer steps."""
    batch_size: int = 4
    """Rows in memory at once."""
    gradient_accumulation_steps: int = 4
    """Batches of one optimizer step; their losses are weighed by tokens."""
    learning_rate: float = 2e-4
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    grad_checkpoint: bool = False
    """Compute activations again in the backward pass: less memory, slower."""
    eval_steps: int = 200
    save_steps: int = 200
    """Steps between saved states."""
    save_interval_minutes: float | None = None
    """Save a state this often instead; switches save_steps off, as in the original."""
    save_total_limit: int = 2
    """States kept."""
    best: Literal["loss", "score"] = "loss"
    """Which validation figure chooses best/."""
    seed: int = 42


@dataclass(frozen=True)
class SftTrainingConfig(TrainingConfig):
    max_length: int = 512
    """Tokens of prompt and target; a longer row is an error."""
    length_buckets: bool = True
    """Batch rows of like length."""
    packing: bool = False
    """Put several rows into one sequence of max_length tokens; none sees another."""
    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens learn; the original: all."""


@dataclass(frozen=True)
class GrpoTrainingConfig(TrainingConfig):
    epochs: float = 1.0
    max_steps: int | None = 200
    batch_size: int = 2
    """Completions of one forward pass."""
    gradient_accumulation_steps: int = 8
    """batch_size x this = completions of a step, a multiple of grpo.num_generations."""
    learning_rate: float = 5e-7
    lr_scheduler: Literal["cosine", "linear", "constant"] = "linear"
    warmup_ratio: float = 0.0
    max_grad_norm: float = 0.5
    eval_steps: int = 50
    save_steps: int = 50
    best: Literal["loss", "score"] = "score"


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = TARGETS
    train_embeddings: bool = False
    """Train embeddings and head in full beside the adapters."""


@dataclass(frozen=True)
class PromptConfig:
    system: System = "mixed"
    """Before the question: nothing (`none`, the original), node-llama-cpp's default system prompt as in QMD
    (`consumer`), or each in turn."""
    final_newline: bool = True
    """End targets with the newline that QMD's grammar demands."""
    no_think: bool = True
    """Begin the question with Qwen3's switch, as QMD does."""


@dataclass(frozen=True)
class EvaluationConfig:
    queries: int = 64
    """Validation queries that are expanded greedily and scored, 0 for none."""
    max_tokens: int = 300
    batch_size: int = 16


@dataclass(frozen=True)
class GenerationConfig:
    temperature: float = 1.0
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0


@dataclass(frozen=True)
class RewardConfig:
    score: float = 1.0
    """Weight of the original's score."""
    strict: float = 0.0
    """Weight of the strict score, which closes the original's holes."""
    retrieval: float = 0.0
    """Weight of the change of NDCG and recall when the expansion is added to a search."""
    retrieval_data: str = ""
    """BEIR folder (or `generated`) of the retrieval reward, whose training queries are then the prompts."""
    retrieval_encoder: str = "default"
    """Encoder of its dense search; `none`: BM25 alone."""


@dataclass(frozen=True)
class PolicyConfig:
    num_generations: int = 4
    max_completion_length: int = 200
    beta: float = 0.04
    """Weight of the KL to the SFT model."""
    num_iterations: int = 1
    """Updates of each batch of completions (mu)."""
    epsilon: float = 0.2
    epsilon_high: float | None = None
    """Upper clip; absent: epsilon."""
    loss_type: LossType = "dapo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    scale_rewards: bool = True
    """Divide advantages by their group's standard deviation; dr_grpo never does."""
    mask_truncated_completions: bool = False
    """Leave completions without an end out of the loss."""
    max_kl: float = 10.0
    """Stop when the mean KL to the SFT model is above this."""
    patience: int = 10
    """Stop after so many steps in a row in which no group's rewards differ."""


@dataclass(frozen=True)
class SftConfig:
    """`mlx_impl/train.py sft`."""

    model: BaseConfig = field(default_factory=BaseConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    training: SftTrainingConfig = field(default_factory=SftTrainingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def validate(self) -> SftConfig:
        """Itself; UserError names each setting that is out of range."""
        _check(self, [("training.max_length", self.training.max_length >= 8, ">= 8")])
        return self

    def tiny(self) -> SftConfig:
        """The same for the tiny base: rows that need no download, all of the model learns, minutes on a
        CPU.
        """
        return replace(
            self,
            model=replace(self.model, base=TINY, output="runs/qmd-sft-tiny"),
            dataset=replace(self.dataset, name="generated", eval_split=""),
            training=replace(
                self.training,
                epochs=2.0,
                batch_size=8,
                gradient_accumulation_steps=1,
                learning_rate=5e-3,
                eval_steps=84,
                save_steps=84,
            ),
            lora=replace(self.lora, train_embeddings=True),
            evaluation=replace(self.evaluation, queries=32, max_tokens=120, batch_size=32),
        )


@dataclass(frozen=True)
class GrpoConfig:
    """`mlx_impl/train.py grpo`."""

    model: GrpoBaseConfig = field(default_factory=GrpoBaseConfig)
    dataset: DatasetConfig = field(default_factory=lambda: DatasetConfig(max_samples=1000))
    prompt: PromptConfig = field(default_factory=PromptConfig)
    training: GrpoTrainingConfig = field(default_factory=GrpoTrainingConfig)
    lora: LoraConfig = field(
        default_factory=lambda: LoraConfig(
            rank=4, alpha=8.0, dropout=0.05, target_modules=("q_proj", "v_proj")
        )
    )
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    grpo: PolicyConfig = field(default_factory=PolicyConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def completions(self) -> int:
        """Completions of one step."""
        return self.training.batch_size * self.training.gradient_accumulation_steps

    def validate(self) -> GrpoConfig:
        """Itself; UserError names each setting that is out of range."""
        policy, reward, sampling = self.grpo, self.reward, self.generation
        _check(
            self,
            [
                ("grpo.num_generations", policy.num_generations >= 2, ">= 2: advantages compare a group"),
                (
                    "grpo.num_generations",
                    policy.num_generations < 2 or self.completions % policy.num_generations == 0,
                    f"a divisor of training.batch_size x gradient_accumulation_steps ({self.completions})",
                ),
                ("grpo.max_completion_length", policy.max_completion_length >= 1, ">= 1"),
                ("grpo.beta", policy.beta >= 0, ">= 0"),
                ("grpo.num_iterations", policy.num_iterations >= 1, ">= 1"),
                ("grpo.epsilon", 0 < policy.epsilon < 1, "(0, 1)"),
                ("grpo.epsilon_high", policy.epsilon_high is None or policy.epsilon_high > 0, "> 0"),
                ("grpo.max_kl", policy.max_kl > 0, "> 0"),
                ("grpo.patience", policy.patience >= 1, ">= 1"),
                ("generation.temperature", sampling.temperature > 0, "> 0: a group must differ"),
                ("generation.top_k", sampling.top_k >= 0, ">= 0"),
                ("generation.top_p", 0 < sampling.top_p <= 1, "(0, 1]"),
                ("reward.score", any((reward.score, reward.strict, reward.retrieval)), "one weight not 0"),
                (
                    "reward.retrieval_data",
                    bool(reward.retrieval_data) or not reward.retrieval,
                    "a BEIR folder where reward.retrieval is not 0",
                ),
                (
                    "lora.train_embeddings",
                    not self.lora.train_embeddings,
                    "false: the KL's reference is the model with the adapter off, and embeddings that "
                    "learned cannot be switched off",
                ),
                (
                    "dataset.trim_hyde",
                    not self.dataset.trim_hyde,
                    "false: of a row GRPO reads the query alone",
                ),
                (
                    "prompt.final_newline",
                    self.prompt.final_newline,
                    "true: GRPO has no targets, its completions are rewarded as they are",
                ),
                ("training.best", self.training.best == "score", "'score': GRPO's loss does not rank models"),
            ],
        )
        return self

    def tiny(self) -> GrpoConfig:
        """The same for the tiny base: after `sft --base tiny`, seconds a step on a CPU."""
        return replace(
            self,
            model=replace(self.model, sft="runs/qmd-sft-tiny", output="runs/qmd-grpo-tiny"),
            dataset=replace(self.dataset, name="generated", eval_split=""),
            training=replace(
                self.training,
                max_steps=8,
                batch_size=16,
                gradient_accumulation_steps=2,
                learning_rate=1e-3,
                eval_steps=8,
                save_steps=4,
            ),
            grpo=replace(self.grpo, num_generations=8, max_completion_length=100),
            evaluation=replace(self.evaluation, queries=32, max_tokens=120, batch_size=32),
        )


Recipe = TypeVar("Recipe", SftConfig, GrpoConfig)

# key of QMD's files -> (values that are accepted since they change nothing, why others are refused)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "model.push_to_hub": (
        (False,),
        "training writes to a local folder alone; upload it yourself with `hf upload`",
    ),
    "model.trust_remote_code": ((False,), "no code of a checkpoint is run"),
    "dataset.text_field": ((), "prompts are rendered here from the rows' query and output"),
    "dataset.prompt_field": ((), "prompts are rendered here from the rows' query"),
    "training.ddp_find_unused_parameters": ((), "it is a switch of torch's DistributedDataParallel"),
    "training.save_strategy": (
        ("steps",),
        "training.save_steps and save_interval_minutes say when states are saved",
    ),
    "tracking": (
        (),
        "a run is logged to metrics.jsonl and TensorBoard in its folder, which model.output names",
    ),
    "gguf": ((), "mlx_impl/convert.py writes GGUF"),
    "generation.min_p": ((0,), "neither QMD nor GRPO samples with it"),
    "generation.repetition_penalty": ((1, 1.0), "neither QMD nor GRPO samples with it"),
}


def read_yaml(path: str | Path, kind: type[Recipe]) -> Recipe:
    """A config from a YAML file in QMD's schema; UserError lists every key that is wrong, with the reason."""
    import yaml

    file = Path(path)
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no config at {path} (they are the .yaml files of configs/).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({error}).") from None
    if not isinstance(found, Mapping):
        raise UserError(f"{path}: expected sections such as `training:`, found {type(found).__name__}.")
    problems: list[str] = []
    config = _filled(kind(), found, "", problems)
    problems += [_explained(text) for text in misfits(config)]
    if problems:
        raise UserError(f"{path}:\n{listed(problems)}\nDelete or mend these lines.")
    return config


def _filled(default: Any, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """`default` with the values of a YAML mapping; notes unknown and refused keys."""
    fields = {item.name: getattr(default, item.name) for item in dataclasses.fields(default)}
    changed: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in REFUSED or key not in fields:
            problems += _refusal(name, value, fields)
        elif dataclasses.is_dataclass(fields[key]):
            if isinstance(value, Mapping):
                changed[key] = _filled(fields[key], value, f"{name}.", problems)
            else:
                problems.append(f"{name}: expected a section with keys, found {value!r}")
        else:
            changed[key] = tuple(value) if isinstance(value, list) else value
    return replace(default, **changed)


def _refusal(name: str, value: Any, fields: Mapping[str, Any]) -> Iterator[str]:
    if name not in REFUSED:
        near = nearest(name.rpartition(".")[2], fields, 0.6)
        hint = f"; did you mean {near}?" if near else f"; known: {', '.join(fields)}"
        yield f"{name}: unknown key{hint}"
        return
    accepted, reason = REFUSED[name]
    if not any(type(value) is type(good) and value == good for good in accepted):
        yield f"{name} is not used: {reason}"


def _explained(text: str) -> str:
    """A misfit; a number that YAML took for text says how to write it."""
    number = text.partition(" is '")[2].partition("'")[0]
    try:
        value = float(number)
    except ValueError:
        return text
    return f"{text}. YAML reads {number} as text: write {value!r} or {value:.1e}"


def parse_expansion_command(
    description: str | None, argv: Sequence[str], default: str, kind: type[Recipe], options: type[Any]
) -> tuple[Recipe, Any]:
    """Read `--config FILE.yaml [--base B] [--data D] [--output O] [--section.key value ...]`, and `options`.

    `--base tiny` takes the settings of the tiny base before the other flags apply.
    """
    words = [_spelled_out(word) for word in argv]
    path, words = take_flag(words, "--config", default)
    assert path is not None
    config = read_yaml(path, kind)
    base, rest = take_flag(words, "--model.base", None)
    if base == TINY:
        config, words = config.tiny(), rest
    settings, run = parse_settings(description, words, config, options)
    return settings.validate(), run


_SHORT = {"--base": "--model.base", "--data": "--dataset.name", "--output": "--model.output"}


def _spelled_out(word: str) -> str:
    flag, equals, value = word.partition("=")
    return f"{_SHORT.get(flag, flag)}{equals}{value}"


def _check(config: Any, more: list[tuple[str, bool, str]]) -> None:
    training, lora, evaluation, model = config.training, config.lora, config.evaluation, config.model
    wrong = [_explained(text) for text in misfits(config)]
    if wrong:
        raise UserError("setting out of range: " + "; ".join(wrong))
    unknown = [target for target in lora.target_modules if target not in TARGETS]
    minutes = training.save_interval_minutes
    checks = [
        ("model.output", _local(model.output), "a local folder such as runs/qmd-sft (nothing is uploaded)"),
        ("model.load_in_8bit", not (model.load_in_4bit and model.load_in_8bit), "one of 4 and 8 bits"),
        ("training.epochs", training.epochs > 0, "> 0"),
        ("training.max_steps", training.max_steps is None or training.max_steps >= 1, ">= 1"),
        ("training.batch_size", training.batch_size >= 1, ">= 1"),
        (
            "training.gradient_accumulation_steps",
            training.gradient_accumulation_steps >= 1,
            ">= 1",
        ),
        ("training.learning_rate", 0 < training.learning_rate < 1, "(0, 1)"),
        ("training.warmup_ratio", 0 <= training.warmup_ratio < 1, "[0, 1)"),
        ("training.weight_decay", training.weight_decay >= 0, ">= 0"),
        ("training.max_grad_norm", training.max_grad_norm > 0, "> 0"),
        ("training.eval_steps", training.eval_steps >= 1, ">= 1"),
        ("training.save_steps", training.save_steps >= 1, ">= 1"),
        ("training.save_interval_minutes", minutes is None or minutes > 0, "> 0"),
        ("training.save_total_limit", training.save_total_limit >= 1, ">= 1"),
        ("training.seed", 0 <= training.seed < 2**31, "[0, 2^31)"),
        (
            "dataset.max_samples",
            config.dataset.max_samples is None or config.dataset.max_samples >= 1,
            ">= 1",
        ),
        ("lora.rank", lora.rank >= 1, ">= 1"),
        ("lora.alpha", lora.alpha > 0, "> 0"),
        ("lora.dropout", 0 <= lora.dropout < 1, "[0, 1)"),
        ("lora.target_modules", bool(lora.target_modules) and not unknown, f"of {', '.join(TARGETS)}"),
        ("evaluation.queries", evaluation.queries >= 0, ">= 0"),
        (
            "evaluation.queries",
            evaluation.queries > 0 or training.best == "loss",
            ">= 1 where best is 'score'",
        ),
        ("evaluation.max_tokens", evaluation.max_tokens >= 1, ">= 1"),
        ("evaluation.batch_size", evaluation.batch_size >= 1, ">= 1"),
        (
            "lora.train_embeddings",
            not (lora.train_embeddings and (model.load_in_4bit or model.load_in_8bit)),
            "false with a quantised base, whose embeddings cannot learn",
        ),
        (
            "training.grad_checkpoint",
            not (training.grad_checkpoint and lora.dropout),
            "false with lora.dropout above 0, whose mask would be drawn anew in the backward pass",
        ),
        *more,
    ]
    wrong = [
        f"{name} is {_value(config, name)!r}; allowed: {allowed}"
        for name, good, allowed in checks
        if not good
    ]
    if wrong:
        raise UserError("setting out of range: " + "; ".join(wrong))


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _local(output: str) -> bool:
    """Whether an output is a folder here; in the original `owner/name` means an upload to the hub."""
    first = output.split("/")[0]
    return bool(output) and ("/" not in output or first in ("", ".", "..", "~", "runs", "outputs"))
