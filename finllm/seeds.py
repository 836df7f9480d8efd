"""Runs that differ in their seed alone: mean, standard deviation, and an interval over seeds and rows.

A draw takes as many of the seeds as there are, with replacement, and whole clusters of rows, the same ones for every
seed (a two-way bootstrap, Owen 2007, arXiv 0710.4239). With three seeds the share of the seeds is known only roughly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finllm.metrics import CLASSES, FIGURES, Indices, Shares, confusion, interval_of, sums
from finllm.scores import Interval


@dataclass(frozen=True, slots=True)
class OverSeeds:
    """One figure of runs that differ in their seed."""

    seeds: int
    deviation: float
    """Sample standard deviation over the seeds; 0 for one."""
    mean: Interval
    """Over seeds and rows."""


def over_seeds(
    gold: Indices, answers: Sequence[Indices], groups: Sequence[str | None], draws: int, seed: int
) -> dict[str, OverSeeds]:
    """Every figure of the confusion table, from the answers of each seed's run to the same rows."""
    sample = _of_sample(gold, answers)
    drawn = _drawn(gold, answers, groups, draws, seed)
    return {
        name: OverSeeds(
            len(answers),
            float(np.std(sample[name], ddof=1)) if len(answers) > 1 else 0.0,
            _interval(float(np.mean(sample[name])), drawn[name]),
        )
        for name in FIGURES
    }


def difference(
    gold: Indices,
    first: Sequence[Indices],
    second: Sequence[Indices],
    groups: Sequence[str | None],
    draws: int,
    seed: int,
) -> dict[str, Interval]:
    """Every figure of `first` less `second`, means over their seeds, on the same rows in each draw."""
    means = [_of_sample(gold, answers) for answers in (first, second)]
    drawn = [_drawn(gold, answers, groups, draws, seed) for answers in (first, second)]
    return {
        name: _interval(float(np.mean(means[0][name]) - np.mean(means[1][name])), drawn[0][name] - drawn[1][name])
        for name in FIGURES
    }


def _of_sample(gold: Indices, answers: Sequence[Indices]) -> dict[str, list[float]]:
    """Each figure of each seed."""
    tables = [confusion(gold, one) for one in answers]
    return {name: [float(figure(table)) for table in tables] for name, figure in FIGURES.items()}


def _drawn(
    gold: Indices, answers: Sequence[Indices], groups: Sequence[str | None], draws: int, seed: int
) -> dict[str, Shares]:
    """Each figure's mean over the seeds of each draw."""
    kinds = np.eye(CLASSES**2)
    tables = np.stack([sums(kinds[gold * CLASSES + one], groups, draws, seed) for one in answers], axis=1)
    counts = tables.reshape(draws, len(answers), CLASSES, CLASSES).astype(np.int64)
    return {name: redrawn(figure(counts), seed) for name, figure in FIGURES.items()}


def redrawn(figures: Shares, seed: int) -> Shares:
    """Means (draws,) of a figure (draws, seeds) over as many of the seeds, drawn with replacement in each draw."""
    draws, count = figures.shape
    chosen = np.random.default_rng([seed, count]).integers(count, size=(draws, count))
    means: Shares = np.take_along_axis(figures, chosen, axis=1).mean(axis=1)
    return means


def _interval(value: float, drawn: Shares) -> Interval:
    low, high = interval_of(drawn)
    return Interval(value=value, low=low, high=high)
