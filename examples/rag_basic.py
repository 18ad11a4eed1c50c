"""RAG without training: index documents, search them by words and by meaning, and get a context for an LLM.

    python examples/rag_basic.py [--quick] [--data my_pairs.jsonl] [--query "sort a list"]

Data: the passages of pydocs, or yours. Time on 2 CPU cores: not measured yet.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from common.data.sources import load_ranking_data
from common.errors import run_command
from common.rag import RAGPipeline


def main(
    data: str = "pydocs",
    base: str = "default",
    query: str | None = None,
    index: Path | None = None,
    quick: bool = False,
) -> str:
    """The context for `query` (one of the data when absent). An `index` folder is kept for the next time."""
    collection = load_ranking_data(data)
    wanted = list(collection.corpus.items())[: 200 if quick else None]
    query = query or collection.queries[min(collection.queries)]

    rag = RAGPipeline(base, index_dir=index)  # no reranker: BM25 and dense retrieval, fused
    changes = rag.index_documents(
        {"id": name, "text": text, "metadata": {"source": collection.name}} for name, text in wanted
    )
    print(f"{changes.added} documents added, {changes.unchanged} were there; {rag.index.size} passages")

    rag.index_documents([{"id": "note", "title": "A note", "text": "Documents can be added at any time."}])
    rag.delete_documents(["note"])  # and deleted

    for hit in rag.retrieve(query, top_k=5).hits:
        print(f"{hit.rank}. {hit.id}: {hit.text[:70]!r}")
    return rag.get_context_for_llm(query, top_k=3, max_tokens=500)


if __name__ == "__main__":
    run_command(lambda: print(tyro.cli(main, description=__doc__)))
