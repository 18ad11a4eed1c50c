"""The service over HTTP: what its routes answer, and what they say to what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from common.service.app import ServiceConfig
from tests.services import Running, running


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("service")) as made:
        yield made


QUERY = "keys and values of a function"


def test_search_gives_both_orders_with_the_parts_of_each_score(service: Running) -> None:
    found = service.post("/search", query=QUERY, top_k=3)
    assert found["reranked"] and found["fallback"] is None and len(found["hits"]) == 3
    assert [hit["rank"] for hit in found["hits"]] == [1, 2, 3]
    assert [hit["rank"] for hit in found["first_stage"]] == [1, 2, 3]
    best = found["hits"][0]
    assert best["id"] == "dict" and best["resonance"] == best["overlap"] == best["coherence"] == 0.5
    assert {"retrieve", "rerank", "total"} <= set(found["seconds"])
    alone = service.post("/search", query=QUERY, rerank=False)
    assert not alone["reranked"] and alone["hits"][0]["reranker"] is None
    assert service.post("/search", query=QUERY)["cache_hit"]


def test_rerank_takes_the_forms_of_other_services(service: Running) -> None:
    texts = ["nothing of it", "sorted gives a list", "a list"]
    cohere = service.post("/v2/rerank", query="sorted list", documents=texts, top_n=2, model="any")
    assert [(item["index"], item["score"]) for item in cohere["results"]] == [(1, 2.0), (2, 1.0)]
    assert 0.5 < cohere["results"][1]["relevance_score"] < cohere["results"][0]["relevance_score"] < 1
    jina = service.post(
        "/v1/rerank", query="list", documents=[{"text": "no"}, {"text": "a list"}], return_documents=True
    )
    assert jina["results"][0]["document"] == {"text": "a list"}
    tei = service.post("/rerank", query="sorted list", texts=texts, raw_scores=True, return_text=True)
    assert tei[0] == {"index": 1, "score": 2.0, "text": texts[1]} and len(tei) == 3


def test_context_is_within_its_budget_and_names_its_sources(service: Running) -> None:
    found = service.post("/context", query="json dumps", top_k=2, max_tokens=60)
    assert found["text"].startswith("[1] json j.html\n") and found["tokens"] <= 60
    assert found["sources"][0]["metadata"] == {"source": "j.html"}


def test_documents_come_and_go(service: Running) -> None:
    odd = "../a b/ü?&#%00"
    added = service.post("/documents", documents=[{"id": odd, "text": "A zebra crossing."}, "Another zebra."])
    assert added["added"] == 2 and added["ids"][0] == odd
    assert odd in {hit["id"] for hit in service.post("/search", query="zebra")["hits"]}
    from urllib.parse import quote

    names = "&".join(f"id={quote(name, safe='')}" for name in added["ids"])
    status, _, gone = service.ask("DELETE", f"/documents?{names}")
    assert (status, gone["deleted"]) == (200, 2)
    assert odd not in {hit["id"] for hit in service.post("/search", query="zebra")["hits"]}


def test_feedback_belongs_to_a_hit_of_a_search(service: Running) -> None:
    found = service.post("/search", query="json")
    service.post("/feedback", search=found["id"], document="json", value=1)
    (stored,) = [item for item in service.service.feedback.feedback() if item.search == found["id"]]
    assert (stored.document, stored.value) == ("json", 1)
    search = service.service.feedback.search(found["id"])
    assert search is not None and search.query == "json" and search.reranked[0].id == "json"
    unknown = {"search": "nothing", "document": "json", "value": 1}
    assert service.ask("POST", "/feedback", unknown)[0] == 404
    assert service.ask("POST", "/feedback", unknown | {"search": found["id"], "document": "no"})[0] == 422


def test_text_in_openais_form_whole_and_streamed(service: Running) -> None:
    whole = service.post("/v1/completions", prompt=["ab", "e"], max_tokens=3, temperature=0, echo=True)
    assert [(c["text"], c["finish_reason"]) for c in whole["choices"]] == [
        ("abcde", "length"),
        ("efgh", "length"),
    ]
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    body = {"prompt": "a", "max_tokens": 50, "temperature": 0, "stream": True, "stop": "g"}
    status, headers, content = service.ask("POST", "/v1/completions", body)
    data = [line[6:] for line in content.split("\n\n") if line]
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    pieces = [json.loads(item)["choices"][0] for item in data[:-1]]
    assert data[-1] == "[DONE]" and "".join(piece["text"] for piece in pieces) == "bcdef"
    assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert service.ask("POST", "/v1/completions", {"prompt": "a", "model": "gpt"})[0] == 404
    assert service.ask("GET", "/v1/models")[2]["data"][0]["id"] == "alphabet"


def test_it_says_how_it_is(service: Running) -> None:
    service.post("/search", query="how it is")
    assert service.ask("GET", "/health")[2] == {"status": "ok"}
    status, _, ready = service.ask("GET", "/ready")
    assert status == 200 and ready["reranker"] == "up" and ready["documents"] >= 23
    text = service.ask("GET", "/metrics")[2]
    for name in (
        'resonance_stage_seconds_bucket{le="0.001",stage="retrieve"}',
        "resonance_batch_pairs_count",
        'resonance_cache_pairs_total{result="miss"}',
        'resonance_requests_total{route="/search",status="200"}',
        "resonance_reranker_up 1.0",
        "resonance_requests_waiting 0",
    ):
        assert name in text, name


def wrong() -> list[tuple[str, Any, int]]:
    deep = b'{"query": ' + b"[" * 50_000
    nested: Any = "x"
    for _ in range(600):
        nested = {"a": nested}
    document = {"id": "deep", "text": "a"}
    return [
        ("/search", b"{no json", 400),
        ("/search", deep, 400),
        ("/search", b"\xff\xfe", 400),
        ("/search", [], 422),
        ("/search", {"query": 3}, 422),
        ("/search", {"query": " \n"}, 422),
        ("/search", {"query": "x" * 100_000}, 422),
        ("/search", b'{"query": "\\ud800"}', 422),
        ("/search", {"query": "a", "top_k": True}, 422),
        ("/search", {"query": "a", "unknown": 1}, 422),
        ("/rerank", {"query": "a", "documents": ["b"] * 10_000}, 422),
        ("/rerank", {"query": "a", "documents": []}, 422),
        ("/rerank", {"query": "a"}, 422),
        ("/rerank", {"query": "refuse", "documents": ["b"]}, 422),
        ("/documents", {"documents": [""]}, 422),
        ("/documents", {"documents": [{"id": "a\0b", "text": "c"}]}, 422),
        ("/documents", b'{"documents": [{"text": "c", "metadata": {"a": NaN}}]}', 422),
        ("/documents", {"documents": [{"id": "a", "text": "b"}, {"id": "a", "text": "c"}]}, 422),
        ("/documents", {"documents": [document | {"metadata": nested}]}, 422),
        ("/documents", b"[" + b" " * 10_000_000 + b"]", 413),
        ("/context", {"query": "a", "max_tokens": 0}, 422),
        ("/v1/completions", {"prompt": []}, 422),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, 422),
        ("/v1/completions", b'{"prompt": "a", "top_p": NaN}', 422),
        ("/feedback", {"search": "a", "document": "b", "value": 2}, 422),
        ("/nothing", {}, 404),
        ("/health", {}, 405),
    ]


@pytest.mark.parametrize(("path", "body", "status"), wrong(), ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_said_with_a_status_of_its_own(
    service: Running, path: str, body: Any, status: int
) -> None:
    got, _, said = service.ask("POST", path, body)
    assert got == status, said
    assert said["error"]["message"] and len(said["error"]["message"]) < 3000


def test_files_beside_the_page_are_not_served(service: Running) -> None:
    for path in ("/static/../core.py", "/static/..%2fcore.py", "/static/%00", "/core.py", "//etc/passwd"):
        assert service.ask("GET", path)[0] == 404
    status, headers, page = service.ask("GET", "/")
    assert status == 200 and "default-src 'self'" in headers["content-security-policy"]
    assert "http" not in page.replace("http-equiv", "")  # nothing of another host


def test_all_kinds_of_unicode_are_answered(service: Running) -> None:
    for text in ("日本語", "\u202eabc", "a\u0300" * 500, "👩‍👩‍👧", "\x00\x01", "ẞ", "\ufeff", "\U0010ffff"):
        assert service.post("/search", query=text)["query"] == text
        assert len(service.post("/rerank", query=text, documents=[text, ""])["results"]) == 2


def test_a_key_and_the_host_are_asked_for(tmp_path: Any) -> None:
    config = ServiceConfig(api_key="sesame ü", hosts=("127.0.0.1",))
    with running(tmp_path, None, config=config, text=False) as service:
        assert service.ask("POST", "/search", {"query": "json"})[0] == 401
        for wrong_key in ("", "sesame", "sesame u"):
            assert service.ask("POST", "/search", {"query": "json"}, x_api_key=wrong_key)[0] == 401
        key = "sesame ü".encode().decode("latin-1")
        assert service.ask("POST", "/search", {"query": "json"}, x_api_key=key)[0] == 200
        assert service.ask("POST", "/search", {"query": "json"}, authorization=f"Bearer {key}")[0] == 200
        assert service.ask("GET", "/metrics")[0] == 401 and service.ask("GET", "/health")[0] == 200
        assert service.ask("GET", "/health", host="evil.example")[0] == 421
        assert service.ask("POST", "/rerank", {"query": "a", "texts": ["b"]}, x_api_key=key)[0] == 503
        assert service.ask("POST", "/v1/completions", {"prompt": "a"}, x_api_key=key)[0] == 404
