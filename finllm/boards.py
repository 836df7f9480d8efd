"""The report's tables for W&B: systems, comparisons, kinds of text, and every prediction."""

from collections.abc import Iterator, Sequence

from finllm.assessment import rows_of
from finllm.example import LABELS
from finllm.journal import Board, Cell
from finllm.predictions import Answers
from finllm.scores import Interval, Metrics, PartScores, Scores

FIGURES = ("accuracy", "macro_f1", "weighted_f1", "mcc", "nll", "brier", "ece")
MOST_ROWS = 5000
"""Predictions of one table; W&B shows no more than 10,000."""


def tables(scores: Scores, answers: Sequence[Answers]) -> dict[str, Board]:
    """Every table, by its name: `test/phrasebank/systems`."""
    found = {}
    for part in scores.parts:
        path = f"{part.part}/{part.dataset}"
        found[f"{path}/systems"] = _systems(part)
        found[f"{path}/kinds"] = _kinds(part)
        found[f"{path}/comparisons"] = _comparisons(part)
        found[f"{path}/predictions"] = _predictions(part, answers)
    return {name: board for name, board in found.items() if board.rows}


def _systems(part: PartScores) -> Board:
    columns = ("system", "texts", *_with_ends(FIGURES))
    return Board(columns, tuple((key, part.rows, *_figures(m)) for key, m in part.systems.items()))


def _kinds(part: PartScores) -> Board:
    rows = tuple(
        (one.by, one.value, one.rows, key, *_figures(m)) for one in part.slices for key, m in one.systems.items()
    )
    return Board(("by", "kind", "texts", "system", *_with_ends(FIGURES)), rows)


def _comparisons(part: PartScores) -> Board:
    names = ("accuracy", "macro_f1")
    columns = ("first", "second", *_with_ends(names), "only first right", "only second right", "p", "p corrected")
    rows = tuple(
        (p.first, p.second, *_ends(p.accuracy), *_ends(p.macro_f1), p.only_first, p.only_second, p.p, p.p_corrected)
        for p in part.paired
    )
    return Board((*columns, "decided"), tuple((*row, str(p.decided)) for row, p in zip(rows, part.paired, strict=True)))


def _predictions(part: PartScores, answers: Sequence[Answers]) -> Board:
    rows = rows_of(answers, part.dataset, part.part)
    first = next(iter(rows))
    columns = ("id", "text", "target", "gold", *rows, *(f"{first}: {label}" for label in LABELS))
    made = zip(*rows.values(), strict=True)
    lines = (
        (each[0].id, each[0].text, each[0].target, each[0].gold, *(p.predicted for p in each), *each[0].probabilities)
        for each in made
    )
    return Board(columns, tuple(lines)[:MOST_ROWS])


def _figures(metrics: Metrics) -> Iterator[Cell]:
    for name in FIGURES:
        yield from _ends(getattr(metrics, name))


def _ends(figure: Interval) -> tuple[float, float, float]:
    return figure.value, figure.low, figure.high


def _with_ends(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{name}{end}" for name in names for end in ("", " low", " high"))
