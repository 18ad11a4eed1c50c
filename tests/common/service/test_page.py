"""The page in headless Chromium: search, feedback and text, by mouse, keyboard and on a phone.

Skipped without Chromium and playwright; RESONANCE_REQUIRE=chromium makes that a failure.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.services import Running, running


def _missing(what: str) -> None:
    if "chromium" in os.environ.get("RESONANCE_REQUIRE", "").split(","):
        pytest.fail(f"RESONANCE_REQUIRE=chromium, and {what}")
    pytest.skip(f"{what}: apt install chromium; pip install -e '.[dev]' playwright")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        _missing("no chromium here")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=program, args=["--no-sandbox"], env=environment)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("page")) as made:
        yield made


def opened(browser: Any, service: Running, width: int = 1200) -> tuple[Any, list[str]]:
    """The page, and what went wrong in it."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    problems: list[str] = []
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request",
        lambda asked: None if asked.url.startswith((service.url, "data:")) else problems.append(asked.url),
    )
    page.goto(service.url)
    return page, problems


def shot(page: Any, name: str) -> None:
    """A picture into $RESONANCE_SCREENSHOTS, where it is set."""
    if folder := os.environ.get("RESONANCE_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def test_a_search_shows_both_orders_and_takes_a_thumb(browser: Any, service: Running) -> None:
    query = "says little of its own about keys and values"
    best = service.post("/search", query=query)["hits"][0]["id"]
    page, problems = opened(browser, service)
    page.fill("#query", query)
    page.press("#query", "Enter")
    page.wait_for_selector("#hits > li")
    assert best in page.inner_text("#hits > li:first-child")
    assert page.locator("#first > li").count() == page.locator("#hits > li").count() == 8
    assert page.locator("#hits .moved.up, #hits .moved.down").count() > 0
    for name in ("score", "resonance", "overlap", "coherence"):
        assert name in page.inner_text("#hits > li:first-child .bars")
    assert {"retrieve", "rerank", "total"} <= set(page.inner_text("#latency").split())
    page.click("#hits > li:first-child button[aria-label^=Relevant]")
    page.wait_for_selector("#hits > li:first-child button[aria-pressed=true]")
    (stored,) = service.service.feedback.feedback()
    assert (stored.document, stored.value) == (best, 1)
    shot(page, "search")
    assert problems == []


def test_markup_in_a_document_stays_text(browser: Any, service: Running) -> None:
    text = "<img src=x onerror=alert(1)> <b>markup</b> zebra"
    service.post("/documents", documents=[{"id": "<i>", "title": "<script>1</script>", "text": text}])
    page, problems = opened(browser, service)
    page.fill("#query", "zebra markup")
    page.click("#go")
    page.wait_for_selector("#hits > li")
    assert text in page.inner_text("#hits > li:first-child .text")
    assert page.locator("#hits img, #hits script, #hits b.x").count() == 0 and problems == []
    service.ask("DELETE", "/documents?id=%3Ci%3E")


def test_a_text_is_written_by_the_keyboard_alone(browser: Any, service: Running) -> None:
    page, problems = opened(browser, service)
    page.focus("#tab-search")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-text"
    page.keyboard.press("Tab")
    page.keyboard.type("ab")
    page.fill("#max_tokens", "3")
    page.focus("#temperature")
    page.keyboard.press("Home")
    page.focus("#write")
    page.keyboard.press("Enter")
    page.locator("#text-message", has_text="Done").wait_for()
    assert page.inner_text("#written") == "abcde"
    assert page.inner_text("#text-message") == "Done: 3 tokens."
    shot(page, "text")
    assert problems == []


def test_a_phone_needs_no_sideways_scrolling(browser: Any, service: Running) -> None:
    page, problems = opened(browser, service, width=360)
    page.fill("#query", "keys and values")
    page.press("#query", "Enter")
    page.wait_for_selector("#hits > li")
    for tab in ("#tab-search", "#tab-text"):
        page.click(tab)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        shot(page, f"phone{tab[1:]}")
    small = (
        "[...document.querySelectorAll('button')].filter(b => b.offsetHeight && b.offsetHeight < 40).length"
    )
    assert page.evaluate(small) == 0 and problems == []


def test_a_fallback_is_said(browser: Any, service: Running) -> None:
    page, _ = opened(browser, service)
    page.fill("#query", "die keys")
    page.click("#go")
    page.wait_for_selector("#search-message.warning")
    assert "Not reranked: reranker failed" in page.inner_text("#search-message")
    assert page.locator("#hits > li").count() > 0
