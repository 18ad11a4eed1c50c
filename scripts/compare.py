"""Two language models side by side: what each writes after the same prompts, and by how much they differ.

example: python scripts/compare.py --model1 runs/infinito_small --model2 runs/indra_small --prompts demo

Prompts are a file with one a line, or `demo`. Both sample with the same settings and seed. The difference of
a metric is given with a 95 % interval, by bootstrap over prompts (paired). Perplexity is compared with
scripts/evaluate_lm.py. Writes comparison.json and comparison.html to --out.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from common.checkpoint import check_writable, to_json, write_file
from common.errors import UserError, run_command
from common.language.generation import Generated, SamplingConfig
from common.language.samples import DEMO_PROMPTS, LanguageGenerator, load_generator
from common.metrics.language import text_metrics
from common.report import Table, page, table_html, tables_text
from common.runs import environment

BOOTSTRAP = 2000
FILES = ("comparison.json", "comparison.html")


@dataclasses.dataclass(frozen=True)
class Args:
    model1: str
    model2: str
    prompts: str = "demo"
    """A text file with a prompt a line, or `demo`."""
    metrics: Literal["none", "all"] = "all"
    """none shows the texts alone."""
    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    backend: Literal["auto", "jax", "mlx", "onnx"] = "auto"
    out: Path = Path("comparison")


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    args = tyro.cli(Args, args=words, description=__doc__)
    sampling = SamplingConfig.of_flags(args)
    prompts = read_prompts(args.prompts)
    for file in FILES:
        check_writable(args.out / file)
    models = [load_generator(name, args.backend) for name in (args.model1, args.model2)]
    texts = [continued(model, prompts, sampling) for model in models]
    tables = [metric_table(models, texts)] if args.metrics == "all" else []
    for number, prompt in enumerate(prompts):
        print(f"=== {prompt}")
        for model, made in zip(models, texts, strict=True):
            print(f"--- {model.name}\n{made[number].text}")
    print(tables_text(tables))
    write(args, prompts, models, texts, tables)


def read_prompts(name: str) -> list[str]:
    """UserError for a file that is missing or empty."""
    if name == "demo":
        return list(DEMO_PROMPTS)
    try:
        found = [line for line in Path(name).read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {name}: cannot be read ({error}); give a text file, or demo") from None
    if not found:
        raise UserError(f"--prompts {name}: has no prompt; write one a line")
    return found


def continued(model: LanguageGenerator, prompts: list[str], sampling: SamplingConfig) -> list[Generated]:
    """What a model writes, without `<unk>`."""
    banned = dataclasses.replace(sampling, banned=model.tokenizer.unknown_ids)
    return model.generate(prompts, banned)


def metric_table(models: list[LanguageGenerator], texts: list[list[Generated]]) -> Table:
    """Each metric of both, their difference, and its interval over prompts."""
    each = [
        [text_metrics([item.ids], [item.text], model.tokenizer.unknown_ids) for item in made]
        for model, made in zip(models, texts, strict=True)
    ]
    rng = np.random.default_rng(0)
    draws = rng.integers(len(texts[0]), size=(BOOTSTRAP, len(texts[0])))
    rows: list[list[str | float | None]] = []
    for name in each[0][0]:
        first, second = (np.asarray([found[name] for found in part]) for part in each)
        known = np.isfinite(first) & np.isfinite(second)
        if not known.any():
            rows.append([name.replace("_", " "), None, None, None, "–"])
            continue
        difference = np.where(known, second - first, np.nan)
        some = known[draws].any(1)
        means = np.nanmean(difference[draws[some]], axis=1)
        low, high = np.quantile(means, (0.025, 0.975))
        numbers = (float(first[known].mean()), float(second[known].mean()), float(np.nanmean(difference)))
        rows.append([name.replace("_", " "), *numbers, f"[{low:.3f}, {high:.3f}]"])
    return Table(
        title=f"{models[1].name} against {models[0].name}",
        columns=["metric", models[0].name, models[1].name, "difference", "95 % interval"],
        rows=rows,
        note=f"Means over {len(texts[0])} prompts; the interval is a paired bootstrap over prompts.",
    )


def write(
    args: Args,
    prompts: list[str],
    models: list[LanguageGenerator],
    texts: list[list[Generated]],
    tables: list[Table],
) -> None:
    """comparison.json and comparison.html."""
    rows = [
        {"prompt": prompt, "texts": [made[number].text for made in texts]}
        for number, prompt in enumerate(prompts)
    ]
    found = {"settings": vars(args), "tables": tables, "samples": rows, **environment()}
    args.out.mkdir(parents=True, exist_ok=True)
    table_file, page_file = (args.out / file for file in FILES)
    write_file(table_file, to_json(found))
    shown: list[list[str | float | None]] = [[row["prompt"], *row["texts"]] for row in rows]  # type: ignore[list-item,misc]
    samples = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in shown)
    head = "".join(f"<th>{escape(name)}</th>" for name in ("prompt", *(model.name for model in models)))
    body = f'<h2>Texts</h2><div class="scroll"><table class="pairs"><tr>{head}</tr>{samples}</table></div>'
    html = page("Comparison", "\n".join([*map(table_html, tables), body]))
    write_file(page_file, html.encode())
    print(f"written: {table_file}, {page_file}")


if __name__ == "__main__":
    run_command(main)
