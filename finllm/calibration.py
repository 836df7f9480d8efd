"""Whether probabilities can be believed: how well they fit, how to soften them, and what leaving out doubt gains.

`probabilities` are (rows, labels) in the order of LABELS, each row summing to 1; `gold` are label indices.
References: temperature and expected calibration error with equal-width bins, Guo et al. 2017 (arXiv 1706.04599);
Brier 1950; risk-coverage curve and its area, Geifman & El-Yaniv 2017 (arXiv 1705.08500); batch calibration, Zhou et
al. 2023 (arXiv 2309.17249).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finllm.metrics import CLASSES, Indices, Shares, clusters_of, interval_of, sums, weights_of

BINS = 15
LEAST = 1e-12
"""A probability of 0 counts as this in logarithms: a finite, very high price for certainty that was wrong."""
COVERAGE = 0.8
"""Share of the texts that are answered where accuracy at partial coverage is quoted."""
TEMPERATURES = (0.05, 20.0)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval over draws of clusters."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Bin:
    """Answers of like confidence."""

    rows: int
    confidence: float
    """Their mean confidence."""
    accuracy: float


@dataclass(frozen=True, slots=True)
class Selective:
    """What becomes of the accuracy when the least confident answers are left out."""

    coverage: tuple[float, ...]
    risk: tuple[float, ...]
    """Share of wrong answers among those of the highest confidence, at each coverage."""
    area: Estimate
    """Mean risk over all coverages (AURC); 0 is best."""
    accuracy: Estimate
    """At COVERAGE."""


def nll(probabilities: Shares, gold: Indices) -> Shares:
    """Each row's negative log-probability of the gold label, in nats."""
    taken: Shares = -np.log(np.maximum(probabilities[np.arange(len(gold)), gold], LEAST))
    return taken


def brier(probabilities: Shares, gold: Indices) -> Shares:
    """Each row's squared distance from certainty in the gold label, summed over the labels: 0 to 2."""
    distances: Shares = ((probabilities - np.eye(CLASSES)[gold]) ** 2).sum(axis=1)
    return distances


def ece(probabilities: Shares, gold: Indices) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over BINS bins, weighted by their rows."""
    return float(np.abs(_gaps(probabilities, gold).sum(axis=0)).sum() / len(gold))


def bins(probabilities: Shares, gold: Indices) -> tuple[Bin, ...]:
    """The bins of `ece` that hold any row, from the lowest confidence up."""
    confidence, right, number = _confidence(probabilities, gold)
    found = ((number == one) for one in range(BINS))
    return tuple(
        Bin(int(rows.sum()), float(confidence[rows].mean()), float(right[rows].mean())) for rows in found if rows.any()
    )


def fit(
    probabilities: Shares, gold: Indices, groups: Sequence[str | None], draws: int, seed: int
) -> dict[str, Estimate]:
    """`nll`, `brier` and `ece` over all rows with their intervals.

    The ECE of few rows is too high on average, and so is its interval: gaps are counted without their sign.
    """
    values = {
        "nll": float(nll(probabilities, gold).mean()),
        "brier": float(brier(probabilities, gold).mean()),
        "ece": ece(probabilities, gold),
    }
    over = drawn(probabilities, gold, groups, draws, seed)
    return {name: Estimate(value, *interval_of(over[name])) for name, value in values.items()}


def drawn(
    probabilities: Shares, gold: Indices, groups: Sequence[str | None], draws: int, seed: int
) -> dict[str, Shares]:
    """`nll`, `brier` and `ece` in each draw of whole clusters, (draws,): the same rows for the same groups and seed."""
    rows = np.column_stack([nll(probabilities, gold), brier(probabilities, gold), _gaps(probabilities, gold)])
    found = sums(np.column_stack([rows, np.ones(len(gold))]), groups, draws, seed)
    many = found[:, -1]
    return {"nll": found[:, 0] / many, "brier": found[:, 1] / many, "ece": np.abs(found[:, 2:-1]).sum(axis=1) / many}


def temperature(probabilities: Shares, gold: Indices) -> float:
    """The temperature with the lowest mean NLL on these rows, which must be validation rows; within TEMPERATURES."""
    from scipy.optimize import minimize_scalar

    def loss(log_t: float) -> float:
        return float(nll(softened(probabilities, float(np.exp(log_t))), gold).mean())

    return float(np.exp(minimize_scalar(loss, bounds=tuple(np.log(TEMPERATURES)), method="bounded").x))


def softened(probabilities: Shares, by: float) -> Shares:
    """Probabilities of the same order at another temperature: above 1 less certain, below 1 more."""
    logs = np.log(np.maximum(probabilities, LEAST)) / by
    return _normalised(logs)


def batch_calibrated(probabilities: Shares, unlabelled: Shares) -> Shares:
    """Probabilities less the mean log-probability that the same system gives each label on unlabelled texts."""
    prior = np.log(np.maximum(unlabelled, LEAST)).mean(axis=0)
    return _normalised(np.log(np.maximum(probabilities, LEAST)) - prior)


def selective(
    probabilities: Shares, gold: Indices, groups: Sequence[str | None], draws: int, seed: int, points: int = 50
) -> Selective:
    """Risk at each coverage, its area, and the accuracy at COVERAGE; answers of one confidence share their risk."""
    confidence, right, _ = _confidence(probabilities, gold)
    order = np.argsort(-confidence, kind="stable")
    wrong = _shared(1 - right[order], confidence[order])
    clusters = clusters_of(groups)[order]
    weights = weights_of(int(clusters.max()) + 1, draws, seed)[:, clusters]
    risks = np.cumsum(wrong) / np.arange(1, len(wrong) + 1)
    area, accuracy = _selective_figures(np.ones((1, len(wrong))), wrong)
    areas, accuracies = _selective_figures(weights, wrong)
    shown = np.unique(np.linspace(0, len(wrong) - 1, points).round().astype(int))
    return Selective(
        coverage=tuple(((shown + 1) / len(wrong)).tolist()),
        risk=tuple(risks[shown].tolist()),
        area=Estimate(float(area[0]), *interval_of(areas)),
        accuracy=Estimate(float(accuracy[0]), *interval_of(accuracies)),
    )


def _selective_figures(weights: Shares, wrong: Shares) -> tuple[Shares, Shares]:
    """Area under the risk-coverage curve and accuracy at COVERAGE for each line of row weights (draws, rows)."""
    seen, errors = np.cumsum(weights, axis=1), np.cumsum(weights * wrong, axis=1)
    total = seen[:, -1:]
    area = (weights * errors / np.maximum(seen, 1)).sum(axis=1) / total[:, 0]
    end = (seen < COVERAGE * total).sum(axis=1)[:, None]  # the first row with which the coverage is reached
    risk = np.take_along_axis(errors, end, axis=1) / np.take_along_axis(seen, end, axis=1)
    return area, 1 - risk[:, 0]


def _shared(wrong: Shares, confidence: Shares) -> Shares:
    """Errors spread evenly over runs of equal confidence, whose order means nothing."""
    _, run, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    shared: Shares = (np.bincount(run, weights=wrong) / sizes)[run]
    return shared


def _confidence(probabilities: Shares, gold: Indices) -> tuple[Shares, Shares, Indices]:
    """Each row's highest probability, whether its label is gold (0 or 1), and the number of its bin."""
    confidence = probabilities.max(axis=1)
    right = (probabilities.argmax(axis=1) == gold).astype(np.float64)
    number = np.clip(np.ceil(confidence * BINS).astype(np.intp) - 1, 0, BINS - 1)
    return confidence, right, number


def _gaps(probabilities: Shares, gold: Indices) -> Shares:
    """(rows, BINS): confidence less correctness, in the column of the row's bin."""
    confidence, right, number = _confidence(probabilities, gold)
    gaps: Shares = np.eye(BINS)[number] * (confidence - right)[:, None]
    return gaps


def _normalised(logs: Shares) -> Shares:
    shares = np.exp(logs - logs.max(axis=1, keepdims=True))
    rows: Shares = shares / shares.sum(axis=1, keepdims=True)
    return rows
