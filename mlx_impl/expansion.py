"""The query expansion's training, from settings to a finished run: data, base, adapter, loop.

What mlx_impl/train.py's commands `sft` and `grpo` do. No twin yet: JAX has no Qwen3.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.backends import checkpoint_identity
from common.config import to_dict
from common.data.expansion import ExpansionData, ExpansionRow, load_expansions, render_lines
from common.expansion_config import TINY, GrpoConfig, SftConfig
from common.prompts import ExpansionPrompts, load_tokenizer
from common.runs import RunFolder
from common.tiny_qwen import write_tiny_qwen
from mlx_impl.models.qwen import (
    LanguageModel,
    Origin,
    add_lora,
    check_vocabulary,
    load_base,
    resolve_base,
)
from mlx_impl.scoring import accelerator
from mlx_impl.training.adapters import AdapterTrainer
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
    data = load_data(config, say)
    base = None if config.model.base == TINY else resolve_base(config.model.base, say)
    with _folder(config, options, data, {"base": TINY if base is None else checkpoint_identity(base)}) as folder:
        if base is None:
            base = tiny_base(folder.path / "base", data, config.training.seed)
        loaded, prompts = prepare(config, Origin(base, _hub_name(config.model.base, base), _bits(config), config.model.torch_dtype))
        add_lora(loaded, config.lora, config.training.seed)
        return _run(SftTrainer(config, loaded, prompts, data, say=say), folder, options)


def load_data(config: SftConfig | GrpoConfig, say: Say) -> ExpansionData:
    """The rows of a config; what was left out is said."""
    dataset = config.dataset
    data = load_expansions(
        dataset.name,
        split=dataset.split,
        eval_split=dataset.eval_split,
        trim_hyde=dataset.trim_hyde,
        on_bad_row=dataset.on_bad_row,
    )
    say(data.summary())
    return data


def prepare(config: SftConfig | GrpoConfig, origin: Origin) -> tuple[LanguageModel, ExpansionPrompts]:
    """The frozen base of `origin`, and the prompts of its tokenizer."""
    tokenizer = load_tokenizer(origin.base)
    settings = config.prompt
    prompts = ExpansionPrompts(
        tokenizer,
        system=settings.system,
        final_newline=settings.final_newline,
        no_think=settings.no_think,
    )
    loaded = load_base(origin)
    check_vocabulary(loaded, tokenizer)
    return loaded, prompts


def tiny_base(directory: Path, data: ExpansionData, seed: int) -> Path:
    """The tiny random base, made from the training rows; the one that is there is kept."""
    if not directory.exists():
        texts = [f"{row.query}\n{render_lines(row.lines)}" for row in data.train]
        write_tiny_qwen(directory, texts, seed=seed)
    return directory


def data_fingerprint(data: ExpansionData) -> str:
    """16 hex digits of the SHA-256 of all rows, in order."""

    def flat(rows: tuple[ExpansionRow, ...]) -> str:
        return repr([dataclasses.astuple(row) for row in rows])

    return hashlib.sha256(f"{flat(data.train)}|{flat(data.val)}".encode()).hexdigest()[:16]


def _folder(
    config: SftConfig | GrpoConfig, options: ExpansionOptions, data: ExpansionData, inputs: dict[str, str]
) -> RunFolder:
    output = Path(config.model.output).expanduser()
    return RunFolder.create(
        output.parent,
        output.name,
        to_dict(config),
        resume=not options.fresh,
        data_fingerprint=data_fingerprint(data),
        inputs={"command": type(config).__name__, **inputs},
        device=accelerator(),
    )


def _run(trainer: AdapterTrainer, folder: RunFolder, options: ExpansionOptions) -> Path:
    say, config = trainer.say, trainer.config
    layers = sum(path.endswith("lora_a") for path, _ in trainer.learned())
    count = sum(value.size for _, value in trainer.learned())
    say(
        f"{trainer.steps} steps; {count:,} parameters learn in {layers} adapted layers (rank {config.lora.rank})"
        f"{' and the embeddings' if config.lora.train_embeddings else ''}"
    )
    if options.dry_run:
        say("dry run: nothing was trained")
        return folder.path
    summary = trainer.run(folder)
    folder.write_json("results.json", summary)
    say(
        f"best {config.training.best} {summary['best']:.4f} at step {summary['best_step']}\nadapter: {folder.best}\n"
        f"next: python mlx_impl/eval.py {folder.path}\n      python mlx_impl/convert.py {folder.path}"
    )
    return folder.path


def _bits(config: SftConfig | GrpoConfig) -> int:
    return 4 if config.model.load_in_4bit else 8 if config.model.load_in_8bit else 0


def _hub_name(name: str, base: Path) -> str:
    return "" if name == TINY or Path(name).expanduser().exists() else name
