"""`metrics.jsonl` of a run folder: every figure that was logged, one JSON object a line."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finllm.errors import RunError
from finllm.run import Run

Cell = str | float | int | None


@dataclass(frozen=True, slots=True)
class Board:
    """A table to be tracked."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of metrics.jsonl."""

    step: int | None
    """Optimizer step; None for figures of the whole run."""
    time: float
    """Unix time in seconds."""
    stage: str
    numbers: dict[str, float]


class Journal:
    """Writes metrics.jsonl: one line for each call, on disk when the call returns."""

    def __init__(self, run: Run, stage: str) -> None:
        self._path, self._stage = run.metrics, stage
        written = self._path.read_bytes() if self._path.is_file() else b""
        self.lines = written.count(b"\n")
        if not written.endswith(b"\n"):  # a line torn by a crash must not swallow the next
            self._path.write_bytes(written[: written.rfind(b"\n") + 1])

    def log(self, step: int, /, **numbers: float) -> None:
        """Figures of one optimizer step."""
        self._write(step, numbers)

    def summary(self, **numbers: float) -> None:
        """Figures of the whole run."""
        self._write(None, numbers)

    def tables(self, tables: Mapping[str, Board], /) -> None:
        """Tables stand in scores.json and predictions/."""

    def pictures(self, pictures: Mapping[str, bytes], /) -> None:
        """Figures stand in figures/."""

    def finish(self, exit_code: int = 0) -> None:
        """Nothing is left to do."""

    def _write(self, step: int | None, numbers: Mapping[str, float]) -> None:
        known = {"step": step, "time": round(time.time(), 3), "stage": self._stage}
        assert not known.keys() & numbers.keys(), f"figures called {known.keys() & numbers.keys()} have no place"
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**known, **finite}, allow_nan=False) + "\n")
        self.lines += 1


def history(run: Run) -> list[Row]:
    """Every line of metrics.jsonl; a last line without its end, cut off by a crash, is left out.

    A figure that was not finite is NaN. Raises RunError where any other line cannot be read.
    """
    if not run.metrics.is_file():
        return []
    lines = run.metrics.read_bytes().split(b"\n")[:-1]  # the last piece is empty, or torn
    return [_row(line, run.metrics, number) for number, line in enumerate(lines, 1)]


def _row(line: bytes, path: Path, number: int) -> Row:
    try:
        values = json.loads(line)
        step, when, stage = (values.pop(key) for key in ("step", "time", "stage"))
    except (ValueError, KeyError, AttributeError) as error:
        raise RunError(f"{path}:{number}: is no line of figures ({error}); remove the line to read the rest") from error
    return Row(step, when, stage, {name: math.nan if value is None else value for name, value in values.items()})
