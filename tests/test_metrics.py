"""The figures equal scikit-learn's; the intervals equal closed forms and SciPy's, and cover what they should."""

import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics as reference

from finllm import metrics
from finllm.metrics import CLASSES, Indices


def labels(*values: int) -> Indices:
    return np.array(values, dtype=np.intp)


def answers(rows: int, share_right: float, seed: int) -> tuple[Indices, Indices]:
    """Gold labels in PhraseBank's proportions, and predictions of which about `share_right` are right."""
    draw = np.random.default_rng(seed)
    gold = draw.choice(CLASSES, size=rows, p=[0.125, 0.594, 0.281])
    return gold, np.where(draw.random(rows) < share_right, gold, draw.integers(0, CLASSES, rows))


CASES = {
    "a usual test part": answers(968, 0.8, 1),
    "no negative in gold": (labels(1, 2, 2, 1), labels(0, 2, 1, 1)),
    "no positive in predictions": (labels(0, 1, 2, 2), labels(0, 1, 1, 0)),
    "one class nowhere": (labels(0, 1, 1), labels(1, 1, 0)),
    "one class only": (labels(2, 2), labels(2, 2)),
    "one right row": (labels(0), labels(0)),
    "one wrong row": (labels(0), labels(2)),
    "all wrong": (labels(0, 1, 2), labels(1, 2, 0)),
}


@pytest.mark.parametrize(("gold", "predicted"), CASES.values(), ids=CASES)
def test_every_figure_equals_scikit_learn(gold: Indices, predicted: Indices) -> None:
    """Accuracy, macro-F1, weighted F1, Matthews correlation, per class and confusion table agree to rounding."""
    f1 = {
        how: reference.f1_score(gold, predicted, average=how, zero_division=0, labels=np.union1d(gold, predicted))
        for how in ("macro", "weighted")
    }
    assert metrics.accuracy(gold, predicted) == pytest.approx(reference.accuracy_score(gold, predicted), abs=1e-12)
    assert metrics.macro_f1(gold, predicted) == pytest.approx(f1["macro"], abs=1e-12)
    assert metrics.weighted_f1(gold, predicted) == pytest.approx(f1["weighted"], abs=1e-12)
    with warnings.catch_warnings(action="ignore"):  # it warns where there is one class only
        assert metrics.mcc(gold, predicted) == pytest.approx(reference.matthews_corrcoef(gold, predicted), abs=1e-12)
    three = list(range(CLASSES))
    assert (metrics.confusion(gold, predicted) == reference.confusion_matrix(gold, predicted, labels=three)).all()
    expected = reference.precision_recall_fscore_support(gold, predicted, labels=three, zero_division=0)
    found = metrics.per_class(gold, predicted)
    assert [[c.precision, c.recall, c.f1, c.support] for c in found] == [
        pytest.approx(row, abs=1e-12) for row in np.array(expected).T.tolist()
    ]


def test_independent_rows_give_the_binomial_interval() -> None:
    """Drawing n independent rows makes the number of right ones binomial, so its quantiles are the interval."""
    gold, predicted = answers(400, 0.7, 2)
    right = metrics.accuracy(gold, predicted)
    low, high = metrics.bootstrap(gold, predicted, [None] * 400, draws=40_000, seed=0)["accuracy"]
    exact = scipy.stats.binom.ppf([0.025, 0.975], 400, right) / 400
    assert [low, high] == pytest.approx(exact, abs=1 / 400)


def test_whole_clusters_widen_the_interval_as_their_size_says() -> None:
    """With every row four times in one group the standard error is that of a quarter of the rows."""
    gold, predicted = (np.repeat(side, 4) for side in answers(200, 0.7, 3))
    groups = [str(row // 4) for row in range(800)]
    right = metrics.accuracy(gold, predicted)
    low, high = metrics.bootstrap(gold, predicted, groups, draws=40_000, seed=0)["accuracy"]
    exact = scipy.stats.binom.ppf([0.025, 0.975], 200, right) / 200
    assert [low, high] == pytest.approx(exact, abs=1 / 200)


def figure_by_scikit_learn(name: str) -> Callable[[Indices, Indices], float]:
    how = name.removesuffix("_f1")

    def figure(gold: Indices, predicted: Indices) -> float:
        if name == "accuracy":
            return float(reference.accuracy_score(gold, predicted))
        return float(reference.f1_score(gold, predicted, average=how))

    return figure


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "weighted_f1"])
def test_intervals_equal_scipy_for_independent_rows(name: str) -> None:
    """SciPy resamples rows and calls scikit-learn on each draw; both percentiles agree to Monte Carlo error."""
    gold, predicted = answers(150, 0.7, 4)
    expected = scipy.stats.bootstrap(
        (gold, predicted),
        figure_by_scikit_learn(name),
        n_resamples=1500,
        paired=True,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    found = metrics.bootstrap(gold, predicted, [None] * 150, draws=20_000, seed=0)[name]
    assert found == pytest.approx([expected.low, expected.high], abs=0.015)


@pytest.mark.parametrize("name", ["accuracy", "macro_f1"])
def test_paired_differences_equal_scipy(name: str) -> None:
    """The difference of two systems over the same draws, against SciPy's bootstrap of triples."""
    gold, first = answers(150, 0.8, 5)
    second = np.where(np.random.default_rng(6).random(150) < 0.85, first, 1)
    figure = figure_by_scikit_learn(name)
    expected = scipy.stats.bootstrap(
        (gold, first, second),
        lambda g, a, b: figure(g, a) - figure(g, b),
        n_resamples=1500,
        paired=True,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    found = metrics.paired_bootstrap(gold, first, second, [None] * 150, draws=20_000, seed=0)[name]
    assert found.value == pytest.approx(figure(gold, first) - figure(gold, second), abs=1e-12)
    assert [found.low, found.high] == pytest.approx([expected.low, expected.high], abs=0.015)


def test_pairing_narrows_the_interval_of_similar_systems() -> None:
    """Two systems that differ on few rows are told apart far better than two separate intervals could."""
    gold, first = answers(1000, 0.8, 7)
    second = first.copy()
    wrong = np.flatnonzero(first == gold)[:20]
    second[wrong] = (gold[wrong] + 1) % CLASSES
    difference = metrics.paired_bootstrap(gold, first, second, [None] * 1000, draws=2000, seed=0)["accuracy"]
    low, high = metrics.bootstrap(gold, first, [None] * 1000, draws=2000, seed=0)["accuracy"]
    assert difference.value == pytest.approx(0.02)
    assert difference.low > 0
    assert difference.high - difference.low < (high - low) / 2


def test_a_system_does_not_differ_from_itself() -> None:
    """The interval of a system less itself is exactly 0."""
    gold, predicted = answers(200, 0.7, 8)
    found = metrics.paired_bootstrap(gold, predicted, predicted, [None] * 200, draws=500, seed=0)
    assert set(found.values()) == {metrics.Difference(0.0, 0.0, 0.0)}


def coverage(*, with_groups: bool) -> float:
    """Share of 300 simulated test parts whose interval holds the true accuracy of 0.7.

    Each part is 60 clusters of 5 rows that are right or wrong together.
    """
    draw = np.random.default_rng(9)
    groups = [str(row // 5) if with_groups else None for row in range(300)]
    gold = np.ones(300, dtype=np.intp)
    held = 0
    for number in range(300):
        predicted = np.repeat((draw.random(60) < 0.7).astype(np.intp), 5)
        low, high = metrics.bootstrap(gold, predicted, groups, draws=500, seed=number)["accuracy"]
        held += low <= 0.7 <= high
    return held / 300


def test_intervals_over_clusters_cover_and_those_over_rows_do_not() -> None:
    """About 95 % hold the truth; ignoring the clusters gives 62 % (1.96 standard errors shrink by sqrt 5)."""
    assert 0.91 <= coverage(with_groups=True) <= 0.98
    assert 0.5 <= coverage(with_groups=False) <= 0.72


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    """A report can be repeated to the last digit."""
    gold, predicted = answers(300, 0.8, 10)
    one, same, other = (metrics.bootstrap(gold, predicted, [None] * 300, draws=300, seed=s) for s in (1, 1, 2))
    assert one == same
    assert one != other


def test_two_thousand_draws_of_a_thousand_rows_take_less_than_a_second() -> None:
    """Intervals are cheap enough for every slice of every system."""
    gold, predicted = answers(1000, 0.8, 11)
    groups = [str(row // 2) if row % 3 else None for row in range(1000)]
    began = time.perf_counter()
    metrics.bootstrap(gold, predicted, groups, draws=2000, seed=0)
    metrics.paired_bootstrap(gold, predicted, gold, groups, draws=2000, seed=0)
    assert time.perf_counter() - began < 1


def test_a_draw_without_a_class_is_no_division_by_zero() -> None:
    """One rare row is missing from a third of the draws; the figures stay finite and no warning is given."""
    gold, predicted = labels(0, 1, 1, 1), labels(0, 1, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = metrics.bootstrap(gold, predicted, [None] * 4, draws=500, seed=0)
    assert all(-1 <= low <= high <= 1 for low, high in found.values())
