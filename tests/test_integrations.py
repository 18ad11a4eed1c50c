"""The code of docs/integrations.md runs as it stands, over a pipeline of stand-ins."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from common.rag import RAGPipeline
from tests.retrieval_fakes import WordEncoder, WordScorer

PAGE = Path(__file__).parents[1] / "docs" / "integrations.md"
TEXTS = {
    "sort": "To sort a list call sort.",
    "open": "Open a file by its name.",
    "more": "A list is mutable.",
}


def run(section: str) -> dict[str, Any]:
    """What the section's code leaves behind."""
    pipeline = RAGPipeline(WordEncoder(), WordScorer(), say=lambda _: None)
    pipeline.index_documents({"id": key, "text": text, "page": key} for key, text in TEXTS.items())
    found = re.search(rf"^## {section}$.*?^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    names: dict[str, Any] = {"rag": pipeline, "__name__": "integration"}
    exec(compile(found[1], f"{PAGE.name}: {section}", "exec", dont_inherit=True), names)
    return names


def test_langchain_retrieves_and_reranks() -> None:
    pytest.importorskip("langchain_core", reason="needs langchain-core")
    documents = run("LangChain")["documents"]
    assert documents[0].id == "sort" and documents[0].page_content == TEXTS["sort"]
    assert documents[0].metadata["page"] == "sort" and documents[0].metadata["score"] > 0


def test_llama_index_reranks_nodes() -> None:
    pytest.importorskip("llama_index.core", reason="needs llama-index-core")
    (best,) = run("LlamaIndex")["best"]
    assert best.node.get_content() == "Sort a list." and best.score > 0


def test_haystack_runs_the_component() -> None:
    pytest.importorskip("haystack", reason="needs haystack-ai")
    documents = run("Haystack")["answer"]["search"]["documents"]
    assert [documents[0].id, documents[0].content] == ["sort", TEXTS["sort"]]
    assert len(documents) == 3 and documents[0].meta == {"page": "sort"}
