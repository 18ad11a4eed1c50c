"""RAG with a reranker: what it moves, how sure it is, and what happens when it is too slow.

    python examples/rag_reranked.py --model runs/example_basic/best [--quick] [--query "sort a list"]

After examples/basic_training.py; an INT8 export of it (`scripts/export.py`) is given in the same way.
Without --model: the untrained base. Time on 2 CPU cores: not measured yet.
"""

from __future__ import annotations

import tyro

from common.data.sources import load_ranking_data
from common.errors import run_command
from common.rag import Context, RAGPipeline


def main(
    model: str = "default",
    data: str = "pydocs",
    base: str = "default",
    query: str | None = None,
    quick: bool = False,
) -> Context:
    """The context for `query`, from passages that `model` reranked."""
    collection = load_ranking_data(data)
    wanted = list(collection.corpus.items())[: 200 if quick else None]
    query = query or collection.queries[min(collection.queries)]
    rag = RAGPipeline(base, model, top_k_retrieval=10 if quick else 50, top_k_rerank=5, deadline=60.0)
    rag.index_documents({"id": name, "text": text} for name, text in wanted)

    # Any function may expand a query for the first stage; the reranker reads the query itself.
    rag.expand = lambda text: {"lex": " ".join(word for word in text.split() if len(word) > 4)}
    found = rag.retrieve_and_rerank(query)
    print(f"query: {query}\nconfidence that the first is relevant: {found.confidence}")
    for hit in found.hits:
        print(f"{hit.rank}. (was {hit.first_rank}) {hit.score:+.2f}, r {hit.resonance}: {hit.text[:60]!r}")

    rag.deadline = 1e-6  # a deadline that nobody keeps: the first stage's order, and the reason
    print(f"fallback: {rag.retrieve_and_rerank('another ' + query).fallback}")
    rag.deadline = None
    context = rag.context(query, top_k=3, max_tokens=500)  # its pairs come from the cache of scores
    print(f"cache hit rate: {rag.statistics.cache_hit_rate:.0%}, fallbacks: {rag.statistics.fallbacks}")
    return context


if __name__ == "__main__":
    run_command(lambda: print(tyro.cli(main, description=__doc__).text))
