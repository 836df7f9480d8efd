"""report.html in a real browser: it fits a phone and a desk, can be read in the dark, and asks nobody for anything."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from finllm import assessment, predictions, report
from finllm.example import LABELS, Example
from finllm.machine import Machine
from finllm.plan import Rows, decide
from finllm.predictions import Answers
from finllm.recipe import Recipe
from finllm.report import Facts
from finllm.run import Run, create
from finllm.scores import Check, Missing

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

LONG = "https://example.com/" + "x" * 300
"""A word that nothing breaks."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A report with every section: bands, seen rows, mixed signals, a missing system, odd texts."""
    run = create(tmp_path_factory.mktemp("runs"), "everything")
    draw = np.random.default_rng(0)
    rows = [
        Example(
            f"phrasebank:{n}", "phrasebank", f"{LONG} <b>&amp; `code` | *stars* {n}" if n % 50 == 0 else f"text {n}",
            LABELS[n % 3], "validation" if n < 60 else "test", agreement=("100", "75-99", "66-75", "50-66")[n % 4],
            source="news", careless=LABELS[(n + 1) % 3] if n % 9 == 0 or n % 50 == 0 else None, seen_by=("prosus",) if n % 5 else (),
        )
        for n in range(300)
    ]  # fmt: skip

    def answers(key: str, weight: float, **more: object) -> Answers:
        table = draw.dirichlet([1, 1, 1], 300)
        table[np.arange(300), [LABELS.index(e.label) for e in rows]] += weight * draw.random(300)
        table /= table.sum(axis=1, keepdims=True)
        return Answers(key, f"the {key} system", 2.0, predictions.of(rows, table), latency_ms=12.0, **more)  # type: ignore[arg-type]

    found = [answers(key, weight) for key, weight in (("tuned", 2.0), ("base", 0.2), ("majority", 0.0), ("tfidf", 1.0))]
    found.append(answers("finbert", 2.0, marks=("has seen phrasebank: some",), saw="prosus"))
    missing = Missing(key="finbert-tone", name="yiyanghkust/finbert-tone", why="no network")
    check = Check(name="batch", passed=False, found="0.5 nats")
    scores = assessment.score(found, 200, 0, parts=["test"], missing=[missing], checks=[check])
    recipe = Recipe.model_validate({"model": "smollm2-135m", "data": "phrasebank", "train": {"method": "sft"}})
    counts = Rows(train=100, validation=60, test=240)
    plan = decide(recipe, here=Machine((), 2), rows=counts, folder=run.folder, source="demo.yaml")
    curve = tuple((step, 1 / step) for step in range(1, 40))
    facts = Facts(rows={"phrasebank": counts}, curves={"train/loss": curve, "validation/accuracy": curve[::10]})
    report.write(run, scores, plan, facts)
    return run


@pytest.fixture(params=[(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")], ids=str)
def page(request: pytest.FixtureRequest, browser: "Browser", written: Run) -> "Iterator[Page]":
    """The page as a phone or a desk shows it, every fold opened; a request that leaves it fails."""
    width, scheme = request.param
    opened = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    opened.goto(written.report.with_suffix(".html").as_uri())
    opened.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    yield opened
    opened.close()


OVERFLOWING = """() => [...document.querySelectorAll('body *')].filter(e => {
  if (e.closest('.wide table') || e.closest('svg')) return false;
  const box = e.getBoundingClientRect();
  return box.width > 0 && (box.right > innerWidth + 1 || box.left < -1);
}).map(e => e.tagName + ' ' + e.textContent.slice(0, 40))"""


def test_nothing_is_wider_than_the_screen(page: "Page") -> None:
    """Wide tables scroll within their frames; text, pictures and headings fit, a word of 300 letters too."""
    assert page.evaluate("document.documentElement.scrollWidth") <= page.evaluate("innerWidth")
    assert page.evaluate(OVERFLOWING) == []
    assert page.locator("figure svg").count() >= 7
    assert page.evaluate("Math.min(...[...document.querySelectorAll('figure svg')].map(e => e.clientWidth))") > 250


CONTRAST = """() => {
  const channel = c => { c /= 255; return c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4; };
  const light = text => { const [r, g, b] = text.match(/\\d+/g).map(Number);
    return .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b); };
  const back = light(getComputedStyle(document.body).backgroundColor);
  const ratio = e => { const own = light(getComputedStyle(e).color);
    return (Math.max(own, back) + .05) / (Math.min(own, back) + .05); };
  return Math.min(...[...document.querySelectorAll('p, td, th, a, summary, figcaption, figure svg')].map(ratio));
}"""


def test_text_and_figures_can_be_read_in_light_and_dark(page: "Page") -> None:
    """Contrast of at least 4.5 to 1 (WCAG 2.2, AA); lines and letters of figures have the colour of the text."""
    assert page.evaluate(CONTRAST) >= 4.5
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)") == dark
    inks = page.evaluate(
        "[...document.querySelectorAll('figure svg text')].map(e => getComputedStyle(e).fill)"
        ".filter(c => c == getComputedStyle(document.body).color).length"
    )
    assert inks > 30


def test_texts_of_the_data_are_shown_as_they_are(page: "Page") -> None:
    """Markup in a text is text."""
    assert page.locator("td b").count() == 0
    assert page.locator("td", has_text="<b>&amp; `code` | *stars*").count() >= 1


def test_the_page_asks_nobody_for_anything(browser: "Browser", written: Run, tmp_path: Path) -> None:
    """One request, for the page itself, and no error in its console; a page with a picture from elsewhere is seen."""

    def visited(path: Path) -> tuple[list[str], list[str]]:
        context = browser.new_context()
        opened = context.new_page()
        asked: list[str] = []
        said: list[str] = []
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("console", lambda message: said.append(message.text))
        opened.goto(path.as_uri(), wait_until="load")
        opened.wait_for_timeout(200)
        context.close()
        return [url for url in asked if not url.startswith("data:")], said

    html = written.report.with_suffix(".html")
    assert visited(html) == ([html.as_uri()], [])
    leaking = tmp_path / "leaking.html"
    leaking.write_text('<img src="http://127.0.0.1:9/x.png">')
    assert len(visited(leaking)[0]) == 2
    assert "http" not in html.read_text().split("</style>")[0].replace("http-equiv", "")


def test_every_link_within_the_page_leads_somewhere(page: "Page") -> None:
    """Contents and references; other links name files of the run folder."""
    anchors = page.evaluate(
        "[...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.getAttribute('href').slice(1))"
    )
    assert len(anchors) >= 8
    assert page.evaluate("ids => ids.filter(id => !document.getElementById(id))", anchors) == []
