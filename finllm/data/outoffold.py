"""Predictions on training rows by the runs of a sweep, each of which held one fold of them out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finllm.data.folds import numbers
from finllm.data.parts import Parts
from finllm.data.spec import DatasetSpec
from finllm.errors import DataError, RunError
from finllm.files import read_json
from finllm.run import Run
from finllm.sweeps import Sweep

Shares = tuple[float, float, float]
"""Probabilities, in the order of LABELS."""


def probabilities(sweep: Path, parts: Parts, data: Sequence[DatasetSpec]) -> dict[str, Shares]:
    """The probabilities of each training row's labels, by its id, by the model that had not seen it.

    Rows are those of the one data set that the sweep goes over. Raises DataError where a fold is missing, was made from
    other data than `data`, or answers a row of the validation or test part.
    """
    runs = _runs(sweep)
    held_out: dict[tuple[int, int], Run] = {}
    titles: set[str] = set()
    for run in runs:
        title, fold = _held_out_by(run, data)
        titles.add(title)
        held_out[fold] = run
    count = max(count for _, count in held_out)
    missing = [f"{number}/{count}" for number in range(1, count + 1) if (number, count) not in held_out]
    if missing or len(held_out) != count or len(titles) != 1:
        found = ", ".join(f"{number}/{of}" for number, of in sorted(held_out))
        raise DataError(f"{sweep}: needs each fold of one data set once, and has {found}; sweep over all of them")
    (title,) = titles
    shares = {row.id: row.probabilities for run in held_out.values() for row in _predictions(run, title)}
    _refuse_others(sweep, title, parts, set(shares))
    return shares


def _runs(sweep: Path) -> list[Run]:
    """The runs of a sweep; raises DataError where they are not all evaluated."""
    try:
        runs = Sweep.of(sweep).runs
    except RunError as error:
        raise DataError(
            f"{sweep} is no sweep ({error}); `finllm launch SFT-RECIPE --name {sweep.name} --sweep "
            "data.0.fold=1/5,2/5,3/5,4/5,5/5` makes one"
        ) from error
    undone = [run.name for run in runs if not run.scores.is_file()]
    if undone or not runs:
        raise DataError(f"{sweep}: not evaluated yet: {', '.join(undone)}; `finllm resume {sweep.name}` goes on")
    return runs


def _held_out_by(run: Run, data: Sequence[DatasetSpec]) -> tuple[str, tuple[int, int]]:
    """The data set and the fold that a run held out; refuses a run on other data than `data`."""
    try:
        specs: list[dict[str, Any]] = read_json(run.plan)["recipe"]["data"]
    except (RunError, KeyError, TypeError) as error:
        raise DataError(f"{run.folder}: its plan.json does not say what it trained on; make the fold anew") from error
    folded = [(spec, own.title) for spec, own in zip(specs, data, strict=False) if spec.get("fold")]
    if len(folded) != 1:
        raise DataError(f"{run.folder}: held out no fold of one data set, so that it has seen what it would judge")
    # The recipe may have data sets of its own behind those of the folds.
    if [_rows_of(spec) for spec in specs] != [_rows_of(spec.model_dump(mode="json")) for spec in data[: len(specs)]]:
        raise DataError(f"{run.folder}: was made from other data than this recipe's, or another split; sweep anew")
    spec, title = folded[0]
    return title, numbers(str(spec["fold"]))


def _rows_of(spec: dict[str, Any]) -> dict[str, Any]:
    """What decides which rows a data set has, of what was written in a recipe or is its default."""
    return {key: value for key, value in spec.items() if key not in {"fold", "path"} and value is not None}


def _predictions(run: Run, title: str) -> list[Any]:
    from finllm import predictions  # needs numpy

    return predictions.read(run.predictions / f"{title}.test.tuned.jsonl")


def _refuse_others(sweep: Path, title: str, parts: Parts, found: set[str]) -> None:
    """Refuse predictions of held-out rows, and training rows without a prediction."""
    foreign = sorted(found & {row.id for row in (*parts.validation, *parts.test)})
    if foreign:
        raise DataError(
            f"{sweep}: predictions of {len(foreign)} row(s) of the validation or test part, such as {foreign[0]}; no pair "
            "may come from those. Sweep over folds of this recipe's data"
        )
    lacking = [row.id for row in parts.train if row.dataset == title and row.id not in found]
    if lacking:
        raise DataError(
            f"{sweep}: no prediction of {len(lacking)} training row(s), such as {lacking[0]}; sweep over folds of this "
            "recipe's data"
        )
