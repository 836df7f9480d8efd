"""How far a model's sureness can be believed, in words, from what it answered in its run's test."""

from dataclasses import dataclass
from pathlib import Path

from finllm import predictions
from finllm.run import Run

EDGES = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Where bands of confidence begin; the last one ends at 1."""
FEWEST = 20
"""Answers in a band below which nothing is said of it."""


@dataclass(frozen=True)
class Reliability:
    """Confidences of test answers, and which were right."""

    answers: tuple[tuple[float, bool], ...]

    @classmethod
    def of(cls, run: Run) -> "Reliability":
        """Of the tuned model, else of the base, on all test parts of a run; none where it was not evaluated."""
        for system in ("tuned", "base"):
            files = sorted(run.predictions.glob(f"*.test.{system}.jsonl"))
            rows = [row for file in files for row in predictions.read(file)]
            if rows:
                return cls(tuple((max(row.probabilities), row.predicted == row.gold) for row in rows))
        return cls(())

    def of_all(self) -> str:
        """How many test answers were right; empty where there are too few."""
        if len(self.answers) < FEWEST:
            return ""
        right = sum(is_right for _, is_right in self.answers)
        return f"In the test of this run, {right:,} of {len(self.answers):,} answers were right."

    def of_like(self, confidence: float) -> str:
        """How many test answers as sure as this one were right; empty where there are too few."""
        low, high = _band(confidence)
        alike = [is_right for sure, is_right in self.answers if _band(sure) == (low, high)]
        if len(alike) < FEWEST:
            return ""
        between = f"between {low:.0%} and {high:.0%}" if low else f"below {high:.0%}"
        return f"Of {len(alike)} test answers this sure ({between}), {_share(sum(alike), len(alike))} were right."


def _share(right: int, of: int) -> str:
    tenths = round(10 * right / of)
    if tenths in (0, 10):
        return {0: "none", of: "all"}.get(right, "almost none" if tenths == 0 else "almost all")
    return f"about {tenths} in 10"


def _band(confidence: float) -> tuple[float, float]:
    low = max(edge for edge in EDGES if edge <= confidence)
    return low, next((edge for edge in EDGES if edge > low), 1.0)


def reliability(source: str) -> Reliability:
    """That of a run folder; of anything else, which has no test, none."""
    folder = Path(source)
    return Reliability.of(Run(folder)) if (folder / "plan.json").is_file() else Reliability(())
