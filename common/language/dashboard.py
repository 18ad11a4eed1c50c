"""A language model's run as tables and figures, for its report.html and notebooks/training_monitor.ipynb.

The source's dashboard: perplexity, generation quality, technical metrics. A target stands where the source
names one: a validation perplexity of 50 to 80, a distillation weight from 0.01 to 0.05.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.backends import checkpoint_identity
from common.checkpoint import MODEL_FILE, read_json
from common.errors import UserError
from common.language.inspection import INSPECTION_FILE, read_inspection
from common.report import INK, Table, chart, figure_html, figure_style, series, table_html
from common.runs import RESULTS_FILE, Metrics, read_metrics

SOURCE_PERPLEXITY = 80.0  # the upper end of what the source hopes for, a validation token
EVALUATION_FILE = "evaluation_lm.json"  # of scripts/evaluate_lm.py
WIDE = ("Attention", "Memory map")  # figures over the whole page
# "kind/name" of the quantities that the figures draw; the report draws the others one by one.
DRAWN = frozenset(
    "train/loss train/cross_entropy train/distillation train/distillation_weight train/magnitude train/phase "
    "dev/perplexity dev/word_perplexity dev/utilisation dev/active_slots dev/null_share dev/mean_importance "
    "dev/rotation".split()
)


@dataclass(frozen=True)
class LanguageRun:
    """What the folder of a language model's run holds."""

    directory: Path
    config: dict[str, Any]  # the resolved recipe
    metrics: list[Metrics]  # lines of metrics.jsonl, at least one
    results: dict[str, Any] | None  # of the test split; None of a run that has not ended
    evaluation: dict[str, Any] | None  # of scripts/evaluate_lm.py, of weights that are still there
    inspection: dict[str, Any] | None  # common.language.inspection

    @property
    def slots(self) -> int:
        """Slots of the memory; 0 without one."""
        model = self.config["model"]
        return int(model.get("memory_slots", 0)) if model.get("architecture") == "infinito" else 0

    @property
    def context(self) -> int:
        """Tokens of a row or segment."""
        model = self.config["model"]
        return int(model.get("context") or model["max_position_embeddings"])

    @property
    def taught(self) -> bool:
        """Whether there is a teacher."""
        return self.config["distillation"]["teacher"] is not None

    def lines(self, kind: str) -> list[Metrics]:
        """Lines of the log of one kind, train or dev."""
        return [line for line in self.metrics if line["kind"] == kind]

    def tokens_per_second(self) -> float | None:
        """Counted tokens a second in training: the median between lines of the log, evaluations left out."""
        train = self.config["train"]
        places = train["batch_size"] * train["unroll"] * self.context
        rates = [
            (b["step"] - a["step"]) * places * b["counted_share"] / (b["seconds"] - a["seconds"])
            for a, b in pairwise(self.metrics)
            if a["kind"] == b["kind"] == "train" and b["seconds"] > a["seconds"]
        ]
        return statistics.median(rates) if rates else None

    def distillation_weight(self) -> float | None:
        """w_kd as it was logged last."""
        weights = [w for line in self.lines("train") if (w := line.get("distillation_weight")) is not None]
        return weights[-1] if weights else None

    def weight_reached(self) -> bool:
        """Whether w_kd came to its end; at the last step it lies one step's share before it."""
        settings, value = self.config["distillation"], self.distillation_weight()
        last = max(line["step"] for line in self.metrics)
        share = abs(settings["end_weight"] - settings["start_weight"]) / last + 1e-6
        return value is not None and abs(value - settings["end_weight"]) <= share


def is_language_run(run: Mapping[str, Any]) -> bool:
    """Whether a run's config.json is of a language model's recipe; that of an expander, whose rows are no
    corpus, is not."""
    config = run.get("config") or {}
    corpus = "tokenizer" in (config.get("data") or {})
    return corpus and "distillation" in config and isinstance(config.get("model"), Mapping)


def read_run(directory: str | Path) -> LanguageRun:
    """The run in a folder. UserError for no run, a reranker's, and one that has logged nothing."""
    directory = Path(directory)
    if not (directory / "config.json").exists():
        raise UserError(
            f"{directory}: there is no run here; give a folder of runs/, such as runs/infinito_small"
        )
    run = read_json(directory / "config.json")
    if "environments" not in run:
        raise UserError(f"{directory}: is no run's folder, its config.json says nothing of one")
    if not is_language_run(run):
        raise UserError(
            f"{directory}: is the run of a reranker or an expander, not of a language model on a corpus: use "
            "scripts/analyze.py and scripts/evaluate.py, or mlx_impl/eval.py, for it"
        )
    metrics = read_metrics(directory)
    if not metrics:
        raise UserError(f"{directory}: has logged nothing yet; wait for the first steps of its training")
    return LanguageRun(
        directory,
        run["config"],
        metrics,
        read_json(directory / RESULTS_FILE) if (directory / RESULTS_FILE).exists() else None,
        _evaluation(directory),
        read_inspection(directory),
    )


def _evaluation(directory: Path) -> dict[str, Any] | None:
    """What was measured of best/ or final/ as they are now; what was of earlier weights does not count."""
    file = directory / EVALUATION_FILE
    if not file.exists():
        return None
    evaluation = read_json(file)
    places = [directory / name for name in ("best", "final") if (directory / name / MODEL_FILE).exists()]
    return evaluation if evaluation["model"] in map(checkpoint_identity, places) else None


# --- tables ---


def dashboard_tables(run: LanguageRun) -> list[Table]:
    """Perplexity, generation quality, technical metrics: value, target, and whether it was reached."""
    return [_perplexity_table(run), _generation_table(run), _technical_table(run)]


def _perplexity_table(run: LanguageRun) -> Table:
    dev = [line for line in run.lines("dev") if line.get("perplexity") is not None]
    best = min(dev, key=lambda line: line["perplexity"]) if dev else {}
    value = best.get("perplexity")
    rows = [
        _row("validation, a token", value, "50 to 80", value is not None and value <= SOURCE_PERPLEXITY),
        _row("validation, a word", best.get("word_perplexity")),
        _row("validation, bits a byte", best.get("bits_per_byte")),
    ]
    tests: Sequence[Mapping[str, Any]] = (run.results or {}).get("test") or [{"mode": "static"}]
    for test in tests:
        rows += [_row(f"test, {test['mode']}, {unit}", test.get(key)) for key, unit in _UNITS]
    return {
        "title": "Perplexity",
        "columns": ["metric", "value", "target", "status"],
        "rows": rows,
        "note": (
            f"Validation: the best of {len(dev)} evaluations. The source hopes for 50 to 80 a token, of "
            "Infinito on WikiText with GPT-2's tokens; up to 80 counts as reached. With another corpus or "
            f"vocabulary a token's perplexity is another quantity; this run: {run.config['data']['name']}, "
            f"{run.config['data']['tokenizer']}."
        ),
    }


_UNITS = (("token", "a token"), ("word", "a word"), ("bits_per_byte", "bits a byte"))
_QUALITY = (
    *(f"repetition_{n}" for n in (1, 2, 3)),
    *(f"character_repetition_{n}" for n in (1, 2, 3)),
    "distinct_per_100",
    "unknown_share",
    *(f"bleu_{n}" for n in (1, 2, 3, 4)),
    "self_bleu",
)


def _generation_table(run: LanguageRun) -> Table:
    model, human = _generation(run)
    note = "Not measured: python scripts/evaluate_lm.py --model RUN --metrics all does it."
    if model and run.evaluation:
        settings = run.evaluation["settings"]
        note = (
            f"{settings['samples']} texts of {settings['max_new_tokens']} tokens after places of the split "
            f"{settings['split']}, temperature {settings['temperature']:g}, seed {settings['seed']}; human: "
            "how their authors went on. The source names no target here."
        )
    return {
        "title": "Generation quality",
        "columns": ["metric", "value", "human text", "target", "status"],
        "rows": [
            [cells[0], cells[1], human.get(name), *cells[2:]]
            for name in _QUALITY
            for cells in [_row(name.replace("_", " "), model.get(name))]
        ],
        "note": note,
    }


def _generation(run: LanguageRun) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of the model's texts and of the authors'; empty where they were not measured."""
    columns = (run.evaluation or {}).get("generation") or {}
    model: dict[str, Any] = next((found for name, found in columns.items() if name != "human"), {})
    return model, columns.get("human", {})


def _technical_table(run: LanguageRun) -> Table:
    last = (run.lines("dev") or [{}])[-1]
    rows = [_row("tokens a second, training", run.tokens_per_second())]
    rows.append(
        _row("exploration: share of sampled tokens not the argmax", _generation(run)[0].get("exploration"))
    )
    if run.slots:
        active = last.get("active_slots")
        rows += [
            _row("memory: utilisation", last.get("utilisation")),
            _row(f"memory: active slots of {run.slots}", active),
            _row("memory: mean importance", last.get("mean_importance")),
            _row("memory: rotation, slots replaced a segment / slots", last.get("rotation")),
            _row("memory: read weight of the null slot", last.get("null_share")),
        ]
    if run.taught:
        end, value = run.config["distillation"]["end_weight"], run.distillation_weight()
        rows.append(_row("distillation weight, last step", value, f"{end:g}", run.weight_reached()))
        rows += [
            _row(f"{name} against the teacher's certainty: {unit}, dev", last[key])
            for name in ("magnitude", "phase")
            for key, unit in ((f"{name}_r2", "R²"), (f"{name}_entropy_rank", "rank correlation with entropy"))
            if key in last
        ]
    return {
        "title": "Technical metrics",
        "columns": ["metric", "value", "target", "status"],
        "rows": rows,
        "note": (
            "Memory: over the segments of dev, at the last evaluation. Tokens: without padding. R²: 1 - "
            "squared error / that of the best constant; the rank correlation is -1 at best."
        ),
    }


def _row(
    name: str, value: float | None, target: str | None = None, reached: bool = False
) -> list[str | float | None]:
    """Metric, value, target, status; no status where there is a value and no target."""
    verdict = ("reached" if reached else "not reached") if target else None
    return [name, value, target, "not measured" if value is None else verdict]


# --- figures ---


def figures(run: LanguageRun, inspection: Mapping[str, Any] | None) -> dict[str, Any]:
    """Title -> a matplotlib figure, or a sentence that says why there is none.

    `inspection` is the run's own, or that of another text.
    """
    train, dev = series(run.metrics, "train"), series(run.metrics, "dev")
    taught = {
        "cross-entropy": train.get("cross_entropy"),
        "distillation, T²KL": train.get("distillation"),
        "its part of the loss": _weighted(train),
    }
    sureness = {
        "magnitude": train.get("magnitude"),
        "phase": train.get("phase"),
        **{f"{name}, dev": curve for name, curve in dev.items() if "r2" in name},
    }
    used = {
        name.replace("_", " "): dev.get(name)
        for name in ("utilisation", "null_share", "mean_importance", "rotation")
    }
    active = dev.get("active_slots")
    if active and run.slots:
        used["active slots / slots"] = (active[0], [count / run.slots for count in active[1]])
    no_memory = "This model has no memory of slots." if not run.slots else "The memory was not measured yet."
    no_teacher = "There is no teacher." if not run.taught else "Not logged yet."
    return {
        "Total loss": _curves("Total loss", {"loss": train.get("loss")}, "Not logged yet."),
        "Perplexity on dev": _curves(
            "Perplexity on dev",
            {"a token": dev.get("perplexity"), "a word": dev.get("word_perplexity")},
            "Dev was not measured yet.",
        ),
        "Cross-entropy and distillation": _curves(
            "Cross-entropy and distillation (nats)", taught, "Not logged yet."
        ),
        "Distillation weight": _curves(
            "Distillation weight", {"w_kd": train.get("distillation_weight")}, no_teacher
        ),
        "Phase and magnitude": _curves(
            "Phase and magnitude against the teacher's certainty",
            sureness,
            "Neither was logged: Indra with a projector and a teacher has them.",
        ),
        "Attention": attention_figure(inspection),
        "Use of the memory": _curves("Use of the memory on dev", used, no_memory),
        "Memory map": memory_figure(inspection) if run.slots else no_memory,
    }


def _curves(title: str, curves: Mapping[str, Any], absent: str) -> Any:
    """A chart of the curves that were logged; `absent` when none was."""
    logged = {name: curve for name, curve in curves.items() if curve}
    return chart(title, logged) if logged else absent


def _weighted(train: Mapping[str, Any]) -> Any:
    """w_kd(t) T² KL: what distillation adds to the loss."""
    terms, weights = train.get("distillation"), train.get("distillation_weight")
    if not terms or not weights:
        return None
    at = dict(zip(*weights, strict=True))
    both = [(step, value * at[step]) for step, value in zip(*terms, strict=True) if step in at]
    return [step for step, _ in both], [value for _, value in both]


_NOT_ENDED = f"{INSPECTION_FILE} is written when the run ends."


def attention_figure(inspection: Mapping[str, Any] | None) -> Any:
    """A heat map of each layer, mean over heads: row, the token that looks; column, what it looks at."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    if inspection is None:
        return _NOT_ENDED
    found = inspection["attention"]
    if found is None:
        return "This model has no attention."
    layers, tokens = found["layers"], [token.replace("\n", "↵") for token in found["tokens"]]
    across = min(len(layers), 4)
    down = -(-len(layers) // across)
    with figure_style():
        figure = Figure(figsize=(11.0, 3.4 * down if across > 2 else 5.0 * down), layout="constrained")
        for index, layer in enumerate(layers):
            axis = figure.add_subplot(down, across, index + 1)
            image = axis.imshow(layer, cmap="viridis", norm=PowerNorm(0.5, 0.0, 1.0), interpolation="nearest")
            _plain(axis, f"layer {index}")
            axis.set_xticks([])
            axis.set_yticks(range(len(tokens)) if index % across == 0 else [])
            if index % across == 0:
                axis.set_yticklabels(tokens, fontsize=5, parse_math=False)
        bar = figure.colorbar(image, ax=figure.axes, shrink=0.8, pad=0.01)
        bar.ax.tick_params(colors=INK, labelsize=8)
    return figure


def memory_figure(inspection: Mapping[str, Any] | None) -> Any:
    """What each slot holds after each segment of a text: importance, age, read weight; and the rotation."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if inspection is None:
        return _NOT_ENDED
    found = inspection["memory"]
    if found is None:
        return "This model has no memory of slots."
    maps = (
        ("importance", found["importance"]),
        ("age in segments", found["age"]),
        ("read weight (last: the null slot)", found["read"]),
    )
    slots = len(found["importance"])
    with figure_style():
        figure = Figure(figsize=(11.0, 6.4), layout="constrained")
        axes = figure.subplots(2, 2).flatten()
        for axis, (name, values) in zip(axes, maps, strict=False):
            image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
            _plain(axis, name)
            axis.set_ylabel("slot", fontsize=9, color=INK)
            figure.colorbar(image, ax=axis, pad=0.01).ax.tick_params(colors=INK, labelsize=8)
        axes[3].plot([count / slots for count in found["replaced"]], marker="o", markersize=3)
        axes[3].set_ylim(-0.02, 1.02)
        _plain(axes[3], "rotation: slots replaced / slots")
        for axis in axes:
            axis.set_xlabel("segment", fontsize=9, color=INK)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def _plain(axis: Any, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axis.tick_params(colors=INK, labelsize=8, length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def dashboard_section(run: LanguageRun) -> str:
    """Tables and figures as a part of the run's report."""
    drawn = {
        title: figure for title, figure in figures(run, run.inspection).items() if not isinstance(figure, str)
    }
    small = "".join(figure_html(figure) for title, figure in drawn.items() if title not in WIDE)
    wide = "".join(f"<h2>{title}</h2>{figure_html(drawn[title])}" for title in WIDE if title in drawn)
    tables = "".join(map(table_html, dashboard_tables(run)))
    return f'{tables}<h2>Monitoring</h2><div class="panels">{small}</div>{wide}'
