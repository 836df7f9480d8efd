"""The split tables in `splits/`: which row of the original files is in which part."""

import csv
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from finllm.data.twins import normalise
from finllm.errors import DataError
from finllm.example import Label, Split

FOLDER = Path(__file__).with_name("splits")
SplitName = Literal[
    "split_s42", "split_s1", "split_s2", "split_s3", "split_s4", "cv5-0", "cv5-1", "cv5-2", "cv5-3", "cv5-4"
]
"""Five random splits (70/10/20) and five folds; the test part of cv5-0 is that of split_s42."""


@dataclass(frozen=True, slots=True)
class Raw:
    """One row as the original file has it."""

    text: str
    label: Label
    """For the check: what the table must say too."""
    target: str | None = None
    score: float = 0.0
    """From -1 to 1, where the file has scores."""


def key(text: str) -> str:
    """The hash by which the tables know a text."""
    return hashlib.sha1(normalise(text).encode()).hexdigest()[:12]  # noqa: S324 - names a text, keeps no secret


def kept(name: str, found: Mapping[str, Raw], place: Path) -> Iterator[tuple[dict[str, str], Raw]]:
    """The table's rows with status keep, each with the row of the original file.

    Raises DataError where `found` (by row name) differs from the release that the table was made from.
    """
    with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        table = {row["row"]: row for row in csv.DictReader(file)}
    wrong = [row for row in table if row not in found or not _agrees(table[row], found[row])]
    extra = [row for row in found if row not in table]
    if wrong or extra:
        raise DataError(_difference(place, len(table), wrong, extra, found))
    return ((row, found[number]) for number, row in table.items() if row["status"] == "keep")


def part(row: Mapping[str, str], split: str) -> Split:
    """The part of a row in the split; of the five folds, `cv5-k` tests on fold k and validates on fold k + 1 (mod 5)."""
    if split.startswith("cv5-"):
        ahead = (int(row["cv5"]) - int(split[-1])) % 5
        return "test" if ahead == 0 else "validation" if ahead == 1 else "train"
    return cast("Split", row[split])


def _agrees(row: Mapping[str, str], raw: Raw) -> bool:
    return row["key"] == key(raw.text) and row["label"] == raw.label


def _difference(place: Path, total: int, wrong: list[str], extra: list[str], found: Mapping[str, Raw]) -> str:
    """What is wrong with this copy of the data, in words."""
    first = (wrong or extra)[0]
    raw = found.get(first)
    shown = f"{raw.text[:60]!r} ({raw.label})" if raw else "it is missing"
    return (
        f"{place}: {len(wrong)} of {total} rows differ from the original release and {len(extra)} are too many; "
        f"the first is row {first}: {shown}. The split tables fit the original files only; get an unchanged copy"
    )
