"""What the page says of a model's sureness is what its test showed, or nothing."""

from pathlib import Path

import numpy as np
import pytest

from finllm import predictions
from finllm.example import Example
from finllm.files import write_json
from finllm.predictions import Answers
from finllm.run import Run, create
from launch.reliability import FEWEST, Reliability, reliability


def sure(right: int, wrong: int, confidence: float) -> tuple[tuple[float, bool], ...]:
    return ((confidence, True),) * right + ((confidence, False),) * wrong


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        (27, 3, "Of 30 test answers this sure (between 90% and 95%), about 9 in 10 were right."),
        (30, 0, "Of 30 test answers this sure (between 90% and 95%), all were right."),
        (39, 1, "Of 40 test answers this sure (between 90% and 95%), almost all were right."),
        (1, 39, "Of 40 test answers this sure (between 90% and 95%), almost none were right."),
        (0, 40, "Of 40 test answers this sure (between 90% and 95%), none were right."),
        (FEWEST - 2, 1, ""),
    ],
)
def test_answers_as_sure_as_this_one_are_counted(right: int, wrong: int, said: str) -> None:
    """Only those of the same band of confidence, and only where there are enough."""
    others = sure(500, 0, 0.55)
    assert Reliability((*sure(right, wrong, 0.91), *others)).of_like(0.94) == said


def test_every_confidence_has_a_band() -> None:
    """From a third to certainty; the highest band holds 1."""
    assert "between 99% and 100%" in Reliability(sure(30, 0, 0.999)).of_like(1.0)
    assert "below 50%" in Reliability(sure(30, 0, 0.4)).of_like(1 / 3)
    assert Reliability(()).of_like(0.9) == ""


def test_the_whole_test_is_said_in_numbers() -> None:
    """Or not at all."""
    assert Reliability(sure(110, 60, 0.7)).of_all() == "In the test of this run, 110 of 170 answers were right."
    assert Reliability(sure(FEWEST - 1, 0, 0.7)).of_all() == ""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = create(tmp_path, "demo")
    write_json(made.plan, {})
    return made


def write(run: Run, system: str, part: str, share: float) -> None:
    examples = [
        Example(f"d:{i}", "d", "Text.", "positive", "test" if part == "test" else "validation") for i in range(30)
    ]
    rows = np.tile([1 - share, 0.0, share], (30, 1))
    predictions.write(run, Answers(system, system, 1.0, predictions.of(examples, rows)))


def test_a_run_is_judged_by_its_tuned_model_on_its_test_part(run: Run) -> None:
    """Not by its base, nor by validation; by its base where it has trained nothing."""
    write(run, "base", "test", 0.2)
    assert reliability(str(run.folder)).of_all().startswith("In the test of this run, 0 of 30")
    write(run, "tuned", "validation", 0.2)
    write(run, "tuned", "test", 0.9)
    assert reliability(str(run.folder)).of_all().startswith("In the test of this run, 30 of 30")


def test_a_model_without_a_test_is_not_judged(run: Run, tmp_path: Path) -> None:
    """A run that was not evaluated, a folder, a name."""
    for source in (str(run.folder), str(tmp_path), "smollm2-135m"):
        assert reliability(source) == Reliability(())
