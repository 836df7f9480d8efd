"""Rows with named columns, from a file or the hub, as examples: labels mapped, faults collected, a split where none is."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from finllm.data import ownsplit
from finllm.data.spec import DatasetSpec
from finllm.errors import DataError
from finllm.example import LABELS, Example, Label, Split

SHOWN = 5
"""Faulty rows named in a message."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record as it was read."""

    name: str
    """Unique in its data set; becomes part of the example's id."""
    place: str
    """Where a person finds it, such as `line 12`."""
    values: Mapping[str, Any]
    split: Split | None = None
    """The part that the data set itself names."""


class ColumnsSpec(DatasetSpec):
    """A data set with a text and a label column."""

    text: str = "text"
    """Column of the text."""
    label: str = "label"
    """Column of the label."""
    target: str | None = None
    """Column of the company or asset that the label is about."""
    source: str | None = None
    """Column of the kind of text."""
    group: str | None = None
    """Column that names what belongs together, such as a document: our own split keeps it in one part."""
    explanation: str | None = None
    """Column of the reason for the label."""
    labels: dict[str, Label] = Field(default={label: label for label in LABELS}, min_length=1)
    """What the values of the label column mean, such as `{bearish: negative, 1: positive}`; case does not matter."""
    split_seed: int = Field(default=42, ge=0)
    """Draws our own 70/10/20 split, where the data set brings none."""

    @property
    def wanted_columns(self) -> list[str]:
        """Every column that the recipe names."""
        optional = (self.target, self.source, self.group, self.explanation)
        return [self.text, self.label, *(column for column in optional if column is not None)]

    def check_columns(self, where: str, columns: Iterable[str], also: Sequence[str] = ()) -> None:
        """Raise DataError where a column that the recipe names is not among `columns`."""
        known = list(columns)
        faults = [_missing(column, known) for column in (*self.wanted_columns, *also) if column not in known]
        if faults:
            raise DataError(f"{where}: {'; '.join(faults)}. Columns here: {', '.join(known) or 'none'}")

    def examples(self, where: str, rows: Sequence[Row]) -> list[Example]:
        """The rows as examples, split by us unless the rows say their part; raises one DataError for all faults."""
        if not rows:
            raise DataError(f"{where}: holds no rows")
        meaning = {value.strip().casefold(): label for value, label in self.labels.items()}
        labels = [meaning.get(_word(row.values.get(self.label)).casefold()) for row in rows]
        texts = [_word(row.values.get(self.text)) for row in rows]
        empty = [row for row, text in zip(rows, texts, strict=True) if not text]
        unknown = [row for row, label in zip(rows, labels, strict=True) if label is None]
        if empty or unknown:
            raise DataError("\n".join([f"{where}:", *self._faults(empty, unknown)]))
        return self._built(rows, texts, [label for label in labels if label is not None])

    def _built(self, rows: Sequence[Row], texts: Sequence[str], labels: Sequence[Label]) -> list[Example]:
        own = [_value(row, self.group) for row in rows]
        splits = [row.split for row in rows if row.split is not None]
        if len(splits) == len(rows):
            groups = [None if name is None else f"{self.title}:{name}" for name in own]
        else:
            splits, numbers = ownsplit.split(texts, labels, own, self.split_seed)
            groups = [f"{self.title}:{rows[number].name}" for number in numbers]
        return [
            Example(
                id=f"{self.title}:{row.name}",
                dataset=self.title,
                text=text,
                label=label,
                split=split,
                target=_value(row, self.target),
                source=_value(row, self.source),
                group=group,
                explanation=_value(row, self.explanation),
            )
            for row, text, label, split, group in zip(rows, texts, labels, splits, groups, strict=True)
        ]

    def _faults(self, empty: Sequence[Row], unknown: Sequence[Row]) -> Iterable[str]:
        if empty:
            places = ", ".join(row.place for row in empty[:SHOWN])
            yield f"  {len(empty)} row(s) without text in column {self.text} ({places}{_more(empty)}); take them out"
        if unknown:
            shown = ", ".join(f"{row.values.get(self.label)!r} at {row.place}" for row in unknown[:SHOWN])
            yield (
                f"  {len(unknown)} row(s) whose label in column {self.label} is not known ({shown}{_more(unknown)}); "
                f"known here: {', '.join(self.labels)}. Say what others mean with `labels`, such as "
                "`labels: {bearish: negative}`, or take the rows out"
            )


def _missing(column: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(column.casefold(), [name.casefold() for name in known], n=1, cutoff=0.5)
    hint = next((name for name in known if near and name.casefold() == near[0]), None)
    return f"there is no column {column}" + (f"; did you mean {hint}?" if hint else "")


def _word(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _value(row: Row, column: str | None) -> str | None:
    """The row's value in an optional column; None where it is empty."""
    return (_word(row.values.get(column)) or None) if column else None


def _more(rows: Sequence[Row]) -> str:
    return ", ..." if len(rows) > SHOWN else ""
