"""Scores follow from predictions alone: figures, slices, comparisons, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score

from finllm import assessment, metrics, predictions
from finllm.errors import RunError
from finllm.example import LABELS, Example, Label, Split
from finllm.predictions import Answers, Prediction
from finllm.run import create
from finllm.scores import Scores

BANDS = ("100", "75-99", "66-75", "50-66")


def examples(rows: int, dataset: str = "fpb", part: Split = "test", seed: int = 1) -> list[Example]:
    """Rows in four bands of unlike size, every tenth a twin of the one before, a third with mixed signals."""
    draw = np.random.default_rng(seed)
    return [
        Example(
            id=f"{dataset}:{part}:{number}",
            dataset=dataset,
            text=f"text {number}",
            label=LABELS[draw.integers(3)],
            split=part,
            source=("news", "post")[number % 2],
            agreement=BANDS[0] if number % 2 else BANDS[1] if number % 4 else BANDS[2] if number % 40 else BANDS[3],
            group=f"{dataset}:g{number // 2}" if number % 20 < 2 else None,
            careless=LABELS[draw.integers(3)] if number % 3 == 0 else None,
        )
        for number in range(rows)
    ]


def answer(rows: list[Example], key: str, share_right: float, seed: int = 2) -> Answers:
    """A system that is right on about `share_right` of the rows."""
    draw = np.random.default_rng(seed)
    probabilities = np.full((len(rows), 3), 0.05)
    for number, example in enumerate(rows):
        right = draw.random() < share_right
        probabilities[number, LABELS.index(example.label) if right else draw.integers(3)] = 0.9
    return Answers(key, f"the {key} one", 2.0, predictions.of(rows, probabilities))


ROWS = examples(400)
TUNED, BASE = answer(ROWS, "tuned", 0.8), answer(ROWS, "base", 0.3, seed=3)


def indices(labels: list[Label]) -> metrics.Indices:
    return np.array([LABELS.index(label) for label in labels])


def test_figures_are_those_of_metrics_on_the_same_rows() -> None:
    """Accuracy, F1, classes and confusion of one part, with intervals over its twin groups."""
    scored = assessment.score([TUNED, BASE], 500, 7)
    (part,) = scored.parts
    gold, predicted = (indices([getattr(p, what) for p in TUNED.predictions]) for what in ("gold", "predicted"))
    found = part.systems["tuned"]
    assert (part.dataset, part.part, part.rows, part.clusters) == ("fpb", "test", 400, 380)
    assert found.accuracy.value == pytest.approx((gold == predicted).mean())
    assert found.macro_f1.value == pytest.approx(f1_score(gold, predicted, average="macro"))
    expected = metrics.bootstrap(gold, predicted, [e.group for e in ROWS], 500, 7)
    for name, (low, high) in expected.items():
        interval = getattr(found, name)
        assert (interval.low, interval.high) == (low, high)
        assert low < interval.value < high
    assert sum(map(sum, found.confusion)) == 400
    assert found.per_class["negative"].support == sum(e.label == "negative" for e in ROWS)


def test_the_first_system_is_compared_with_each_other_one() -> None:
    """The difference is that of the two figures, decided where the interval leaves out 0."""
    same = Answers("again", "the tuned one again", 1.0, TUNED.predictions)
    (part,) = assessment.score([TUNED, BASE, same], 500, 7).parts
    against_base, against_itself, others = part.paired
    assert (others.first, others.second) == ("base", "again")
    assert (against_base.first, against_base.second, against_itself.second) == ("tuned", "base", "again")
    difference = part.systems["tuned"].accuracy.value - part.systems["base"].accuracy.value
    assert against_base.accuracy.value == pytest.approx(difference)
    assert against_base.accuracy.decided
    assert against_base.macro_f1.decided
    assert not against_itself.accuracy.decided


def test_slices_are_bands_sources_and_signals_with_enough_rows() -> None:
    """Bands come from the highest down; the band of 10 rows is left out."""
    (part,) = assessment.score([TUNED, BASE], 200, 7).parts
    found = {(s.by, s.value): s.rows for s in part.slices}
    assert list(found) == [
        ("agreement", "100"), ("agreement", "75-99"), ("agreement", "66-75"),
        ("level", "66"), ("level", "75"), ("source", "news"), ("source", "post"), ("signals", "mixed"),
        ("signals", "plain"),
    ]  # fmt: skip
    assert (found["agreement", "100"], found["level", "75"], found["level", "66"]) == (200, 300, 390)
    assert sum(e.agreement == "50-66" for e in ROWS) == 10
    posts = [p for p in TUNED.predictions if p.source == "post"]
    (scored,) = [s for s in part.slices if s.value == "post"]
    right = sum(p.gold == p.predicted for p in posts) / len(posts)
    assert scored.systems["tuned"].accuracy.value == pytest.approx(right)
    assert list(scored.systems) == ["tuned", "base"]


def test_what_all_rows_share_is_no_slice() -> None:
    """One source, one band and no mixed signals say nothing that the whole part does not."""
    rows = [Example(f"x:{n}", "x", "t", LABELS[n % 3], "test", source="news", agreement="100") for n in range(60)]
    (part,) = assessment.score([answer(rows, "tuned", 0.8)], 200, 7).parts
    assert part.slices == ()
    assert part.paired == ()


def test_rows_are_told_apart_by_target_and_by_who_has_seen_them() -> None:
    """A target is named in the text or not; rows that a system was trained on are known where it is compared."""
    rows = [
        replace(e, target="Nokia" if n % 3 else "text", seen_by=("prosus",) if n % 4 == 0 else ())
        for n, e in enumerate(examples(120))
    ]
    saw = replace(answer(rows, "finbert", 0.9), saw="prosus")
    (part,) = assessment.score([answer(rows, "tuned", 0.8), saw], 100, 7).parts
    found = {(s.by, s.value): s.rows for s in part.slices}
    assert found["target", "named in the text"] == 40
    assert found["target", "not named in the text"] == 80
    assert found["unseen", "prosus"] == 90
    (part,) = assessment.score([answer(rows, "tuned", 0.8)], 100, 7).parts
    assert not [s for s in part.slices if s.by == "unseen"]


def test_a_temperature_is_fitted_on_validation_rows_alone() -> None:
    """What is reported of the test part changes with it; the validation part itself, and a set without one, have none."""
    rows = [*examples(300, "a", "validation"), *examples(200, "a"), *examples(100, "b")]
    scored = assessment.score([answer(rows, "tuned", 0.7)], 100, 7)
    validation, test, alone = (part.calibration["tuned"].softened for part in scored.parts)
    assert validation is None
    assert alone is None
    assert test is not None
    assert test.temperature > 1.2  # it says 0.9 of everything and is right in 0.8 of all
    assert test.nll.value < scored.parts[1].systems["tuned"].nll.value
    other = [
        p if p.part == "test" else p.model_copy(update={"gold": p.predicted}) for p in answer(rows, "", 0.7).predictions
    ]
    surer = assessment.score([Answers("tuned", "", 1.0, other)], 100, 7).parts[1]
    assert surer.calibration["tuned"].softened is not None
    assert surer.calibration["tuned"].softened.temperature < 1
    assert surer.systems == scored.parts[1].systems


def test_parts_that_are_not_asked_for_are_not_reported() -> None:
    """Validation rows are there for the temperature."""
    rows = [*examples(60, "a", "validation"), *examples(60, "a")]
    (part,) = assessment.score([answer(rows, "tuned", 0.7)], 100, 7, parts=["test"]).parts
    assert part.part == "test"
    assert part.calibration["tuned"].softened is not None


def test_p_values_are_corrected_for_the_number_of_comparisons() -> None:
    """The first system against k others has its weakest p times 1, its strongest times k; decided takes both tests."""
    near, same = answer(ROWS, "near", 0.72, seed=5), replace(TUNED, key="same")
    (part,) = assessment.score([TUNED, BASE, near, same], 300, 7).parts
    own = {pair.second: pair for pair in part.paired if pair.first == "tuned"}
    assert own["base"].p_corrected == pytest.approx(3 * own["base"].p)
    assert own["near"].p_corrected == pytest.approx(min(1.0, 2 * own["near"].p))
    assert own["same"].p_corrected == own["same"].p == 1
    assert own["base"].decided
    assert not own["same"].decided
    only = own["base"].only_first - own["base"].only_second
    assert own["base"].accuracy.value == pytest.approx(only / 400)
    unsure = own["base"].model_copy(update={"p_corrected": 0.06})
    assert unsure.accuracy.decided
    assert not unsure.decided


def test_mistakes_and_mixed_signals_are_listed_by_confidence() -> None:
    """At most twenty mistakes of the first system, with what the others say; every mixed sentence."""
    (part,) = assessment.score([TUNED, BASE], 100, 7).parts
    assert len(part.mistakes) == 20
    assert all(case.predicted != case.gold for case in part.mistakes)
    assert set(part.mistakes[0].answers) == {"base"}
    assert len(part.mixed) == sum(e.careless is not None for e in ROWS)
    confidence = [max(case.probabilities) for case in part.mixed]
    assert confidence == sorted(confidence, reverse=True)


def test_data_sets_and_parts_are_scored_apart() -> None:
    """In the order of the predictions."""
    rows = [*examples(30, "b", "validation"), *examples(40, "a"), *examples(50, "b")]
    tuned = answer(rows, "tuned", 0.8)
    parts = assessment.score([tuned], 200, 7).parts
    assert [(p.dataset, p.part, p.rows) for p in parts] == [
        ("b", "validation", 30),
        ("a", "test", 40),
        ("b", "test", 50),
    ]
    for part in parts:
        mine = [p for p in tuned.predictions if (p.dataset, p.part) == (part.dataset, part.part)]
        assert part.systems["tuned"].accuracy.value == pytest.approx(np.mean([p.gold == p.predicted for p in mine]))


def test_systems_may_have_answered_in_different_orders() -> None:
    """Rows are matched by their id, so nothing changes, the paired intervals included."""
    turned = Answers(BASE.key, BASE.name, BASE.seconds, BASE.predictions[::-1])
    assert assessment.score([TUNED, turned], 200, 7) == assessment.score([TUNED, BASE], 200, 7)


def test_pace_is_texts_by_seconds_and_0_where_nothing_was_timed() -> None:
    """No division by zero for a system that took no time."""
    timed, not_timed = assessment.score([TUNED, Answers("none", "untimed", 0.0, TUNED.predictions)], 200, 7).systems
    assert (timed.texts, timed.seconds, timed.texts_per_second) == (400, 2.0, 200.0)
    assert not_timed.texts_per_second == 0


def changed(*rows: Prediction) -> Answers:
    return Answers("base", "base", 1.0, rows)


FIRST, *OTHERS = BASE.predictions
WRONG_GOLD = FIRST.model_copy(update={"gold": LABELS[LABELS.index(FIRST.gold) - 1]})
REFUSED = {
    "a row is missing": ([TUNED, changed(*OTHERS)], "base and tuned .* 1 differ.*fpb:test:0"),
    "another gold label": ([TUNED, changed(WRONG_GOLD, *OTHERS)], "did not answer the same rows"),
    "a row twice": ([TUNED, changed(FIRST, *OTHERS, FIRST)], "two predictions"),
    "one key twice": ([TUNED, TUNED], "each its own key"),
    "no system": ([], "at least one"),
}


@pytest.mark.parametrize(("answers", "message"), REFUSED.values(), ids=REFUSED)
def test_systems_that_cannot_be_compared_are_refused(answers: list[Answers], message: str) -> None:
    """A figure over other rows must not stand in the same table."""
    with pytest.raises(RunError, match=message):
        assessment.score(answers, 100, 7)


def test_scores_read_back_equal(tmp_path: Path) -> None:
    """scores.json holds everything."""
    run = create(tmp_path, "demo")
    scored = assessment.score([TUNED, BASE], 200, 7)
    scored.save(run)
    assert Scores.of(run) == scored


def test_a_run_without_scores_says_so(tmp_path: Path) -> None:
    """It has not been evaluated."""
    with pytest.raises(RunError, match=r"scores\.json is missing"):
        Scores.of(create(tmp_path, "demo"))
