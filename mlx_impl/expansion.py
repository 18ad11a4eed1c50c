"""The query expansion's training, from settings to a finished run: data, base, adapter, loop.

What mlx_impl/train.py's commands `sft` and `grpo` do. No twin: common/expansion/sft.py does SFT with the
shared decoder, of any backend; GRPO is of MLX alone.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.backends import checkpoint_identity, load_encoder
from common.checkpoint import CONFIG_FILE, TRAINING_FILE, read_json
from common.config import to_dict
from common.data.expansion import ExpansionData
from common.data.sources import load_ranking_data
from common.errors import UserError
from common.expansion.config import TINY, GrpoConfig, SftConfig
from common.expansion.prompts import ExpansionPrompts, load_tokenizer
from common.expansion.sft import load_rows
from common.expansion.tiny_qwen import tiny_base
from common.metrics.expansion import score, score_strict
from common.retrieval.expansion import RetrievalGain
from common.runs import RunFolder
from mlx_impl.models.qwen import (
    LanguageModel,
    Origin,
    add_lora,
    check_vocabulary,
    find_adapter,
    load_base,
    load_trained,
    resolve_base,
)
from mlx_impl.scoring import accelerator
from mlx_impl.training.adapters import AdapterTrainer
from mlx_impl.training.grpo import GrpoTrainer, Reward
from mlx_impl.training.sft import SftTrainer

Say = Callable[[str], None]


@dataclass(frozen=True)
class ExpansionOptions:
    """A training command's own flags."""

    fresh: bool = False
    """Start over: delete the run's folder instead of resuming it."""
    dry_run: bool = False
    """Say what would be trained, load everything, and stop before the first step."""


def train_sft(config: SftConfig, options: ExpansionOptions, say: Say = print) -> Path:
    """Run `sft`, or go on with it; returns the run's folder. Raises UserError before anything is trained."""
    data = load_rows(config.dataset, say)
    if config.model.base == TINY and options.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            base = tiny_base(Path(folder) / "base", data, config.training.seed)
            return _dry(_sft_trainer(config, base, data, say))
    if config.model.base == TINY:
        with _folder(config, options, data.fingerprint, {"base": TINY}) as run:
            base = tiny_base(run.path / "base", data, config.training.seed)
            return _run(_sft_trainer(config, base, data, say), run)
    base = resolve_base(config.model.base, say)
    trainer = _sft_trainer(config, base, data, say)
    if options.dry_run:
        return _dry(trainer)
    with _folder(config, options, data.fingerprint, {"base": checkpoint_identity(base)}) as run:
        return _run(trainer, run)


def _sft_trainer(config: SftConfig, base: Path, data: ExpansionData, say: Say) -> SftTrainer:
    name = "" if config.model.base == TINY else _hub_name(config.model.base)
    loaded = load_base(Origin(base, name, _bits(config), config.model.torch_dtype))
    prompts = expansion_prompts(config, loaded)
    add_lora(loaded, config.lora, config.training.seed)
    return SftTrainer(config, loaded, prompts, data, say=say)


def train_grpo(config: GrpoConfig, options: ExpansionOptions, say: Say = print) -> Path:
    """Run `grpo`, or go on with it; returns the run's folder. Raises UserError before anything is trained."""
    loaded = _start(config, say)
    retrieval, inputs = _retrieval(config, say), {"start": _identity(loaded.origin)}
    _tell_other_prompts(config, say)
    prompts = expansion_prompts(config, loaded)
    add_lora(loaded, config.lora, config.training.seed)
    if retrieval is None:
        data = load_rows(config.dataset, say)
        name, fingerprint = data.name, data.fingerprint
        queries, held_out = [row.query for row in data.train], [row.query for row in data.val]
    else:
        name, fingerprint = f"{config.reward.retrieval_data} (its queries)", retrieval.fingerprint
        say(f"queries are those of {config.reward.retrieval_data}: dataset.name is not read")
        inputs["retrieval"] = fingerprint
        asked = sorted(retrieval.queries, key=lambda query: hashlib.sha256(query.encode()).digest())
        cut = max(1, len(asked) // 10)
        queries, held_out = asked[cut:], asked[:cut]
    queries, rewards = queries[: config.dataset.max_samples], _rewards(config, retrieval)
    trainer = GrpoTrainer(config, loaded, prompts, queries, held_out, rewards, data_name=name, say=say)
    if options.dry_run:
        return _dry(trainer)
    with _folder(config, options, fingerprint, inputs) as run:
        return _run(trainer, run)


def _start(config: GrpoConfig, say: Say) -> LanguageModel:
    """The model that GRPO begins at: base and SFT adapter, or the base alone."""
    model = config.model
    if model.sft == "none":
        origin = Origin(
            resolve_base(model.base, say), _hub_name(model.base), _bits(config), model.torch_dtype
        )
        return load_base(origin)
    adapter = find_adapter(Path(model.sft))
    if adapter is None and not (Path(model.sft) / CONFIG_FILE).exists():
        raise UserError(
            f"model.sft {model.sft}: no adapter there. Train it first (python mlx_impl/train.py sft), name "
            "its run, or start from a base alone: --model.sft none --base NAME."
        )
    loaded = load_trained(model.sft, model.base or None, say, model.torch_dtype)
    if _bits(config) and loaded.origin.bits != _bits(config):
        raise UserError(
            f"model.load_in_{_bits(config)}bit: the SFT model was trained on a base with "
            f"{loaded.origin.bits or 'no'} bits of quantisation; GRPO keeps what it had. Leave the key out."
        )
    return loaded


def _tell_other_prompts(config: GrpoConfig, say: Say) -> None:
    """Say which prompt settings are not those that the SFT adapter was trained with."""
    adapter = None if config.model.sft == "none" else find_adapter(Path(config.model.sft))
    if adapter is None or not (adapter / TRAINING_FILE).exists():
        return
    before = read_json(adapter / TRAINING_FILE).get("config", {}).get("prompt", {})
    for name, value in to_dict(config.prompt).items():
        if before.get(name, value) != value:
            say(
                f"warning: prompt.{name} is {value!r}, the SFT model learned with {before[name]!r}: set it "
                "to the same unless the difference is meant."
            )


def _identity(origin: Origin) -> str:
    return "-".join(checkpoint_identity(path) for path in (origin.base, *origin.below))


def _retrieval(config: GrpoConfig, say: Say) -> RetrievalGain | None:
    settings = config.reward
    if not settings.retrieval:
        return None
    data = load_ranking_data(settings.retrieval_data)
    name = settings.retrieval_encoder
    encoder = None if name == "none" else load_encoder(name, "mlx", say=say)
    return RetrievalGain(data, "train", encoder)


def _rewards(config: GrpoConfig, retrieval: RetrievalGain | None) -> dict[str, tuple[float, Reward]]:
    settings = config.reward
    rewards: dict[str, tuple[float, Reward]] = {
        "score": (settings.score, lambda pairs: [score(*pair).reward for pair in pairs]),
        "strict": (settings.strict, lambda pairs: [score_strict(*pair).reward for pair in pairs]),
    }
    if retrieval is not None:
        gains = retrieval.gains
        rewards["retrieval"] = settings.retrieval, lambda pairs: [gain.reward for gain in gains(pairs)]
    return {name: part for name, part in rewards.items() if part[0]}


def expansion_prompts(config: SftConfig | GrpoConfig, loaded: LanguageModel) -> ExpansionPrompts:
    """The prompts of the base's tokenizer. UserError where it does not fit the model or has no template."""
    settings, tokenizer = config.prompt, load_tokenizer(loaded.origin.base)
    check_vocabulary(loaded, tokenizer)
    return ExpansionPrompts(
        tokenizer,
        system=settings.system,
        final_newline=settings.final_newline,
        no_think=settings.no_think,
    )


def _folder(
    config: SftConfig | GrpoConfig, options: ExpansionOptions, fingerprint: str, inputs: dict[str, str]
) -> RunFolder:
    output = Path(config.model.output).expanduser()
    if options.fresh:
        _check_apart(config, output)
    return RunFolder.create(
        output.parent,
        output.name,
        to_dict(config),
        resume=not options.fresh,
        data_fingerprint=fingerprint,
        inputs={"command": type(config).__name__, **inputs},
        device=accelerator(),
        flags="--output",
    )


def _check_apart(config: SftConfig | GrpoConfig, output: Path) -> None:
    """UserError where starting over would delete what the run begins at."""
    names = {"model.base": config.model.base, "dataset.name": config.dataset.name}
    if isinstance(config, GrpoConfig):
        names["model.sft"] = config.model.sft
        names["reward.retrieval_data"] = config.reward.retrieval_data
    for key, name in names.items():
        path = Path(name).expanduser()
        if name and path.exists() and path.resolve().is_relative_to(output.resolve()):
            raise UserError(
                f"{key} {name} lies in model.output {config.model.output}, which --fresh deletes. Choose "
                "another --output."
            )


def _dry(trainer: AdapterTrainer) -> Path:
    trainer.say(f"{_plan(trainer)}\ndry run: nothing was trained")
    return Path(trainer.config.model.output)


def _run(trainer: AdapterTrainer, folder: RunFolder) -> Path:
    say, config = trainer.say, trainer.config
    say(_plan(trainer))
    summary = trainer.run(folder)
    folder.write_json("results.json", summary)
    say(
        f"best {config.training.best} {summary['best_dev']:.4f} at step {summary['best_step']}\n"
        f"adapter: {folder.best}\n"
        f"next: python mlx_impl/eval.py {folder.path}\n      python mlx_impl/convert.py {folder.path}"
    )
    return folder.path


def _plan(trainer: AdapterTrainer) -> str:
    """What a run will do, in a line."""
    learned, lora = trainer.learned(), trainer.config.lora
    layers = sum(name.endswith("lora_a") for name, _ in learned)
    embeddings = " and the embeddings" if lora.train_embeddings else ""
    return (
        f"{trainer.steps} steps; {sum(value.size for _, value in learned):,} parameters learn: adapters of "
        f"rank {lora.rank} on {layers} layers{embeddings}"
    )


def _bits(config: SftConfig | GrpoConfig) -> int:
    return 4 if config.model.load_in_4bit else 8 if config.model.load_in_8bit else 0


def _hub_name(name: str) -> str:
    return "" if Path(name).expanduser().exists() else name
