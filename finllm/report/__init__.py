"""The report of one run: a pure function of its scores, its plan, and what happened on the way."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from finllm.figures import three
from finllm.files import read_model, write_json, write_text
from finllm.plan import Plan, Rows
from finllm.published import tables as published
from finllm.report import charts, document
from finllm.report.charts import Chart
from finllm.report.document import Block, Details, Heading, Lead, Picture, Table, Text
from finllm.report.parts import part, without_width
from finllm.report.settings import data, repeat, settings
from finllm.report.verdict import names_of, verdict, verdicts
from finllm.report.words import interval
from finllm.run import Run
from finllm.scores import Scores, System
from finllm.yamlfile import Spec

if TYPE_CHECKING:
    from rich.table import Table as TerminalTable

__all__ = ["Facts", "blocks", "charts_of", "markdown", "page", "table", "verdict", "write"]

HOW_TO_READ = (
    "Brackets hold 95 % intervals: percentiles of {draws:,} bootstrap draws (seed {seed}) of whole groups of near twins. "
    "Macro-F1 is the mean F1 of the classes that occur, weighted F1 the mean weighted by their texts, MCC the "
    "correlation of Matthews. A difference is measured on the same rows and the same draws for both systems. It is "
    "*not decided* where its interval holds 0, or McNemar's exact test, corrected by Holm for the number of "
    "comparisons, gives p of 0.05 or more. Intervals are not corrected, and say nothing about other training seeds or "
    "other data."
)
CALIBRATION = (
    "NLL is the mean negative log-probability of the gold label; the ECE of few texts is too high on average. A "
    "temperature was fitted on validation texts alone, and changes no answer. Risk is the share of wrong answers among "
    "those that are more confident than the rest; AURC is its mean over all coverages."
)
SEEN = "† has seen texts that it is tested on: its figures say how well it remembers, too."
NO_WIDTH = (
    "An interval without width belongs to a system that was right, or wrong, on every row: the draws cannot differ "
    "then, and the interval understates what is not known."
)

SHORTEST_SECONDS = 0.05
"""Below this a pace means nothing."""


class Facts(Spec):
    """What neither the plan nor the scores know; kept in facts.json."""

    rows: dict[str, Rows] = Field(default_factory=dict)
    """Examples of each data set in each part, as they were used."""
    training: dict[str, str] = Field(default_factory=dict)
    """What happened in training, by name, in words: `steps: 120 of 120`."""
    notes: tuple[str, ...] = ()
    """Sentences about the data, such as which rows were left out."""
    curves: dict[str, tuple[tuple[int, float], ...]] = Field(default_factory=dict)
    """Steps and values of figures, by name: `train/loss`."""

    def save(self, run: Run) -> None:
        """Write facts.json."""
        write_json(run.folder / "facts.json", self.model_dump(mode="json"))

    @classmethod
    def of(cls, run: Run) -> "Facts":
        """The facts of a run folder; raises RunError where it has none."""
        return read_model(run.folder / "facts.json", cls)


def blocks(scores: Scores, plan: Plan, facts: Facts) -> list[Block]:
    """What the report of a run says, in order."""
    curves = charts.training(facts.curves)
    systems: list[Block] = [block for one in scores.parts for block in part(one, scores)]
    return [
        Heading(plan.name, 1),
        Text(" ".join(f"{one.rstrip('.')}." for one in (plan.recipe.purpose, _what(plan)) if one)),
        Lead(verdicts(scores)),
        *_doubts(scores),
        Heading("Results"),
        Text("Per cent, with 95 % intervals in brackets ([how to read them](#how-to-read-the-figures))."),
        *systems,
        *([Heading("Training")] if facts.training or curves else []),
        *([Picture(curves.name, curves.svg, curves.caption)] if curves else []),
        *([Table(("what", "value"), list(facts.training.items()))] if facts.training else []),
        Heading("Speed"),
        speed(scores),
        *checks(scores),
        *_published(plan),
        Heading("Settings"),
        Table(("setting", "value"), list(settings(plan).items())),
        Heading("Data"),
        data(plan, facts.rows),
        *(Text(note) for note in facts.notes),
        Heading("To repeat it"),
        *repeat(plan),
        *how_to_read(scores),
    ]


def _what(plan: Plan) -> str:
    """Model, method, data and date, in a line."""
    recipe = plan.recipe
    how = "as it is" if recipe.train is None else f"trained by {recipe.train.method.upper()}"
    return (
        f"{recipe.model.name}, {how}, on {', '.join(spec.title for spec in recipe.data)}; planned {plan.created[:10]}"
    )


def _doubts(scores: Scores) -> list[Block]:
    """The checks that do not hold, where a reader begins."""
    failed = [check.name for check in scores.checks if not check.passed]
    if not failed:
        return []
    return [Text(f"**Read with care:** of the [checks](#checks), these do not hold: {'; '.join(failed)}.")]


def markdown(scores: Scores, plan: Plan, facts: Facts) -> str:
    """The text of report.md; its links are relative to the run folder."""
    return document.markdown(blocks(scores, plan, facts))


def page(scores: Scores, plan: Plan, facts: Facts) -> str:
    """The text of report.html, complete in itself."""
    return document.page(plan.name, blocks(scores, plan, facts))


def write(run: Run, scores: Scores, plan: Plan, facts: Facts) -> None:
    """Leave report.md with its figures, and report.html, in the run folder."""
    put(run, plan.name, blocks(scores, plan, facts))


def put(run: Run, title: str, made: Sequence[Block]) -> None:
    """Write a document in both forms, and its figures as files, into a folder."""
    figures = run.folder / "figures"
    figures.mkdir(exist_ok=True)
    for picture in document.pictures(made):
        write_text(figures / f"{picture.name}.svg", picture.svg.replace("currentColor", "#6e7781"))
    write_text(run.report, document.markdown(made))
    write_text(run.page, document.page(title, made))


def charts_of(scores: Scores, facts: Facts) -> list[Chart]:
    """Every figure of the report."""
    curves = charts.training(facts.curves)
    return [*([curves] if curves else []), *(chart for one in scores.parts for chart in charts.of_part(one))]


def table(scores: Scores) -> "TerminalTable":
    """Every system on every part, for a terminal of 80 columns."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(
        box=None, pad_edge=False, header_style="bold", caption="per cent [95 % interval]", caption_justify="left"
    )
    for column in ("", "accuracy", "macro-F1", "weighted F1"):
        shown.add_column(column, overflow="fold")
    for one in scores.parts:
        shown.add_row(Text(f"{one.dataset} {one.part} ({one.rows:,})"), style="bold")
        for key, m in one.systems.items():
            figures = (interval(figure).replace(", ", ",") for figure in (m.accuracy, m.macro_f1, m.weighted_f1))
            shown.add_row(*map(Text, (f"  {key}", *figures)))
    for missing in scores.missing:
        shown.add_row(Text(f"  {missing.key}"), "not available")
    return shown


def how_to_read(scores: Scores) -> list[Block]:
    """What brackets, tests and marks mean."""
    seen = any(name.endswith("†") for name in names_of(scores).values())
    flat = without_width(m.accuracy for one in scores.parts for m in one.systems.values())
    said = [HOW_TO_READ.format(draws=scores.draws, seed=scores.seed), CALIBRATION]
    return [
        Heading("How to read the figures"),
        *map(Text, [*said, *([SEEN] if seen else []), *([NO_WIDTH] if flat else [])]),
    ]


def speed(scores: Scores) -> Table:
    """Throughput and latency of every system."""
    return Table(("system", "texts", "seconds", "texts a second", "ms for one text"), [*map(_speed, scores.systems)])


def _speed(system: System) -> tuple[str, ...]:
    pace = three(system.texts_per_second) if system.seconds >= SHORTEST_SECONDS else ""
    alone = "" if system.latency_ms is None else three(system.latency_ms)
    return system.key, f"{system.texts:,}", f"{system.seconds:.1f}", pace, alone


def checks(scores: Scores) -> list[Block]:
    """What must hold for the figures to mean what they say."""
    if not scores.checks:
        return []
    rows = [(check.name, "yes" if check.passed else "NO", check.found) for check in scores.checks]
    return [Heading("Checks"), Table(("check", "holds", "found"), rows)]


def _published(plan: Plan) -> list[Block]:
    """Figures that others have published for the data sets of the run, under protocols of their own."""
    found = published([spec.name for spec in plan.recipe.data])
    if not found:
        return []
    told: list[Block] = [
        Text(
            "**Not measured here.** Other splits, other tests and sometimes other labels: these figures cannot be "
            "compared row by row with those above. What is known of each protocol stands beside it."
        )
    ]
    for title, rows in found.items():
        told += [Text(f"{title}:"), Table(("system", "accuracy", "F1", "protocol", "source"), rows)]
    return [Heading("Published figures"), Details("What others have published on these data sets", told)]
