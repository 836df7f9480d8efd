"""A user's own file: CSV, TSV, JSONL or Parquet, with a text and a label column."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from finllm.data.columns import SHOWN, ColumnsSpec, Row
from finllm.data.spec import AbsolutePath
from finllm.errors import DataError
from finllm.example import Example, Split

PARTS: dict[str, Split] = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
"""What a split column may say."""


class Table(ColumnsSpec):
    """One file of your own; the suffix says which format it is in."""

    name: Literal["table"]
    path: AbsolutePath
    """A .csv, .tsv, .jsonl or .parquet file; text is UTF-8."""
    split: str | None = None
    """Column that says train, validation (or valid, val, dev) or test; null splits 70/10/20 by `split_seed`."""

    @property
    def twins_grouped(self) -> bool:
        """Our own split keeps near twins in one group; a split column may not."""
        return self.split is None

    def read(self) -> list[Example]:
        """Every row of the file; raises one DataError for everything that is wrong with it."""
        read = READERS.get(self.path.suffix.lower())
        if read is None:
            raise DataError(f"{self.path}: the suffix says no known format; known are {', '.join(READERS)}")
        if not self.path.is_file():
            raise DataError(f"{self.path}: there is no such file; correct `path` of the data set {self.title}")
        columns, rows = read(self.path)
        if not rows:
            raise DataError(f"{self.path}: holds no rows")
        self.check_columns(str(self.path), columns, [self.split] if self.split else [])
        return self.examples(str(self.path), self._placed(rows) if self.split else rows)

    def _placed(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with the part that their split column names."""
        column = self.split or ""
        parts = [PARTS.get(str(row.values.get(column)).strip().casefold()) for row in rows]
        wrong = [row for row, part in zip(rows, parts, strict=True) if part is None]
        if wrong:
            shown = ", ".join(f"{row.values.get(column)!r} at {row.place}" for row in wrong[:SHOWN])
            raise DataError(
                f"{self.path}: {len(wrong)} row(s) whose part in column {column} is not known ({shown}); "
                f"write {', '.join(PARTS)}"
            )
        return [Row(row.name, row.place, row.values, part) for row, part in zip(rows, parts, strict=True)]


Read = tuple[list[str], list[Row]]
"""Column names, and the rows."""


def _csv(path: Path, delimiter: str = ",") -> Read:
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        records = list(_records(reader))
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num} is not CSV: {error}") from error
    if not records:
        return [], []
    columns = [name.strip() for name in records[0][1]]
    uneven = [(line, len(fields)) for line, fields in records[1:] if len(fields) != len(columns)]
    if uneven or len(set(columns)) < len(columns):
        line, count = uneven[0] if uneven else (records[0][0], 0)
        what = f"has {count} fields, the header has {len(columns)}" if uneven else "names a column twice"
        raise DataError(f"{path}: line {line} {what} ({len(uneven)} such line(s)); quote texts that hold {delimiter!r}")
    rows = [Row(str(line), f"line {line}", dict(zip(columns, fields, strict=True))) for line, fields in records[1:]]
    return columns, rows


def _records(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The line each record starts on, and its fields; blank lines are left out."""
    start = 1
    for fields in reader:
        if fields:
            yield start, fields
        start = reader.line_num + 1


def _jsonl(path: Path) -> Read:
    columns: dict[str, None] = {}
    rows = []
    for line, text in enumerate(_text(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {line} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise DataError(
                f"{path}: line {line} is {text[:40]!r}; write an object such as {{'text': ..., 'label': ...}}"
            )
        columns |= dict.fromkeys(values)
        rows.append(Row(str(line), f"line {line}", values))
    return list(columns), rows


def _parquet(path: Path) -> Read:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not Parquet: {error}") from error
    rows = [Row(str(i), f"row {i}", values) for i, values in enumerate(table.to_pylist(), 1)]
    return table.column_names, rows


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}: line {line} is not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8, such as "
            f"with `iconv -f WINDOWS-1252 -t UTF-8 {path.name}`"
        ) from error


READERS = {".csv": _csv, ".tsv": lambda path: _csv(path, "\t"), ".jsonl": _jsonl, ".parquet": _parquet}
