"""The page at `/`, in a real browser: Chromium by Playwright, on a wide window and on a phone's."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import KEY, Served, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HTML = "<img src=x onerror='document.title=`run`'><b>bold</b>"
AXES = ["helpful", "harmless", "honest"]


@pytest.fixture(scope="module")
def served(saved_aligned: Path) -> Iterator[Served]:
    with serving(saved_aligned, slots=4) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as engine:
        started = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=[1280, 400])
def page(request: pytest.FixtureRequest, browser: Any, served: Served) -> Iterator[Any]:
    opened = browser.new_page(viewport={"width": request.param, "height": 800})
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.set_default_timeout(20_000)
    opened.goto(served.url)
    opened.wait_for_selector("h1:has-text('this server needs its API key')")  # the settings are then open
    opened.fill("#key", KEY)
    opened.press("#key", "Tab")
    opened.fill("#tokens", "8")
    opened.wait_for_selector("h1:text-is('tiny')")
    yield opened
    assert opened.evaluate("document.documentElement.scrollWidth") == request.param  # nothing hangs over
    assert not errors
    opened.close()


def ask(page: Any, prompt: str) -> Any:
    """The answer's turn."""
    turns = page.locator(".assistant").count()
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    turn = page.locator(".assistant").nth(turns)
    turn.locator(".below button").wait_for()
    return turn


def shown_gates(turn: Any) -> dict[str, float]:
    texts = turn.locator(".gates > span").all_inner_texts()
    return {name: float(gate) for name, gate in zip(texts[::2], texts[1::2], strict=True)}


def test_one_chats_and_sees_the_gates_and_every_expert(page: Any, served: Served) -> None:
    prompt = "what colour is the zoleb ?"
    turn = ask(page, prompt)
    expected = served.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=8
    )
    assert turn.locator(".text").inner_text() == expected.choices[0].message.content
    assert shown_gates(turn) == {name: pytest.approx(gate, abs=0.01) for name, gate in expected.alignx["gates"].items()}  # type: ignore[attr-defined]
    widths = turn.locator(".bar > div").evaluate_all("bars => bars.map((bar) => bar.style.width)")
    assert [float(width.rstrip("%")) / 100 for width in widths] == pytest.approx(list(shown_gates(turn).values()))
    turn.locator(".below button").click()
    page.locator("#send").wait_for()
    assert turn.locator(".experts h3").all_inner_texts() == ["base model", *AXES]
    said = turn.locator(".experts .text").all_inner_texts()
    assert expected.choices[0].message.content in said and len(set(said)) == 4
    second = ask(page, "and why ?").locator(".text").inner_text()
    alone = served.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "and why ?"}], temperature=0, max_tokens=8
    )
    assert second != alone.choices[0].message.content  # the turns before it were sent too


def test_sliders_choose_the_axes(page: Any) -> None:
    page.locator("#axis-honest").fill("0.5")
    assert page.is_checked("#overrule")
    assert shown_gates(ask(page, "hello")) == {"generalist": 0.5, "helpful": 0.0, "harmless": 0.0, "honest": 0.5}
    page.uncheck("#overrule")
    assert shown_gates(ask(page, "hello"))["generalist"] != 0.5


def test_what_people_and_models_write_is_shown_as_text(page: Any) -> None:
    chunk = {"choices": [{"delta": {"content": HTML}}], "alignx": {"gates": {HTML: 1}, "confidence": 1, "distance": 1}}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    turn = ask(page, HTML)
    assert turn.locator(".text").inner_text() == page.locator(".user .text").inner_text() == HTML
    assert not page.locator("main img, main b").count() and page.title() == "tiny"


def test_an_error_is_shown_and_the_chat_goes_on(page: Any) -> None:
    page.fill("#tokens", "1000")
    assert "the answer may have 1000" in ask(page, "hello").locator(".wrong").inner_text()
    page.fill("#tokens", "8")
    assert ask(page, "hello").locator(".text").inner_text()
    page.click("#new")
    assert not page.locator(".turn").count()


def test_it_loads_nothing_from_elsewhere(served: Served) -> None:
    with urllib.request.urlopen(served.url) as answer:
        text, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert not re.search(r"https?://|src=|@import|url\(|innerHTML|insertAdjacentHTML", text)
    assert "default-src 'none'" in policy and "unsafe" not in policy
