"""Significance: the same p-values as statsmodels and SciPy."""

import numpy as np
import pytest
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from finllm import significance
from finllm.metrics import Indices


def answers(rows: int, right: float, seed: int) -> Indices:
    draw = np.random.default_rng(seed)
    return np.where(draw.random(rows) < right, 0, draw.integers(1, 3, rows)).astype(np.intp)


@pytest.mark.parametrize(("rows", "first", "second"), [(968, 0.88, 0.85), (200, 0.9, 0.6), (2377, 0.8, 0.8), (3, 1, 0)])
def test_mcnemar_is_that_of_statsmodels(rows: int, first: float, second: float) -> None:
    """The exact, two-sided p-value, and SciPy's binomial test of the rows on which the systems differ."""
    gold = np.zeros(rows, dtype=np.intp)
    one, other = answers(rows, first, 1), answers(rows, second, 2)
    found = significance.mcnemar(gold, one, other)
    table = [[np.sum((one == 0) & (other == 0)), found.only_first], [found.only_second, 0]]
    assert found.p == pytest.approx(mcnemar(table, exact=True).pvalue, rel=1e-9)
    assert found.p == pytest.approx(binomtest(found.only_first, found.only_first + found.only_second).pvalue, rel=1e-9)


def test_systems_that_never_differ_are_not_told_apart() -> None:
    """No row speaks for either: p is 1."""
    gold = np.zeros(5, dtype=np.intp)
    assert significance.mcnemar(gold, gold, gold) == significance.McNemar(0, 0, 1.0)


def test_holm_is_that_of_statsmodels() -> None:
    """Also with ties, with values near 1, and with none."""
    for ps in ([0.01, 0.04, 0.03, 0.005], [0.02, 0.02, 0.9], [0.6, 0.7], [0.04]):
        assert significance.holm(ps) == pytest.approx(list(multipletests(ps, method="holm")[1]))
    assert significance.holm([]) == []
