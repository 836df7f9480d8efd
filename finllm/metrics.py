"""How good a classifier is, from label indices in the order of `finllm.example.LABELS`; all shares are 0 to 1.

Intervals are 95 % percentile intervals of the cluster bootstrap: whole groups of near twins are drawn with
replacement, so that a sentence and its copy do not count as two independent observations (Efron & Tibshirani,
An Introduction to the Bootstrap, 1993, section 13.3 for percentiles; Davison & Hinkley, Bootstrap Methods and their
Application, 1997, section 3.8 for clusters). Two systems are compared on the same draws.

The figures depend on a draw only through its confusion counts, and clusters with equal counts are exchangeable.
Drawing C clusters is therefore one multinomial draw over the few kinds of cluster that occur: exact, and
independent of the number of rows in cost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from finllm.example import LABELS

Indices = NDArray[np.intp]
Counts = NDArray[np.int64]
Shares = NDArray[np.float64]
CLASSES = len(LABELS)
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """One class against all others; a share with nothing to divide by is 0."""

    precision: float
    recall: float
    f1: float
    support: int
    """Rows that have this label."""


@dataclass(frozen=True, slots=True)
class Difference:
    """First system less second, with its interval."""

    value: float
    low: float
    high: float


def confusion(gold: Indices, predicted: Indices) -> Counts:
    """Rows of each (gold, predicted) pair, as a square table with one line for each gold label."""
    return np.bincount(gold * CLASSES + predicted, minlength=CLASSES**2).reshape(CLASSES, CLASSES).astype(np.int64)


def accuracy(gold: Indices, predicted: Indices) -> float:
    """Share of right answers."""
    return float(accuracy_of(confusion(gold, predicted)))


def macro_f1(gold: Indices, predicted: Indices) -> float:
    """Mean F1 of the classes that occur in gold or predictions, as scikit-learn has it."""
    return float(macro_f1_of(confusion(gold, predicted)))


def weighted_f1(gold: Indices, predicted: Indices) -> float:
    """Mean F1 of the classes, weighted by their gold rows."""
    return float(weighted_f1_of(confusion(gold, predicted)))


def mcc(gold: Indices, predicted: Indices) -> float:
    """Matthews correlation of gold and answers, -1 to 1; see `mcc_of`."""
    return float(mcc_of(confusion(gold, predicted)))


def per_class(gold: Indices, predicted: Indices) -> tuple[ClassFigures, ...]:
    """Precision, recall, F1 and support of each class, in the order of LABELS."""
    table = confusion(gold, predicted)
    right, support, answered = np.diagonal(table), table.sum(axis=1), table.sum(axis=0)
    rows = zip(_ratio(right, answered), _ratio(right, support), _f1(table), support, strict=True)
    return tuple(ClassFigures(float(p), float(r), float(f), int(s)) for p, r, f, s in rows)


# The same figures of a whole stack of confusion tables (..., gold, predicted), such as one for each draw.


def accuracy_of(tables: Counts) -> Shares:
    """Share of right answers of each table; 0 where a table is empty."""
    return _ratio(np.trace(tables, axis1=-2, axis2=-1), tables.sum(axis=(-2, -1)))


def macro_f1_of(tables: Counts) -> Shares:
    """Macro-F1 of each table, over the classes that occur in it."""
    occurs = tables.sum(axis=-1) + tables.sum(axis=-2) > 0
    return _ratio(_f1(tables).sum(axis=-1), occurs.sum(axis=-1))


def weighted_f1_of(tables: Counts) -> Shares:
    """Weighted F1 of each table."""
    support = tables.sum(axis=-1)
    return _ratio((_f1(tables) * support).sum(axis=-1), support.sum(axis=-1))


def mcc_of(tables: Counts) -> Shares:
    """Matthews correlation for several classes (Gorodkin 2004, R_K); 0 where gold or answers are all of one class."""
    counts = np.asarray(tables, dtype=np.float64)
    rows, gold, answered = counts.sum(axis=(-2, -1)), counts.sum(axis=-1), counts.sum(axis=-2)
    agreeing = np.trace(counts, axis1=-2, axis2=-1) * rows - (gold * answered).sum(axis=-1)
    spread = (rows**2 - (gold**2).sum(axis=-1)) * (rows**2 - (answered**2).sum(axis=-1))
    return _ratio(agreeing, np.sqrt(np.maximum(spread, 0)))


def _f1(tables: Counts) -> Shares:
    """F1 of each class; 2 TP / (gold rows + predicted rows) needs no precision that may not exist."""
    return _ratio(2 * np.diagonal(tables, axis1=-2, axis2=-1), tables.sum(axis=-1) + tables.sum(axis=-2))


def _ratio(part: Counts | Shares, whole: Counts | Shares) -> Shares:
    """`part / whole`, 0 where `whole` is 0."""
    below = np.asarray(whole, dtype=np.float64)
    return np.divide(np.asarray(part, dtype=np.float64), below, out=np.zeros_like(below), where=below > 0)


FIGURES: dict[str, Callable[[Counts], Shares]] = {
    "accuracy": accuracy_of,
    "macro_f1": macro_f1_of,
    "weighted_f1": weighted_f1_of,
    "mcc": mcc_of,
}
"""Every figure that is a function of the confusion table, and so gets an interval."""
COMPARED = ("accuracy", "macro_f1")


def bootstrap(
    gold: Indices, predicted: Indices, groups: Sequence[str | None], draws: int, seed: int
) -> dict[str, tuple[float, float]]:
    """95 % interval (low, high) of each of FIGURES; rows without a group stand for themselves.

    A system that is always right, or always wrong, gets an interval of width 0: no draw differs from the sample.
    """
    cells = gold * CLASSES + predicted
    tables = _drawn(cells, CLASSES**2, groups, draws, seed).reshape(draws, CLASSES, CLASSES)
    return {name: interval_of(figure(tables)) for name, figure in FIGURES.items()}


def paired_bootstrap(
    gold: Indices, first: Indices, second: Indices, groups: Sequence[str | None], draws: int, seed: int
) -> dict[str, Difference]:
    """Accuracy and macro-F1 of `first` less `second`, with the 95 % interval over the same draws for both."""
    cells = (gold * CLASSES + first) * CLASSES + second
    joint = _drawn(cells, CLASSES**3, groups, draws, seed).reshape(draws, CLASSES, CLASSES, CLASSES)
    tables = joint.sum(axis=3), joint.sum(axis=2)  # (draw, gold, first), (draw, gold, second)
    sample = confusion(gold, first), confusion(gold, second)
    differences = {}
    for name in COMPARED:
        figure = FIGURES[name]
        value = float(figure(sample[0]) - figure(sample[1]))
        differences[name] = Difference(value, *interval_of(figure(tables[0]) - figure(tables[1])))
    return differences


def _drawn(cells: Indices, kinds: int, groups: Sequence[str | None], draws: int, seed: int) -> Counts:
    """How often each of `kinds` cells occurs in each draw: (draw, cell)."""
    clusters = clusters_of(groups)
    count = int(clusters.max()) + 1
    table = np.bincount(clusters * kinds + cells, minlength=count * kinds).reshape(count, kinds)
    alike, times = np.unique(table, axis=0, return_counts=True)
    weights = np.random.default_rng(seed).multinomial(count, times / count, size=draws)
    return np.asarray(weights @ alike, dtype=np.int64)


def clusters_of(groups: Sequence[str | None]) -> Indices:
    """The number of each row's cluster, from 0."""
    numbers: dict[str | int, int] = {}
    keys = (row if group is None else group for row, group in enumerate(groups))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.intp)


def interval_of(values: Shares) -> tuple[float, float]:
    """The middle 95 % of the values of a figure over the draws."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def sums(values: Shares, groups: Sequence[str | None], draws: int, seed: int) -> Shares:
    """Sums (draws, columns) of the rows' values (rows, columns) in each draw of whole clusters."""
    clusters = clusters_of(groups)
    count = int(clusters.max()) + 1
    table = np.zeros((count, values.shape[1]))
    np.add.at(table, clusters, values)
    drawn: Shares = weights_of(count, draws, seed) @ table
    return drawn


@lru_cache(maxsize=3)
def weights_of(count: int, draws: int, seed: int) -> Shares:
    """How often each of `count` clusters occurs in each draw."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)
