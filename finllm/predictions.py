"""Predictions: what one system answered on each row, and the files `predictions/DATASET.PART.SYSTEM.jsonl`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from finllm.errors import RunError
from finllm.example import LABELS, Example, Label, Split
from finllm.files import read_json, write_text
from finllm.run import Run
from finllm.yamlfile import Spec

DIGITS = 6
"""Significant digits of a probability on disk."""


class Prediction(Spec):
    """What one system answered on one row."""

    id: str
    dataset: str
    part: Split
    gold: Label
    predicted: Label
    probabilities: tuple[float, float, float]
    """In the order of LABELS."""
    truncated: bool = False
    """The text was cut to fit the model."""
    text: str
    target: str | None = None
    group: str | None = None
    agreement: str | None = None
    source: str | None = None
    careless: Label | None = None
    """What a careless reader would answer; set on mixed-signal sentences only."""
    seen_by: tuple[str, ...] | None = None
    """Published models that were trained on this row; None is none."""


@dataclass(frozen=True)
class Answers:
    """All answers of one system."""

    key: str
    name: str
    seconds: float
    """For all predictions; loading and fitting are not in it."""
    predictions: Sequence[Prediction]
    latency_ms: float | None = None
    """Median time for one text alone; None where it was not measured."""
    marks: tuple[str, ...] = ()
    """What a reader must know of the system, such as that it was trained on rows it is tested on."""
    saw: str | None = None
    """The name under which rows say, in `seen_by`, that this system was trained on them."""

    @property
    def parts(self) -> list[tuple[str, Split]]:
        """Data set and part of all rows, in the order of the predictions."""
        return list(dict.fromkeys((p.dataset, p.part) for p in self.predictions))


def of(
    examples: Sequence[Example], probabilities: NDArray[np.float64], truncated: Sequence[bool] = ()
) -> list[Prediction]:
    """A prediction for each example from its row of `probabilities`; a tie goes to the first of LABELS.

    Raises RunError where a probability is not a number.
    """
    broken = [e.id for e, row in zip(examples, probabilities, strict=True) if not np.isfinite(row).all()]
    if broken:
        raise RunError(
            f"{len(broken)} of {len(examples)} rows have probabilities that are not numbers, the first is {broken[0]}; "
            "the model's weights hold NaN or overflow in this dtype (try model.dtype=fp32)"
        )
    cut = truncated or [False] * len(examples)
    return [_prediction(e, p, t) for e, p, t in zip(examples, probabilities.tolist(), cut, strict=True)]


def _prediction(example: Example, row: list[float], truncated: bool) -> Prediction:
    first, second, third = (float(f"{p:.{DIGITS}g}") for p in row)
    return Prediction(
        id=example.id,
        dataset=example.dataset,
        part=example.split,
        gold=example.label,
        predicted=LABELS[row.index(max(row))],
        probabilities=(first, second, third),
        truncated=truncated,
        text=example.text,
        target=example.target,
        group=example.group,
        agreement=example.agreement,
        source=example.source,
        careless=example.careless,
        seen_by=example.seen_by or None,
    )


def write(run: Run, answers: Answers) -> list[Path]:
    """Write one file for each data set and part of a system's answers; returns their paths."""
    run.predictions.mkdir(exist_ok=True)
    written = []
    for dataset, part in answers.parts:
        path = run.predictions / f"{dataset}.{part}.{answers.key}.jsonl"
        rows = (p for p in answers.predictions if (p.dataset, p.part) == (dataset, part))
        write_text(path, "".join(p.model_dump_json(exclude_none=True) + "\n" for p in rows))
        written.append(path)
    return written


def read(path: Path) -> list[Prediction]:
    """The predictions in a file; raises RunError that names the line where it is damaged."""
    if not path.is_file():
        raise RunError(f"{path} is missing; `finllm evaluate {path.parent.parent}` writes it")
    return [_read(line, path, number) for number, line in enumerate(_lines(path), 1)]


def _lines(path: Path) -> list[str]:
    # Not splitlines: that also splits inside a text that holds U+0085 or U+2028.
    return path.read_text("utf-8").removesuffix("\n").split("\n")


def _read(line: str, path: Path, number: int) -> Prediction:
    try:
        return Prediction.model_validate(json.loads(line))
    except (ValueError, ValidationError) as error:
        raise RunError(f"{path}:{number}: is no prediction ({error}); write the file again with evaluate") from error


def changed(prediction: Prediction, row: Sequence[float]) -> Prediction:
    """The prediction with other probabilities, and the label that follows from them."""
    first, second, third = (float(f"{p:.{DIGITS}g}") for p in row)
    best = LABELS[max(range(len(LABELS)), key=lambda i: row[i])]
    return prediction.model_copy(update={"probabilities": (first, second, third), "predicted": best})


def of_run(run: Run, key: str | None = None) -> Answers:
    """What a system of an evaluated run answered on all its rows; without a key, the run's own system.

    Raises RunError where the run was not evaluated.
    """
    systems = read_json(run.scores)["systems"]
    one = next((system for system in systems if key in (None, system["key"])), None)
    if one is None:
        raise RunError(f"{run.name} has no system {key}; it has {', '.join(system['key'] for system in systems)}")
    files = sorted(run.predictions.glob(f"*.{one['key']}.jsonl"))
    rows = [p for path in files for p in read(path)]
    return Answers(
        one["key"],
        one["name"],
        one["seconds"],
        rows,
        latency_ms=one.get("latency_ms"),
        marks=tuple(one.get("marks", ())),
    )
