"""Calibration: figures as scikit-learn and their definitions have them, and what a fitted temperature changes."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss

from finllm import calibration
from finllm.metrics import Indices, Shares


def system(rows: int, seed: int, sharpness: float = 1.0) -> tuple[Shares, Indices]:
    """Probabilities and labels drawn from them: calibrated by construction where `sharpness` is 1."""
    draw = np.random.default_rng(seed)
    honest = draw.dirichlet([0.6, 0.8, 0.7], rows)
    gold = (honest.cumsum(axis=1) < draw.random((rows, 1))).sum(axis=1).astype(np.intp)
    return calibration.softened(honest, 1 / sharpness), gold


def test_nll_and_brier_are_those_of_scikit_learn() -> None:
    """Means over the rows; Brier's score sums over the labels."""
    p, gold = system(500, 1)
    assert calibration.nll(p, gold).mean() == pytest.approx(log_loss(gold, p, labels=[0, 1, 2]), abs=1e-12)
    assert calibration.brier(p, gold).mean() == pytest.approx(brier_score_loss(gold, p, labels=[0, 1, 2]), abs=1e-12)


def test_ece_is_its_definition() -> None:
    """A loop over 15 bins, (lower, upper], gives the same; certainty that is always right has none."""
    p, gold = system(700, 2, sharpness=2)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == gold
    expected = 0.0
    for number in range(15):
        rows = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if rows.any():
            expected += rows.mean() * abs(confidence[rows].mean() - right[rows].mean())
    assert calibration.ece(p, gold) == pytest.approx(expected, abs=1e-12)
    assert calibration.ece(np.eye(3)[gold], gold) == 0
    bins = calibration.bins(p, gold)
    assert sum(one.rows for one in bins) == 700
    assert sum(one.rows * abs(one.confidence - one.accuracy) for one in bins) / 700 == pytest.approx(expected)


def test_a_temperature_undoes_a_temperature() -> None:
    """Probabilities made three times too sharp are fitted by 3; the order of labels stays, NLL and ECE fall."""
    sharp, gold = system(4000, 3, sharpness=3)
    fitted = calibration.temperature(sharp, gold)
    after = calibration.softened(sharp, fitted)
    assert fitted == pytest.approx(3, rel=0.1)
    assert (after.argmax(axis=1) == sharp.argmax(axis=1)).all()
    assert calibration.nll(after, gold).mean() < calibration.nll(sharp, gold).mean() - 0.3
    assert calibration.ece(after, gold) < 0.03
    assert calibration.ece(sharp, gold) > 0.1
    assert calibration.temperature(*system(4000, 4)) == pytest.approx(1, abs=0.1)


def test_intervals_cover_the_figure_and_grow_with_twins() -> None:
    """Rows in clusters of four alike count as one; the same seed gives the same interval."""
    p, gold = system(100, 5)
    four = np.repeat(np.arange(100), 4)
    alone = calibration.fit(p[four], gold[four], [None] * 400, 500, 0)
    together = calibration.fit(p[four], gold[four], [str(n) for n in four], 500, 0)
    for name in ("nll", "brier", "ece"):
        assert together[name].low < together[name].value < together[name].high
    width = {n: together[n].high - together[n].low for n in ("nll", "brier")}
    assert all(1.6 < width[n] / (alone[n].high - alone[n].low) < 2.5 for n in width)
    assert together == calibration.fit(p[four], gold[four], [str(n) for n in four], 500, 0)


def test_leaving_out_doubt_lowers_the_risk() -> None:
    """The curve ends at the error rate; its area is the mean of all partial risks."""
    p, gold = system(300, 6)
    found = calibration.selective(p, gold, [None] * 300, 300, 0, points=300)
    wrong = p.argmax(axis=1) != gold
    order = np.argsort(-p.max(axis=1), kind="stable")
    risks = np.cumsum(wrong[order]) / np.arange(1, 301)
    np.testing.assert_allclose(found.risk, risks, atol=1e-12)
    assert found.coverage[-1] == 1
    assert found.area.value == pytest.approx(risks.mean())
    assert found.area.low < found.area.value < found.area.high < wrong.mean()
    assert found.accuracy.value == pytest.approx(1 - risks[239])


def test_one_confidence_for_all_rows_makes_a_level_curve() -> None:
    """The order of rows means nothing then, so no row order may look like knowledge."""
    gold = np.array([0] * 60 + [1] * 40, dtype=np.intp)
    found = calibration.selective(np.tile([0.5, 0.3, 0.2], (100, 1)), gold, [None] * 100, 100, 0)
    np.testing.assert_allclose(found.risk, 0.4)
    assert found.area.value == pytest.approx(0.4)


def test_batch_calibration_takes_the_prior_out() -> None:
    """A system that says neutral of everything, but leans the right way, is set right without labels."""
    p, gold = system(2000, 7)
    leaning = calibration.softened(p * [1, 200, 1], 1.0)
    assert (leaning.argmax(axis=1) == gold).mean() < 0.5
    fixed = calibration.batch_calibrated(leaning[:1000], leaning[1000:])
    assert (fixed.argmax(axis=1) == gold[:1000]).mean() > (p[:1000].argmax(axis=1) == gold[:1000]).mean() - 0.06


def test_certainty_that_is_wrong_has_a_finite_price() -> None:
    """A probability of 0 is no infinite loss, but a very high one."""
    p = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    found = calibration.nll(p, np.array([1, 1], dtype=np.intp))
    assert found[0] == pytest.approx(27.6, abs=0.1)
    assert found[1] == 0
