"""Train a recipe, or go on with an interrupted run; then evaluate its test split.

example: python scripts/train.py --config configs/quantum_resonance.py --train.epochs 2

Rerankers: configs/quantum_resonance.py, ... Language models: configs/infinito_small.py, infinito.py, indra.py
A task for a trained one: configs/finetune.py. Query expansion for QMD: configs/expansion_sft.py
A recipe's presets: --preset quick. Other data: --data FILE_OR_FOLDER. Beside an earlier run: --name NAME.
All GPUs of a host are used. Several processes, on one host or many: srun or mpirun before the command, or in
each --coordinator HOST:PORT --processes N --process I (docs/scaling.md).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from common.config import RerankerConfig, RunOptions, parse_recipe
from common.errors import UserError, run_command
from common.expansion.recipe import ExpansionRecipe
from common.language.config import FineTuneRecipe, LanguageRecipe
from common.language.workflow import train_language
from common.report import tables_text
from common.reranker.workflow import train_recipe


def main(
    argv: Sequence[str] | None = None,
    description: str | None = None,
    only: type[RerankerConfig | LanguageRecipe] | None = None,
) -> None:
    """Train what the recipe describes. `only`: the one kind of recipe that a command is about (UserError)."""
    config, options = parse_recipe(description or __doc__ or "", argv, RunOptions)
    if only is not None and not isinstance(config, only):
        raise UserError(
            f"--config: {config.name} is the recipe of a {type(config).__name__}, and this command is for "
            "another kind: mlx_impl/train.py rerank takes configs/quantum_resonance.py and its like, "
            "mlx_impl/train.py language configs/infinito_small.py; scripts/train.py takes both."
        )
    if isinstance(config, LanguageRecipe):
        language(config, options)
        return
    trained = train_recipe(config, options)
    if trained.finished_before:
        print(tables_text(trained.tables))
        print(f"{trained.folder} is finished; --fresh starts it over, --name begins another.")
    print(next_steps(config, trained.folder, trained.first_stage))


def language(recipe: LanguageRecipe, options: RunOptions) -> None:
    """Train a language model; its test perplexity, and what to type next."""
    trained = train_language(recipe, options)
    print(tables_text(trained.tables))
    if trained.finished_before:
        print(f"{trained.folder} is finished; --fresh starts it over, --name begins another.")
    best, data = shlex.quote(str(trained.best)), shlex.quote(recipe.data.name)
    asked = "--instruction " if isinstance(recipe, FineTuneRecipe) else ""
    commands = [
        f'python scripts/generate.py --model {best} {asked}--prompt "..."',
        f"python scripts/evaluate_lm.py --model {best} --data {data} --metrics all",
    ]
    if isinstance(recipe, ExpansionRecipe):
        commands = [f"python mlx_impl/{command}.py {best}" for command in ("eval", "convert")]
    print(
        f"checkpoint: {trained.best}\nreport: {trained.folder / 'report.html'}\n"
        f"next: {commands[0]}\n      {commands[1]}"
    )


def next_steps(config: RerankerConfig, run: Path, first_stage: str) -> str:
    """Where the run's files lie and what to type next: the evaluation is that of the run's own table."""
    data, evaluation, best = config.data, config.evaluation, shlex.quote(str(run / "best"))
    flags = [("--data", data.name, "pydocs"), ("--first-stage", first_stage, "")]
    flags += [("--depth", str(evaluation.depth), "50"), ("--split", data.test_split, "test")]
    flags += [("--encoder", data.encoder, "default"), ("--on-bad-row", data.on_bad_row, "error")]
    words = [f"{flag} {shlex.quote(value)}" for flag, value, default in flags if value != default]
    words += ["--judged"] if evaluation.candidates == "judged" else []
    return (
        f"checkpoint: {run / 'best'}\nreport: {run / 'report.html'}\n"
        f'next: python scripts/rerank.py --model {best} --query "..." --passages FILE\n'
        f"      {' '.join(('python scripts/evaluate.py', best, *words))}"
    )


if __name__ == "__main__":
    run_command(main)
