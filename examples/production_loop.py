"""The production loop: searches and feedback, monitoring, hard cases for retraining, a new model promoted.

    python examples/production_loop.py --model runs/example_basic/best [--quick] [--data my_pairs.jsonl]

After examples/basic_training.py. Without --model: the untrained base. A service (scripts/serve.py) records
searches and feedback by itself; here the labels of the data play the user. Time on 2 CPU cores: not measured
yet.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from common.data.sources import load_ranking_data
from common.errors import run_command
from common.hub import resolve_model
from common.rag import RAGPipeline
from common.report import tables_text
from common.retrieval.index import passage_texts
from common.service.feedback import FeedbackStore, Scored
from common.service.monitoring import Monitoring, hard_cases, monitor, monitoring_tables
from common.service.registry import Registry


def main(
    model: str = "default",
    data: str = "pydocs",
    base: str = "default",
    folder: Path = Path("runs/example_loop"),
    quick: bool = False,
) -> Monitoring:
    """Everything that a team does between two models; what is left behind lies in `folder`."""
    registry = Registry(folder / "models")
    registry.add("ranker", resolve_model(model), note="the first one")
    registry.promote("ranker")  # registry.rollback("ranker") undoes it

    collection, store = load_ranking_data(data), FeedbackStore(folder / "feedback.sqlite")
    rag = RAGPipeline(base, registry.current("ranker"), index_dir=folder / "index")
    rag.index_documents({"id": name, "text": text} for name, text in collection.corpus.items())
    for query, relevant in list(collection.split("test").items())[: 5 if quick else 50]:
        first = rag.retrieve(collection.queries[query]).hits
        found = rag.retrieve_and_rerank(collection.queries[query], 10)
        orders = [[Scored(hit.id, hit.score) for hit in hits] for hits in (first, found.hits)]
        search = store.record_search(found.query, *orders, latency=found.seconds, fallback=found.fallback)
        for hit in found.hits[:3]:  # the user looks at three
            store.record_feedback(search, hit.id, 1 if hit.passage.document in relevant else -1)

    report = monitor(store)
    searches, votes = list(store.searches()), list(store.feedback())
    texts = passage_texts(folder / "index", {hit.id for search in searches for hit in search.first_stage})
    rows, _ = hard_cases(searches, votes, texts)  # training data for configs/quantum_retrain.py
    print(f"{len(rows)} hard cases; current: {registry.current('ranker')}")
    return report


if __name__ == "__main__":
    run_command(lambda: print(tables_text(monitoring_tables(tyro.cli(main, description=__doc__)))))
