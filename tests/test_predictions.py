"""Predictions keep what is needed to score again, and survive the way to disk and back."""

from pathlib import Path

import numpy as np
import pytest

from finllm import predictions
from finllm.errors import RunError
from finllm.example import Example
from finllm.predictions import Answers, Prediction
from finllm.run import Run, create

EXAMPLES = [
    Example(
        "fpb:1", "fpb", "Profit rose.", "positive", "test", source="news", agreement="75-99", group="fpb:g1"
    ),
    Example("fpb:2", "fpb", "A\u0085line\u2028of \r\n odd breaks | €", "neutral", "test", target="Alma"),
    Example("tweets:1", "tweets", "Sales up, guidance cut", "negative", "validation", careless="positive"),
]  # fmt: skip
ROWS = np.array([[0.1, 0.2, 0.7], [1 / 3, 1 / 3, 1 / 3], [0.25, 0.123456789, 0.626543211]])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create(tmp_path, "demo")


def answers(key: str = "tuned") -> Answers:
    return Answers(key, "our model", 1.5, predictions.of(EXAMPLES, ROWS, [False, True, False]))


def test_the_label_with_the_highest_probability_is_predicted() -> None:
    """A tie goes to the first of LABELS, and each row keeps its own facts."""
    first, second, third = answers().predictions
    assert [p.predicted for p in (first, second, third)] == ["positive", "negative", "positive"]
    assert [p.gold for p in (first, second, third)] == ["positive", "neutral", "negative"]
    assert (first.agreement, first.group, first.source) == ("75-99", "fpb:g1", "news")
    assert (second.truncated, second.target, third.careless) == (True, "Alma", "positive")
    assert third.probabilities == (0.25, 0.123457, 0.626543)


def test_each_data_set_and_part_has_its_own_file(run: Run) -> None:
    """Named by data set, part and system."""
    paths = predictions.write(run, answers())
    assert [path.name for path in paths] == ["fpb.test.tuned.jsonl", "tweets.validation.tuned.jsonl"]
    assert sorted(path.name for path in run.predictions.iterdir()) == sorted(path.name for path in paths)


def test_predictions_read_back_equal(run: Run) -> None:
    """One line each, also where a text holds characters that some readers take for line ends."""
    written = answers()
    read = [p for path in predictions.write(run, written) for p in predictions.read(path)]
    assert read == written.predictions


def test_a_damaged_line_is_named(run: Run) -> None:
    """The message says file and line."""
    path = predictions.write(run, answers())[0]
    path.write_text(path.read_text("utf-8").replace('"gold":"neutral"', '"gold":"bullish"'), "utf-8")
    with pytest.raises(RunError, match=r"fpb\.test\.tuned\.jsonl:2: is no prediction"):
        predictions.read(path)


def test_a_missing_file_says_what_writes_it(run: Run) -> None:
    """A run that was not evaluated has no predictions."""
    with pytest.raises(RunError, match=f"finllm evaluate {run.folder}"):
        predictions.read(run.predictions / "fpb.test.tuned.jsonl")


def test_probabilities_that_are_not_numbers_are_refused() -> None:
    """A model whose weights overflow must not be scored as if it had answered."""
    broken = ROWS.copy()
    broken[1, 2] = np.nan
    with pytest.raises(RunError, match=r"1 of 3 rows .* the first is fpb:2"):
        predictions.of(EXAMPLES, broken)


def test_an_example_without_an_answer_is_a_bug() -> None:
    """Rows and examples must be as many."""
    with pytest.raises(ValueError, match="zip"):
        predictions.of(EXAMPLES, ROWS[:2])


def test_optional_facts_take_no_room_on_disk(run: Run) -> None:
    """A field that is not set is not written, and reads back as not set."""
    (path, _) = predictions.write(run, answers())
    assert "careless" not in path.read_text("utf-8")
    assert Prediction.model_fields["careless"].default is None
