"""Figures of the report, by matplotlib: the same colour and mark for a system in all of them, colour-blind safe.

Colours are those of Okabe & Ito (2008, "Color Universal Design"), less the yellow that white paper swallows.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from finllm.calibration import COVERAGE
from finllm.example import LABELS
from finllm.scores import Interval, Metrics, PartScores, ReliabilityBin

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C", "#7F5AA8")
MARKS = "osD^vPX*"
LINES = ("-", "--", "-.", ":")
INK = "#010203"
"""Stands for the colour of the page's text."""
AGREEMENT = {"100": (1.0, 1.0), "75-99": (0.75, 0.99), "66-75": (0.66, 0.75), "50-66": (0.5, 0.66)}
"""Ends of each band: the share of annotators who gave the label."""
MOST_MATRICES = 4
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": INK,
    "grid.alpha": 0.15, "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.6,
    "lines.markersize": 4.5, "svg.fonttype": "none", "figure.constrained_layout.use": True,
}  # fmt: skip
WIDTH = 4.4
"""Inches; a phone shows them in about their own size."""

Curve = Sequence[tuple[int, float]]
"""Steps and values."""
P = ParamSpec("P")
T = TypeVar("T")


def _styled(draw: Callable[P, T]) -> Callable[P, T]:
    """The function, drawing in STYLE."""

    @wraps(draw)
    def styled(*args: P.args, **more: P.kwargs) -> T:
        import matplotlib as mpl

        with mpl.rc_context(STYLE):
            return draw(*args, **more)

    return styled


@dataclass(frozen=True)
class Chart:
    """One figure."""

    name: str
    caption: str
    figure: Any

    @property
    def svg(self) -> str:
        """As a part of a page: it takes the page's colour and width, and needs no font."""
        import matplotlib as mpl

        stream = io.StringIO()
        with mpl.rc_context({**STYLE, "svg.hashsalt": self.name}):
            self.figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        text = stream.getvalue()
        text = text[text.index("<svg") :].replace(INK, "currentColor")
        text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
        label = re.sub(r"[<>&\"*`]", "", self.caption)
        return re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{label}"', text, count=1).replace(
            ' height="' + _height(text) + '"', "", 1
        )

    @property
    def png(self) -> bytes:
        """As a picture on white."""
        import matplotlib as mpl

        stream = io.BytesIO()
        with mpl.rc_context(STYLE):
            self.figure.savefig(stream, format="png", dpi=144, facecolor="white")
        return stream.getvalue()


def _height(svg: str) -> str:
    found = re.search(r'<svg[^>]*? height="([^"]*)"', svg)
    return found[1] if found else ""


def of_part(part: PartScores) -> Iterator[Chart]:
    """Every figure of one part: bands, confusion, reliability, risk and coverage."""
    if any(s.by == "agreement" for s in part.slices):
        yield bands(part)
    yield risk_coverage(part)
    yield reliability(part)
    for key in list(part.systems)[:MOST_MATRICES]:
        yield confusion(part, key)


@_styled
def training(curves: Mapping[str, Curve]) -> Chart | None:
    """Loss and validation figures over the steps; None where nothing was trained."""
    losses = {name: curve for name, curve in curves.items() if name.endswith("/loss") and curve}
    shares = {name: curve for name, curve in curves.items() if name.startswith("validation/") and name not in losses}
    if not losses:
        return None
    figure, axes = _figure(3.6 if shares else 2.4, rows=2 if shares else 1)
    for panel, group, label in ((0, losses, "loss, nats a label"), (1, shares, "validation, %")):
        for number, (name, curve) in enumerate(group.items()):
            steps, values = zip(*curve, strict=True)
            heights = values if panel == 0 else [100 * v for v in values]
            mark = "o" if name.startswith("validation") else ""
            axes[panel].plot(steps, heights, color=COLOURS[number + 2 * panel], marker=mark, label=_words(name))
        if group:
            axes[panel].set_ylabel(label)
            axes[panel].legend()
    axes[-1].set_xlabel("step")
    return Chart("training", "Training: loss of each step, and what validation says.", figure)


@_styled
def confusion(part: PartScores, key: str) -> Chart:
    """Answers to the texts of each gold label."""
    figure, (axes,) = _figure(2.9)
    table = part.systems[key].confusion
    shares = [[count / max(sum(line), 1) for count in line] for line in table]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.grid(visible=False)
    for row, line in enumerate(table):
        for column, count in enumerate(line):
            share = shares[row][column]
            colour = "#ffffff" if share > 0.55 else "#1b1f24"
            axes.text(column, row, f"{count}\n{100 * share:.0f} %", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(LABELS)), LABELS)
    axes.set_yticks(range(len(LABELS)), LABELS, rotation=90, va="center")
    axes.set(xlabel="answer", ylabel="gold", title=key)
    return Chart(
        _name(part, f"confusion-{key}"), f"Confusion of **{key}**: texts, and their share of the gold label.", figure
    )


@_styled
def reliability(part: PartScores) -> Chart:
    """Accuracy of answers of like confidence: on the diagonal, confidence can be believed."""
    figure, (axes,) = _figure(3.6)
    axes.plot([33, 100], [33, 100], color=INK, alpha=0.5, linewidth=1)
    first, *others = part.systems
    shown: list[tuple[str, Sequence[ReliabilityBin]]] = [(first, part.calibration[first].bins)]
    softened = part.calibration[first].softened
    if softened is not None:
        shown.append((f"{first}, temperature {softened.temperature:.2f}", softened.bins))
    if "base" in others:
        shown.append(("base", part.calibration["base"].bins))
    for number, (label, bins) in enumerate(shown):
        axes.plot([100 * b.confidence for b in bins], [100 * b.accuracy for b in bins], label=label, **_look(number))
        most = max(b.rows for b in bins)
        sizes = [6 + 110 * b.rows / most for b in bins]
        xy = [100 * b.confidence for b in bins], [100 * b.accuracy for b in bins]
        axes.scatter(*xy, s=sizes, color=COLOURS[number], alpha=0.35, linewidths=0)
    axes.set(xlabel="confidence, %", ylabel="accuracy, %", xlim=(30, 102), ylim=(-3, 103))
    figure.legend(loc="outside upper left", ncols=2)
    return Chart(_name(part, "reliability"), "Reliability: larger discs hold more texts.", figure)


@_styled
def risk_coverage(part: PartScores) -> Chart:
    """Error rate among the most confident answers, for every system."""
    figure, (axes,) = _figure(3.6)
    for number, (key, one) in enumerate(part.calibration.items()):
        look = {**_look(number), "marker": ""}
        axes.plot([100 * c for c in one.coverage], [100 * r for r in one.risk], label=key, **look)
    axes.axvline(100 * COVERAGE, color=INK, alpha=0.4, linewidth=0.8)
    axes.set(xlabel="texts answered, the most confident first, %", ylabel="wrong among them, %", xlim=(0, 100))
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper left", ncols=3)
    caption = "Risk and coverage: what leaving out doubtful answers gains; the line marks 80 %."
    return Chart(_name(part, "risk-coverage"), caption, figure)


@_styled
def bands(part: PartScores) -> Chart:
    """Accuracy where annotators agreed more or less, beside their own agreement."""
    figure, (axes,) = _figure(3.6)
    slices = [s for s in part.slices if s.by == "agreement"]
    keys = list(part.systems)
    for place, one in enumerate(slices):
        low, high = AGREEMENT.get(one.value, (0.0, 0.0))
        if high:
            axes.fill_between(
                [place - 0.42, place + 0.42], 100 * low - 0.6, 100 * high + 0.6, color=INK, alpha=0.22, lw=0
            )
        for number, key in enumerate(keys):
            x = place + (number - (len(keys) - 1) / 2) * 0.72 / max(len(keys), 1)
            _whisker(axes, x, one.systems[key], number, label=key if place == 0 else None)
    axes.fill_between([], [], [], color=INK, alpha=0.22, lw=0, label="annotators who gave the label")
    axes.set_xticks(range(len(slices)), [f"{s.value} %\nn = {s.rows}" for s in slices])
    axes.set(ylabel="accuracy, %", ylim=(0, 103))
    figure.legend(loc="outside upper left", ncols=2)
    return Chart(_name(part, "bands"), "Accuracy by the annotators' agreement, with 95 % intervals.", figure)


@_styled
def ranking(settings: Sequence[tuple[str, Interval]]) -> Chart:
    """Validation figures of a sweep's settings, the best on top."""
    figure, (axes,) = _figure(1.0 + 0.28 * len(settings))
    for place, (_, found) in enumerate(settings):
        ends = [[max(100 * (found.value - found.low), 0)], [max(100 * (found.high - found.value), 0)]]
        axes.errorbar([100 * found.value], [place], xerr=ends, **_look(0 if place == 0 else 6))
    axes.set_yticks(range(len(settings)), [str(place + 1) for place in range(len(settings))])
    axes.invert_yaxis()
    axes.set(xlabel="validation macro-F1, %", ylabel="rank")
    return Chart("ranking", "Validation macro-F1 by rank, with 95 % intervals.", figure)


def _whisker(axes: Any, x: float, metrics: Metrics, number: int, *, label: str | None) -> None:
    figure = metrics.accuracy
    ends = [[100 * (figure.value - figure.low)], [100 * (figure.high - figure.value)]]
    look = {**_look(number), "linestyle": "none"}
    axes.errorbar([x], [100 * figure.value], yerr=[[max(e[0], 0)] for e in ends], label=label, elinewidth=1, **look)


def _look(number: int) -> dict[str, Any]:
    """Colour, mark and line of the system of that number."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKS[number % len(MARKS)],
        "linestyle": LINES[number % len(LINES)],
    }


def _figure(height: float, rows: int = 1) -> tuple[Any, list[Any]]:
    """An empty figure and its panels, one above the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    made = figure.subplots(rows, 1, squeeze=False, sharex=rows > 1)
    return figure, [line[0] for line in made]


def _name(part: PartScores, what: str) -> str:
    return re.sub(r"[^\w.-]+", "-", f"{part.dataset}-{part.part}-{what}")


def _words(name: str) -> str:
    return name.replace("/", " ").replace("_", "-").replace("f1", "F1")
