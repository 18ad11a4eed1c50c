"""Exports of language models beside their source: perplexity, logits, greedy tokens, size."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.data.language import TokenDocuments
from common.errors import UserError
from common.export import onnx_decode
from common.export.onnx_generation import CONTRACT, load_engine, model_inputs, past_inputs, present_name
from common.export.onnx_language_scoring import load_segment_scorer
from common.export.verification import Precision, weights_size
from common.language.architectures import language_config
from common.language.evaluation import SegmentScorer, evaluate_modes
from common.language.generation import Engine, Logits, SamplingConfig, generate
from common.report import Table, tables_text

MAX_PERPLEXITY_LOSS = 0.02  # of the source's, beyond which an export is refused
TIE = 1e-4  # of the largest logit: tokens that are nearer are equally likely
NEW_TOKENS = 24
LOGITS = 2**26  # numbers of a batch's logits


@dataclass(frozen=True)
class LanguageMeasured:
    """One model on a split."""

    megabytes: float  # 10^6 bytes of weights
    perplexity: dict[str, float]  # a token, by mode: static, and cache of a model with a memory


@dataclass(frozen=True)
class LanguageSource:
    """The model that is exported, and what its exports are verified on."""

    name: str
    corpus: str  # its name, and the split
    engine: Engine
    documents: TokenDocuments
    end: int  # the id that ends a text
    measured: LanguageMeasured


@dataclass(frozen=True)
class LanguageVerification:
    """An export beside its source.

    `difference`: largest and mean |logit - the source's|, and the largest |logit|. `greedy`: prompts, tokens
    chosen after them, how many of these the export would choose otherwise, and the regret, the most that such
    a choice loses of the source's logit. `loss`: the part that perplexity grows by, of the worst mode.
    """

    name: str
    precision: Precision
    corpus: str
    documents: int
    tokens: int
    source: LanguageMeasured
    export: LanguageMeasured
    difference: dict[str, float]
    greedy: dict[str, float]
    loss: float

    def refused(self, max_loss: float) -> str | None:
        """Why an export is not written whose perplexity may grow by `max_loss`; None where it is."""
        if self.loss > max_loss:
            mode = max(self.source.perplexity, key=lambda mode: self._loss(mode))
            return (
                f"this export predicts worse than its source: perplexity {self.export.perplexity[mode]:.3f} "
                f"against {self.source.perplexity[mode]:.3f} ({mode}), {self.loss:.2%} more (allowed: "
                f"{max_loss:.2%}). Choose another --precision, more --max-documents to measure it by, or "
                "--force it."
            )
        if self.precision == "fp32" and self.greedy["regret"] > TIE * max(1.0, self.difference["of"]):
            return (
                f"this export chooses other tokens than its source: {self.greedy['different']:.0f} of "
                f"{self.greedy['tokens']:.0f}, and logits differ by {self.difference['largest']:.3g}. Report "
                "this as an error of the exporter; --force writes it."
            )
        return None

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def card(self, config: Mapping[str, Any]) -> str:
        """README.md: what was exported, what it lost, and how it is used."""
        settings = language_config(config, "the export")
        past = past_inputs(settings)
        rows = [f"| `{name}` int64 | {_sizes(shape)} |" for name, shape in model_inputs(settings).items()]
        rows += [f"| `{name}` float32 | {_sizes(shape)} |" for name, shape in past.items()]
        outputs = ", ".join(f"`{present_name(name)}`" for name in past)
        return CARD.format(
            name=self.name,
            precision=self.precision,
            table=tables_text([language_export_table({self.precision: self})]).strip(),
            inputs="\n".join(rows),
            outputs=outputs,
            contract=CONTRACT,
            code=inspect.getsource(onnx_decode).strip(),
        )

    def _loss(self, mode: str) -> float:
        return self.export.perplexity[mode] / self.source.perplexity[mode] - 1


CARD = """---
pipeline_tag: text-generation
library_name: onnx
---
# {name}, ONNX {precision}

```
{table}
```

In this project: `python scripts/generate.py --model FOLDER --prompt "..."`. Elsewhere, with onnxruntime,
tokenizers and NumPy:

```python
{code}
```

## Inputs

One graph reads a prompt and goes on with it. {contract}

| input | shape |
|---|---|
{inputs}

Outputs: `logits` [rows, kept, vocabulary], and what the next call takes as past: {outputs}.
"""


class SideBySide:
    """A source as an Engine, with an export that reads the same tokens: how far is it from its source?"""

    def __init__(self, source: Engine, export: Engine) -> None:
        self._source, self._export = source, export
        self.context, self.segmented, self.vocab_size = source.context, source.segmented, source.vocab_size
        self.differences: list[NDArray[np.float32]] = []
        self.regrets: list[float] = []  # of each token that the export would choose otherwise
        self.largest, self.tokens = 0.0, 0

    def start(self, rows: int, capacity: int) -> Any:
        return self._source.start(rows, capacity), self._export.start(rows, capacity)

    def read(
        self,
        state: Any,
        ids: NDArray[np.int32],
        counts: NDArray[np.int32],
        explore: tuple[int, int] | None = None,
    ) -> tuple[Any, Logits]:
        """The source's logits, as common.language.generation.Engine says."""
        before, logits = self._source.read(state[0], ids, counts)
        after, others = self._export.read(state[1], ids, counts)
        rows = np.flatnonzero(counts)
        own, other = logits[rows], others[rows]
        chosen = other.argmax(axis=1)
        regret = own.max(axis=1) - own[np.arange(len(rows)), chosen]
        self.regrets += regret[own.argmax(axis=1) != chosen].tolist()
        self.differences.append(np.abs(own - other).ravel())
        self.largest = max(self.largest, float(np.abs(own).max(initial=0)))
        self.tokens += len(rows)
        return (before, after), logits

    def renew(self, state: Any, rows: NDArray[np.bool_]) -> Any:
        return self._source.renew(state[0], rows), self._export.renew(state[1], rows)


def measure_language(
    directory: Path, scorer: SegmentScorer, documents: TokenDocuments, end: int, vocab_size: int
) -> LanguageMeasured:
    """Size and perplexities of a model. UserError where none can be measured."""
    rows = max(1, min(16, LOGITS // (scorer.context * vocab_size)))
    try:
        found = evaluate_modes(scorer, documents, end, batch_size=rows)
    except ValueError as error:
        raise UserError(f"{directory}: {error}") from error
    perplexities = {result.mode: result.perplexity.token for result in found}
    return LanguageMeasured(weights_size(directory) / 1e6, perplexities)


def verify_language(source: LanguageSource, precision: Precision, folder: Path) -> LanguageVerification:
    """An export in a folder beside its source. UserError for a file that cannot be read."""
    engine = load_engine(folder)
    vocabulary = source.engine.vocab_size
    export = measure_language(folder, load_segment_scorer(folder), source.documents, source.end, vocabulary)
    both = SideBySide(source.engine, engine)
    prompts = verification_prompts(source.documents, engine.context, engine.segmented)
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS)
    for batch in (prompts, prompts[:1]):
        generate(both, batch, _Endless(), sampling)
    differences = np.concatenate(both.differences)
    own = source.measured.perplexity
    return LanguageVerification(
        name=source.name,
        precision=precision,
        corpus=source.corpus,
        documents=len(source.documents),
        tokens=int(source.documents.counted.sum()),
        source=source.measured,
        export=export,
        difference={
            "largest": float(differences.max()),
            "mean": float(differences.mean()),
            "of": both.largest,
        },
        greedy={
            "prompts": len(prompts) + 1,
            "tokens": both.tokens,
            "different": len(both.regrets),
            "regret": max(both.regrets, default=0.0),
        },
        loss=max(export.perplexity[mode] / own[mode] - 1 for mode in own),
    )


def verification_prompts(documents: TokenDocuments, context: int | None, segmented: bool) -> list[list[int]]:
    """Ids to continue, several lengths. With NEW_TOKENS more, those of a segmented model go over the border
    of a segment, in a prompt and behind one; those of another fit into its context."""
    size = context or NEW_TOKENS
    room = max(1, size - NEW_TOKENS)
    lengths = (size - 4, size + size // 2, size // 2, 1) if segmented else (room, room // 2, room // 4, 1)
    places = np.linspace(0, len(documents.ids), len(lengths), endpoint=False).astype(int)
    ids = documents.ids
    return [
        np.resize(np.roll(ids, -place), max(1, length)).tolist()
        for place, length in zip(places, lengths, strict=True)
    ]


def language_export_table(found: Mapping[str, LanguageVerification]) -> Table:
    """The exports of one model, a row each below their source."""
    first = next(iter(found.values()))
    modes = list(first.source.perplexity)
    columns = ["model", "MB", *(f"perplexity, {mode}" for mode in modes), "more %"]
    columns += ["|Δ logit| max", "mean", "other greedy tokens"]

    def row(label: str, side: LanguageMeasured, own: LanguageVerification | None) -> list[str | float | None]:
        values = [round(side.perplexity[mode], 4) for mode in modes]
        if own is None:
            return [label, round(side.megabytes, 2), *values, None, None, None, None]
        apart = [float(f"{own.difference[key]:.3g}") for key in ("largest", "mean")]
        other = f"{own.greedy['different']:.0f} of {own.greedy['tokens']:.0f}"
        return [label, round(side.megabytes, 2), *values, round(100 * own.loss, 3), *apart, other]

    rows = [row(f"{first.name} (source)", first.source, None)]
    rows += [row(f"onnx {precision}", own.export, own) for precision, own in found.items()]
    note = (
        f"perplexity a token of {first.tokens:,} tokens in {first.documents:,} documents of {first.corpus}; "
        f"logits and tokens: {first.greedy['prompts']:.0f} prompts of the same text, continued greedily"
    )
    return {"title": f"Exports of {first.name}", "columns": columns, "rows": rows, "note": note}


class _Endless:
    """A tokenizer of texts that never end and that nobody reads."""

    end: int | None = None

    def decode(self, ids: Sequence[int]) -> str:
        return ""


def _sizes(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
