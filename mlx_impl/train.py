"""Train with MLX: the command of the Mac user. An interrupted run goes on with the same command.

rerank    a reranker's recipe; settings, runs and checkpoints are those of scripts/train.py
language  a language model's recipe, likewise
sft       a query expander for QMD: LoRA on Qwen3 by configs/sft.yaml
grpo      the same, further, by reinforcement: a fresh LoRA above the SFT model by configs/grpo.yaml

example: python mlx_impl/train.py rerank --config configs/quantum_resonance.py --train.epochs 2
example: python mlx_impl/train.py language --config configs/infinito_small.py
example: python mlx_impl/train.py sft && python mlx_impl/train.py grpo

On several Macs (docs/apple.md):
mlx.launch --hosts IP,IP -- .venv/bin/python mlx_impl/train.py rerank --config configs/quantum_resonance.py
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from common.config import RerankerConfig
from common.errors import UserError, run_command
from common.expansion.config import GrpoConfig, SftConfig, parse_expansion_command
from common.language.config import LanguageRecipe


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(f"{__doc__}\ncommands: {', '.join(COMMANDS)} (each has --help)")
        return
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"no command {words[0]!r}{hint}; there is {', '.join(COMMANDS)}, typed before the flags."
        )
    COMMANDS[words[0]](words[1:])


def rerank(argv: Sequence[str]) -> None:
    """scripts/train.py on MLX, in each process that `mlx.launch` started."""
    from scripts import train

    _refuse_backend(argv)
    argv = [*argv, "--backend", "mlx"]
    if {"-h", "--help"} & set(argv):
        train.main(argv, __doc__)
        return
    world = _world()
    try:
        if world.processes.first:
            train.main(argv, __doc__, RerankerConfig)
        else:
            argv = [*argv, "--no-evaluate-test"]
            _work(lambda runs: train.main([*argv, "--runs", runs], __doc__, RerankerConfig))
    finally:
        world.leave()


def language(argv: Sequence[str]) -> None:
    """scripts/train.py on MLX with a language model's recipe, in this process."""
    from scripts import train

    _refuse_backend(argv)
    if not any(word.partition("=")[0] == "--config" for word in argv):
        argv = ["--config", "configs/infinito_small.py", *argv]
    train.main([*argv, "--backend", "mlx"], __doc__, LanguageRecipe)


def _refuse_backend(argv: Sequence[str]) -> None:
    if any(word.partition("=")[0] == "--backend" for word in argv):
        raise UserError("mlx_impl/train.py trains with MLX: leave out --backend, or use scripts/train.py.")


def sft(argv: Sequence[str]) -> None:
    """Supervised fine-tuning of a query expander for QMD: LoRA on Qwen3.

    example: python mlx_impl/train.py sft --config configs/sft.yaml --data my_rows.jsonl
    without a download: python mlx_impl/train.py sft --base tiny

    --base, --data and --output are short for --model.base, --dataset.name and --model.output.
    """
    with _mlx():
        from mlx_impl.expansion import ExpansionOptions, train_sft
    config, options = parse_expansion_command(
        sft.__doc__, argv, "configs/sft.yaml", SftConfig, ExpansionOptions
    )
    train_sft(config, options)


def grpo(argv: Sequence[str]) -> None:
    """Reinforcement of a query expander by GRPO: a fresh LoRA above the SFT model.

    example: python mlx_impl/train.py grpo --config configs/grpo.yaml --model.sft runs/qmd-sft
    without a download, after `sft --base tiny`: python mlx_impl/train.py grpo --base tiny

    --base, --data and --output are short for --model.base, --dataset.name and --model.output.
    """
    with _mlx():
        from mlx_impl.expansion import ExpansionOptions, train_grpo
    config, options = parse_expansion_command(
        grpo.__doc__, argv, "configs/grpo.yaml", GrpoConfig, ExpansionOptions
    )
    train_grpo(config, options)


@contextlib.contextmanager
def _mlx() -> Iterator[None]:
    """Turn a missing MLX into what to install."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"MLX cannot be loaded here ({error}); install it with `pip install -e '.[mlx]'`."
        ) from None


def _world() -> Any:
    with _mlx():
        from mlx_impl.training.distributed import World
    return World()


def _work(train: Callable[[str], None]) -> None:
    """Train beside the first process, which alone speaks and keeps the run: what is written here is thrown
    away."""
    with (
        tempfile.TemporaryDirectory() as runs,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        train(runs)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "rerank": rerank,
    "language": language,
    "sft": sft,
    "grpo": grpo,
}

if __name__ == "__main__":
    run_command(main)
