"""Financial PhraseBank v1.0 (Malo et al. 2014, arXiv 1307.5336): 4,846 sentences of Finnish company news."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from finllm.data import places, tables
from finllm.data.spec import AbsolutePath, DatasetSpec
from finllm.errors import DataError
from finllm.example import LABELS, Example

FILE = "Sentences_50Agree.txt"
Band = Literal["100", "75-99", "66-75", "50-66"]
LEVELS: dict[int, tuple[Band, ...]] = {
    50: ("100", "75-99", "66-75", "50-66"),
    66: ("100", "75-99", "66-75"),
    75: ("100", "75-99"),
    100: ("100",),
}
"""Bands of annotator agreement that each of the release's four nested files holds."""
HUB = places.HubFiles("takala/financial_phrasebank", ("data/FinancialPhraseBank-v1.0.zip",))
GET = (
    f"Get FinancialPhraseBank-v1.0.zip from {HUB.repo} on the Hugging Face hub, then set `path` to it, "
    "or unpack it so that $FINLLM_DATA/phrasebank/Sentences_50Agree.txt is there"
)


class PhraseBank(DatasetSpec):
    """Financial PhraseBank; each sentence was labelled by 5 to 8 annotators."""

    name: Literal["phrasebank"]
    agreement: Literal[50, 66, 75, 100] = 50
    """Least agreement of the annotators in per cent, in all three parts alike."""
    bands: tuple[Band, ...] | None = Field(default=None, min_length=1)
    """Only these bands of agreement, such as `["50-66"]`; null is all that `agreement` allows."""
    split: tables.SplitName = "split_s42"
    """One split serves every agreement level; `cv5-0` to `cv5-4` are five folds."""
    path: AbsolutePath | None = None
    """The unpacked folder, or the zip file; null looks in the usual places, then on the hub."""

    @model_validator(mode="after")
    def _agrees(self) -> "PhraseBank":
        below = [band for band in self.bands or () if band not in LEVELS[self.agreement]]
        if below:
            raise ValueError(
                f"bands {', '.join(below)} are below agreement {self.agreement}; lower `agreement`, or keep to "
                f"{', '.join(LEVELS[self.agreement])}"
            )
        return self

    @property
    def twins_grouped(self) -> bool:
        """The groups of the split table hold all near twins."""
        return True

    def read(self) -> list[Example]:
        """The sentences of the wanted agreement, without repeated and contradictory ones, in the order of the file."""
        place = places.locate("phrasebank", self.path, (FILE,), GET, HUB)
        bands = self.bands or LEVELS[self.agreement]
        return [
            Example(
                id=f"{self.title}:{row['row']}",
                dataset=self.title,
                text=raw.text,
                label=raw.label,
                split=tables.part(row, self.split),
                source="news",
                agreement=row["band"],
                group=f"{self.title}:{row['group']}",
                seen_by=tuple(name for name in ("prosus", "fingpt") if row[name] in ("train", "validation")),
            )
            for row, raw in tables.kept("phrasebank", _lines(place), place)
            if row["band"] in bands
        ]


def _lines(place: Path) -> dict[str, tables.Raw]:
    """Sentence and label of every line, by its number from 1."""
    lines = places.read(place, FILE).decode("latin-1").replace("\r\n", "\n").split("\n")
    found = {}
    for number, line in enumerate(lines, 1):
        sentence, at, label = line.rpartition("@")  # a sentence may hold an @ too
        if at and label in LABELS:
            found[str(number)] = tables.Raw(sentence, label)
        elif line:
            raise DataError(f"{place}: line {number} of {FILE} is no `sentence@label`: {line[:60]!r}")
    return found
