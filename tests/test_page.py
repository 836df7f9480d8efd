"""The page in a real browser, with a really trained tiny model behind it."""

import csv
import io
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from finllm import SentimentPredictor
from finllm.run import Run
from launch import page_text

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow
TEXT = "Profits today. Orders at <b>Ardent & Co</b> doubled from $4 to $8."
LONG_SECONDS = 240
LONG_MS = 1000 * LONG_SECONDS
"""For the page to start, and for the first answer, for which the model has to be loaded; on a machine that is busy."""


@pytest.fixture(scope="module")
def demo() -> Iterator[Callable[..., str]]:
    """Starts `finllm demo` and returns its address."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [str(Path(sys.executable).with_name("finllm")), "demo", *arguments, "--port", str(port)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL))
        for _ in range(10 * LONG_SECONDS):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health").close()
                return f"http://127.0.0.1:{port}"
            except urllib.error.URLError:
                assert started[-1].poll() is None, "finllm demo has ended"
                time.sleep(0.1)
        raise TimeoutError("finllm demo does not answer")

    yield start
    for process in started:
        process.kill()
        process.wait(LONG_SECONDS)


@pytest.fixture(scope="module")
def address(demo: Callable[..., str], tiny_run: Run) -> str:
    return demo(str(tiny_run.folder))


def patient(browser: "Browser", width: int, height: int) -> "Page":
    """A page that waits as long as a busy machine needs."""
    opened = browser.new_page(viewport={"width": width, "height": height})
    opened.set_default_timeout(LONG_MS)
    return opened


@pytest.fixture
def page(browser: "Browser", address: str) -> "Iterator[Page]":
    """The page on a desktop, ready for a text."""
    opened = patient(browser, 1280, 900)
    opened.goto(address)
    opened.get_by_label("Text", exact=True).wait_for()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def predictor(tiny_run: Run) -> SentimentPredictor:
    return SentimentPredictor(tiny_run.folder, device="cpu")


def classify(page: "Page", text: str) -> None:
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_role("button", name="Classify", exact=True).click()


def cards(page: "Page") -> list[list[str]]:
    """The lines of each card, once both have come; what the page says instead, where they do not."""
    from playwright.sync_api import TimeoutError as TooLate

    try:
        page.locator(".fl-card").nth(1).wait_for()
    except TooLate:
        pytest.fail(f"no cards on the page, which says: {page.locator('body').inner_text()}")
    return [card.inner_text().splitlines() for card in page.locator(".fl-card").all()]


def test_a_text_is_answered_by_the_tuned_model_and_its_base(page: "Page", predictor: SentimentPredictor) -> None:
    """Label and three probabilities as `predict` gives them, and those of the model before training."""
    classify(page, TEXT)
    tuned, base = cards(page)
    right = predictor.predict(TEXT)
    with predictor.model.disable_adapter():
        before = predictor.predict(TEXT)
    assert right["probabilities"] != before["probabilities"]
    for card, who, answer in ((tuned, "tiny", right), (base, "its base, before training", before)):
        assert card[:2] == [who, f"{answer['sentiment'].capitalize()} {answer['confidence']:.0%}"]
        shown = dict(zip(card[2::2], card[3::2], strict=True))
        assert shown == {label: f"{share:.1%}" for label, share in answer["probabilities"].items()}
    assert page.locator(".fl-text").inner_text() == TEXT
    assert page.locator(".fl-text b").count() == 0


def test_nothing_is_asked_for_an_empty_text(page: "Page") -> None:
    """A word instead, and no answer."""
    classify(page, "   ")
    page.get_by_text("There is no text to classify").wait_for()
    assert page.locator(".fl-card").count() == 0


def test_examples_explanations_and_history(page: "Page") -> None:
    """A click on an example answers it; another one explains it; what was asked before stays below."""
    page.get_by_role("button", name="Revenue missed expectations").click()
    cards(page)
    page.get_by_role("button", name="Explain").click()
    page.locator(".fl-why").wait_for()
    assert len(page.locator(".fl-why").inner_text()) > 0
    classify(page, TEXT)
    page.locator(".fl-past").wait_for()
    assert "Revenue missed expectations" in page.locator(".fl-past").inner_text()
    page.get_by_role("button", name="Clear").click()
    page.locator(".fl-past").wait_for(state="detached")


def upload(page: "Page", name: str, content: bytes) -> None:
    page.get_by_role("tab", name="A CSV file").click()
    page.locator("input[type=file]").set_input_files({"name": name, "mimeType": "text/csv", "buffer": content})


def test_a_csv_file_comes_back_with_probabilities(page: "Page", predictor: SentimentPredictor) -> None:
    """Every row as it was, with the answers of `predict`; rows without a text without an answer."""
    texts = [f"Losses today. Plant {i} closed, costs up." for i in range(150)]
    rows = [["id", "headline"], *([str(i), text] for i, text in enumerate(texts)), ["150", ""]]
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    upload(page, "news.csv", out.getvalue().encode())
    page.get_by_text("151 rows, 1 of them without a text").wait_for()
    page.get_by_role("button", name="Classify all").click()
    button = page.get_by_role("button", name="Download with probabilities")
    button.wait_for()
    with page.expect_download() as download:
        button.click()
    assert download.value.suggested_filename == "news-answered.csv"
    given = list(csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"), newline="")))
    assert given[0] == ["id", "headline", "sentiment", "confidence", "p_negative", "p_neutral", "p_positive"]
    for row, text, right in zip(given[1:-1], texts, predictor.predict(texts), strict=True):
        assert row[1:3] == [text, right["sentiment"]]
        assert [float(cell) for cell in row[4:]] == pytest.approx(list(right["probabilities"].values()), abs=1e-5)
    assert given[-1] == ["150", "", "", "", "", "", ""]


def test_a_bad_csv_file_is_refused_in_words(page: "Page") -> None:
    """What is wrong and what to do, and no button to go on; a good file after it works."""
    upload(page, "bad.csv", b"id,text\n1,Profits rose, costs fell\n")
    page.get_by_text("put texts with commas in quotes").wait_for()
    assert page.get_by_role("button", name="Classify all").count() == 0


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(browser: "Browser", address: str, width: int) -> None:
    """On a phone and on a desktop, with a text of one endless word."""
    page = patient(browser, width, 844)
    page.goto(address)
    page.get_by_label("Text", exact=True).wait_for()
    classify(page, "Profits" * 60)
    cards(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    edges = [card.bounding_box() for card in page.locator(".fl-card").all()]
    assert all(box is not None and box["x"] >= 0 and box["x"] + box["width"] <= width for box in edges)
    page.close()


def test_without_a_run_the_page_offers_what_there_is(
    browser: "Browser", demo: Callable[..., str], tiny_run: Run
) -> None:
    """Trained runs, and the embedded model with a word that it is not trained; a chosen run is then asked."""
    page = patient(browser, 1280, 900)
    page.goto(demo("--runs", str(tiny_run.folder.parent)))
    page.get_by_role("button", name="Use the untrained model").wait_for()
    assert page.get_by_text("it was not trained for this").is_visible()
    page.get_by_role("button", name="Use this run").click()
    page.get_by_text("as tiny reads it").wait_for()
    page.get_by_label("Text", exact=True).wait_for()
    assert page.get_by_text("Zero-shot").count() == 0
    page.close()


class Soon(Future[list[Any]]):
    """An answer that has come when it has been asked for so often."""

    def __init__(self, asked: int) -> None:
        super().__init__()
        self.left = asked

    def done(self) -> bool:
        """Whether it has come; asking brings it nearer."""
        if not super().done():
            self.left -= 1
            if self.left < 0:
                share = {"negative": 0.1, "neutral": 0.2, "positive": 0.7}
                self.set_result([{"sentiment": "positive", "confidence": 0.7, "probabilities": share}])
                return False
        return super().done()


@pytest.mark.parametrize("asked", [0, 1])
def test_an_answer_that_comes_while_the_page_is_drawn_is_shown(asked: int) -> None:
    """Or else it would say that the model is reading, and never look again."""
    from streamlit.testing.v1 import AppTest

    script = "import streamlit as st; from launch import page_text; page_text.show(st.session_state.model)"
    app = AppTest.from_string(script)
    reader = SimpleNamespace(name="tiny", has_base=False, base_explains=False)
    app.session_state.model = SimpleNamespace(reader=reader, tested=SimpleNamespace(of_like=lambda _: ""))
    app.session_state.history = [page_text.Entry(TEXT, SimpleNamespace(future=Soon(asked)))]
    app.run()
    assert not app.exception
    assert [caption.value for caption in app.caption] == []
    assert any("fl-card" in str(element.proto) for element in app.get("html"))
