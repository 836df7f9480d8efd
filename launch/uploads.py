"""A table that somebody uploads, and the one that they get back."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finllm.errors import DataError
from finllm.example import LABELS

MAX_ROWS = 20_000
LIKELY = ("text", "sentence", "headline", "title", "news", "body", "content")
"""Names of a column of texts, the likeliest first."""
ADDED = ("sentiment", "confidence", *(f"p_{label}" for label in LABELS))


@dataclass(frozen=True)
class Upload:
    """A table as it was read."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def likely_column(self) -> int:
        """Index of the column that most likely holds the texts: by its name, else the one with the longest cells."""
        names = [column.strip().casefold() for column in self.columns]
        for name in LIKELY:
            if name in names:
                return names.index(name)
        lengths = [sum(len(row[index]) for row in self.rows) for index in range(len(self.columns))]
        return lengths.index(max(lengths))

    def texts(self, column: int) -> dict[int, str]:
        """The texts of a column by row; rows without one are left out."""
        return {index: row[column] for index, row in enumerate(self.rows) if row[column].strip()}


def read(name: str, content: bytes) -> Upload:
    """A CSV file with a header; raises DataError that says what is wrong with it and what to do."""
    if not content.strip():
        raise DataError(f"{name} is empty; upload a CSV file with a header and at least one row")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text (byte {error.start}); save it as 'CSV UTF-8'") from error
    try:
        lines = [
            row for row in csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True) if row
        ]
    except csv.Error as error:
        raise DataError(f"{name} is no CSV file: {error}; are its quotes closed?") from error
    if len(lines) < 2:
        raise DataError(f"{name} has a header but no rows; the first line must name the columns")
    header, *rows = lines
    if len(rows) > MAX_ROWS:
        raise DataError(f"{name} has {len(rows):,} rows; upload at most {MAX_ROWS:,}, or use `finllm predict --file`")
    wrong = next((number for number, row in enumerate(rows, 2) if len(row) != len(header)), None)
    if wrong is not None:
        found = len(rows[wrong - 2])
        raise DataError(
            f"{name}: row {wrong} has {found} cells and the header {len(header)}; put texts with commas in quotes"
        )
    return Upload(name, tuple(header), tuple(map(tuple, rows)))


def _delimiter(text: str) -> str:
    """What the header is divided by most often; a comma where by nothing."""
    header = text.split("\n", 1)[0]
    return max(",;\t", key=header.count)


def answered(upload: Upload, answers: Mapping[int, Mapping[str, Any]]) -> bytes:
    """The table with label, confidence and probabilities added, as CSV in UTF-8; rows without a text get none."""
    names = [f"{name}_finllm" if name in upload.columns else name for name in ADDED]
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow([*upload.columns, *names])
    for index, row in enumerate(upload.rows):
        writer.writerow([*row, *_cells(answers.get(index))])
    return out.getvalue().encode()


def _cells(answer: Mapping[str, Any] | None) -> Sequence[str]:
    if answer is None:
        return [""] * len(ADDED)
    shares = [f"{answer['probabilities'][label]:.6f}" for label in LABELS]
    return [answer["sentiment"], f"{answer['confidence']:.6f}", *shares]
