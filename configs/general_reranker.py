"""One reranker for several domains: pydocs, CoNaLa (code), WikiQA (questions), SciFact, NFCorpus (science).

    export RESONANCE_DATA=/path/to/data
    python scripts/train.py --config configs/general_reranker.py [--preset less_conala|less_wikiqa]

$RESONANCE_DATA holds the BEIR folders `conala`, `wikiqa`, `scifact` and `nfcorpus` (corpus.jsonl[.gz],
queries.jsonl, qrels/<split>.tsv): SciFact and NFCorpus as github.com/beir-cellar/beir has them, CoNaLa
(conala-corpus.github.io) and WikiQA (aka.ms/WikiQA) put into that form. Each query's negatives come from its
own collection; WikiQA's are those that it judges. Checkpoint and fusion weight are chosen on pooled dev
queries, equally many of each; every test split has its own table, alone and fused. With a GPU, take the caps
`@500` out of --data.name and set --data.max-passage-tokens 256. On what was left out, and on TREC DL 2019:
benchmarks/real_collections.py (collections general, general-less-conala, general-less-wikiqa) measures them.

preset       trained on          time on 1 core    result, nDCG@10 fused (best first stage)
(default)    all five            17 min            .703 pydocs (.670), .696 CoNaLa (.649), .824 WikiQA
                                                   (.783), .713 SciFact (.715), .353 NFCorpus (.357)
less_conala  all but CoNaLa      15 min            .660 CoNaLa (.649)
less_wikiqa  all but WikiQA      21 min            .785 WikiQA (.783)
"""

from __future__ import annotations

from collections.abc import Callable

from common.config import DataConfig, EvalConfig, QuantumConfig, RerankerConfig, TrainConfig

# the sets of long texts are capped: a step of theirs costs several of the others
SOURCES = (
    "pydocs",
    "$RESONANCE_DATA/conala",
    "$RESONANCE_DATA/wikiqa",
    "$RESONANCE_DATA/scifact@500",
    "$RESONANCE_DATA/nfcorpus@500",
)


def trained_on(sources: tuple[str, ...], name: str) -> RerankerConfig:
    """The recipe on some of the sources."""
    return RerankerConfig(
        name=name,
        data=DataConfig(
            name=" + ".join(sources),
            list_size=4,
            negatives="judged",
            negative_pool=100,  # as deep as the positives that count: NFCorpus has dozens a query, most far
            positives="retrieved",
            max_query_tokens=64,
            max_passage_tokens=128,
        ),
        quantum=QuantumConfig(mode="resonance"),
        train=TrainConfig(epochs=0.5, learning_rate=1e-4),
        evaluation=EvalConfig(depth=20, candidates="judged", dev_queries=200, dev_depth=15),
    )


def less(collection: str) -> RerankerConfig:
    """All sources but one."""
    rest = tuple(source for source in SOURCES if not source.endswith("/" + collection))
    return trained_on(rest, f"general_less_{collection}")


def less_conala() -> RerankerConfig:
    """CoNaLa is left out, to be an unseen domain."""
    return less("conala")


def less_wikiqa() -> RerankerConfig:
    """WikiQA is left out, to be an unseen domain."""
    return less("wikiqa")


PRESETS: dict[str, Callable[[], RerankerConfig]] = {"less_conala": less_conala, "less_wikiqa": less_wikiqa}


def get_config(preset: str | None = None) -> RerankerConfig:
    """The recipe of a preset; all sources without one."""
    return trained_on(SOURCES, "general_reranker") if preset is None else PRESETS[preset]()
