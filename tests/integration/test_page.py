"""The page in a real browser, without a display, against a server with set answers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

from stitch_ray.reliability.cascade import replay
from stitch_ray.reliability.metrics import risk_coverage_curve
from tests import needs
from tests.serving.fake_gateway import FakeGateway, Fault, serving

TOKEN = "s3cret-t0ken-of-the-page"


@pytest.fixture(scope="module")
def browser() -> Iterator[BrowserContext]:
    found = needs.chromium()
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started.new_context()
        started.close()


def mounted(token: str | None = None) -> Callable[[FakeGateway], object]:
    """Puts the page on a gateway. Gradio takes seconds to import: not while tests are collected, in every process."""
    from serve_apps.page import mount_page

    return lambda gateway: mount_page(gateway.app, gateway.url, token, "Stitch")


@pytest.fixture(scope="module")
def running() -> Iterator[FakeGateway]:
    with serving(mounted(TOKEN), token=TOKEN) as gateway:
        yield gateway


@dataclass
class Opened:
    """`outside`: requests to other machines; `complaints`: errors and warnings of the console, and failed scripts."""

    page: Page
    gateway: FakeGateway
    outside: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def ask(self, question: str, context: str = "") -> None:
        self.page.locator("#question textarea").fill(question)
        self.page.locator("#context textarea").fill(context)
        self.page.evaluate("document.querySelector('#answer section').className = 'earlier'")
        self.page.get_by_role("button", name="Ask", exact=True).click()

    def card(self, kind: str) -> str:
        """The text of the card, which must be of this kind."""
        shown = self.page.locator(f"#answer .sr-card.{kind}")
        expect(shown).to_be_visible(timeout=20_000)
        return shown.inner_text()

    def show(self, accordion: str) -> None:
        if not self.page.locator(f"#{accordion} .sr-scroll, #{accordion} .cm-content").first.is_visible():
            self.page.locator(f"#{accordion} button").first.click()

    def tile(self, name: str) -> str:
        return self.page.locator(f"#tiles [data-value={name}]").inner_text()

    def threshold(self, value: str) -> None:
        number = self.page.locator("#threshold input[type=number]")
        number.fill(value)
        number.press("Enter")


@pytest.fixture(scope="module")
def loaded(browser: BrowserContext, running: FakeGateway) -> Opened:
    return _open(browser, running)


@pytest.fixture
def opened(loaded: Opened) -> Iterator[Opened]:
    """One page for all tests, since loading it takes seconds; no test changes what another relies on."""
    loaded.gateway.faults.clear()
    loaded.gateway.seen.clear()
    loaded.gateway.left.clear()
    loaded.gateway.hold.clear()
    yield loaded
    assert loaded.outside == []
    assert loaded.complaints == []


def _open(browser: BrowserContext, gateway: FakeGateway) -> Opened:
    page = browser.new_page()
    page.set_viewport_size({"width": 1200, "height": 1000})
    found = Opened(page, gateway)
    page.on("request", lambda request: _note_outside(found, request.url))
    page.on("console", lambda said: found.complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.goto(f"{gateway.url}/ui/")
    expect(page.locator("#tiles")).not_to_be_empty(timeout=60_000)
    return found


def _note_outside(found: Opened, url: str) -> None:
    if not url.startswith((found.gateway.url, "data:", "blob:")):
        found.outside.append(url)


def test_an_answer_has_its_confidence_and_the_page_its_promise(opened: Opened) -> None:
    opened.ask("Where is it?")
    card = opened.card("answer")
    assert "confidence 93 %" in card
    assert "at most 10 % of the answers given are wrong" in opened.page.locator(".sr-promise").inner_text()
    assert opened.page.locator("#dialogue li").count() == 0


def test_texts_of_models_are_texts_and_no_markup(opened: Opened) -> None:
    opened.ask("Where is it?")
    assert "Paris <b>not bold</b> ${1+1} {{value}}" in opened.card("answer")


def test_a_refined_answer_shows_what_each_turn_changed(opened: Opened) -> None:
    opened.ask("Who designed it?")
    assert "Garabit viaduct" in opened.card("answer")
    turns = opened.page.locator("#dialogue li")
    assert turns.count() == 4
    assert [turns.nth(place).locator(".unchecked").count() for place in range(4)] == [1, 1, 1, 1]
    assert turns.nth(1).locator("del").all_inner_texts() == ["bridge", "1884"]
    assert turns.nth(1).locator("ins").all_inner_texts() == ["viaduct", "1880"]
    assert "kept the answer" in turns.nth(3).inner_text()
    opened.show("steps")
    assert "mean_token_entropy" in opened.page.locator("#steps table").inner_text()


def test_an_abstention_gives_no_answer_and_says_why(opened: Opened) -> None:
    opened.ask("Will it rain?")
    card = opened.card("abstain")
    assert "No answer: no answer was sure enough." in card
    assert "Garabit" not in card


def test_while_nothing_is_decided_no_text_stands_as_an_answer(opened: Opened) -> None:
    opened.ask("Will it hold?")
    assert "working" in opened.card("waiting")
    opened.page.get_by_role("button", name="Stop", exact=True).click()
    assert "Ask a question." in opened.card("empty")
    deadline = time.monotonic() + 60
    while not opened.gateway.left and time.monotonic() < deadline:
        opened.page.wait_for_timeout(20)
    assert opened.gateway.left == ["/v1/predict"]  # the server was told


def test_the_slider_shows_what_the_metrics_say(opened: Opened) -> None:
    calibration = opened.gateway.calibration
    assert calibration is not None
    draft, loss, final, final_loss = calibration
    for threshold in (0.95, 0.7, 0.42):
        opened.threshold(str(threshold))
        expect(opened.page.locator("#tiles [data-value=threshold]")).to_have_text(f"{threshold:.3f}")
        ((accepted,), (losses,)) = replay(draft, loss, final, final_loss, [threshold])
        at = risk_coverage_curve(accepted * 1.0, losses)  # the surest group is what the threshold lets through
        assert opened.tile("coverage") == f"{100 * at.coverage[0]:.1f}".rstrip("0").rstrip(".") + " %"
        assert opened.tile("risk") == f"{100 * at.risk[0]:.1f}".rstrip("0").rstrip(".") + " %"
        assert np.isclose(at.coverage[0], accepted.mean())


def test_another_promise_is_asked_for_and_moves_the_slider(browser: BrowserContext, running: FakeGateway) -> None:
    opened = _open(browser, running)
    opened.page.locator("#risk input").click()
    opened.page.get_by_role("option", name=re.compile("at most 5 %")).click()
    expect(opened.page.locator("#tiles [data-value=threshold]")).to_have_text("0.900")
    assert "at most 5 %" in opened.page.locator(".sr-promise").inner_text()
    opened.ask("Where is it?")
    opened.card("answer")
    assert running.seen[-1]["body"]["target_risk"] == 0.05
    opened.page.close()


def test_commands_ask_the_same_without_the_token(opened: Opened) -> None:
    opened.ask("Where's it?", "It's in Paris")
    opened.card("answer")
    opened.show("commands")
    curl = opened.page.locator("#curl .cm-content")
    expect(curl).to_contain_text("It'\"'\"'s in Paris")
    assert f"{opened.gateway.url}/v1/predict" in curl.inner_text()
    assert "$STITCH_RAY_TOKEN" in curl.inner_text()
    assert "stitch-ray ask" in opened.page.locator("#cli .cm-content").inner_text()


def test_no_secret_is_in_anything_the_browser_gets(opened: Opened) -> None:
    texts: list[str] = []

    def keep(response: object) -> None:
        texts.append(response.text())  # type: ignore[attr-defined]

    for path in ("/ui/", "/ui/config", "/ui/gradio_api/info"):
        keep(opened.page.request.get(f"{opened.gateway.url}{path}"))
    opened.ask("Where is it?")
    opened.card("answer")
    assert opened.gateway.seen[-1]["headers"]["authorization"] == f"Bearer {TOKEN}"
    assert all(TOKEN not in text for text in [*texts, opened.page.content()])


@pytest.mark.parametrize(
    ("fault", "words"),
    [(Fault(status=504), "no answer in time"), (Fault(status=422), "does not take this question"),
     (Fault(status=500), "The server failed")],
)  # fmt: skip
def test_errors_are_told_in_words(opened: Opened, fault: Fault, words: str) -> None:
    opened.gateway.faults[:] = [fault]
    opened.ask("Where is it?")
    assert words in opened.card("error")


def test_it_works_by_keyboard_alone(opened: Opened) -> None:
    opened.page.evaluate("document.querySelector('#answer section').className = 'earlier'")
    opened.page.locator("#question textarea").fill("")
    opened.page.locator("#question textarea").focus()
    opened.page.keyboard.type("Where does it stand?")
    opened.page.keyboard.press("Enter")
    opened.card("answer")
    assert [asked["body"]["question"] for asked in opened.gateway.seen] == ["Where does it stand?"]


@pytest.mark.parametrize("width", [1200, 420])
def test_nothing_is_wider_than_the_window(opened: Opened, width: int) -> None:
    opened.page.set_viewport_size({"width": width, "height": 900})
    opened.ask("Who designed it?")
    opened.card("answer")
    opened.show("steps")
    opened.show("commands")
    expect(opened.page.locator("#cli .cm-content")).to_be_visible()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_policy_without_its_calibration_answers_has_no_slider(browser: BrowserContext) -> None:
    with serving(mounted(), calibration=None) as gateway:
        opened = _open(browser, gateway)
        expect(opened.page.locator("#tiles")).to_contain_text("without its calibration answers")
        expect(opened.page.locator("#threshold input[type=number]")).to_be_disabled()
        expect(opened.page.locator("#plot svg")).to_have_count(0)
        opened.page.close()


def test_tasks_with_promises_of_their_own_can_be_chosen(browser: BrowserContext) -> None:
    with serving(mounted()) as gateway:
        own = {**gateway.policy["targets"][0], "task": "art", "target_risk": 0.2, "threshold": 0.5}
        gateway.policy["targets"].append(own)
        opened = _open(browser, gateway)
        opened.page.locator("#task input").click()
        opened.page.get_by_role("option", name="art").click()
        promise = opened.page.locator(".sr-promise")
        expect(promise).to_contain_text("at most 20 % of the answers given to questions of task 'art'")
        opened.ask("Where is it?")
        opened.card("answer")
        asked = gateway.seen[-1]["body"]
        assert (asked["task"], asked["target_risk"]) == ("art", 0.2)
        opened.page.close()
