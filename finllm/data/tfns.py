"""Twitter Financial News Sentiment (zeroshot/twitter-financial-news-sentiment): 11,931 tweets."""

import csv
import io
from pathlib import Path
from typing import Literal

from finllm.data import places, tables
from finllm.data.spec import AbsolutePath, DatasetSpec
from finllm.errors import DataError
from finllm.example import Example, Label

FILES = {"train": "sent_train.csv", "valid": "sent_valid.csv"}
CODES: dict[str, Label] = {"0": "negative", "1": "positive", "2": "neutral"}
"""The release says bearish, bullish, neutral."""
HUB = places.HubFiles("zeroshot/twitter-financial-news-sentiment", tuple(FILES.values()))
GET = (
    f"Get {' and '.join(FILES.values())} from {HUB.repo} on the Hugging Face hub into $FINLLM_DATA/tfns, or set `path`"
)


class Tfns(DatasetSpec):
    """Tweets of financial news; sent_valid.csv is the test part, 5 % of sent_train.csv the validation part."""

    name: Literal["tfns"]
    path: AbsolutePath | None = None
    """Folder of the two CSV files; null looks in the usual places, then on the hub."""

    @property
    def twins_grouped(self) -> bool:
        """The groups of the split table hold all near twins, and rows of train near the test part are left out."""
        return True

    def read(self) -> list[Example]:
        """The tweets without repeated and contradictory ones, and without training rows near the test part."""
        place = places.locate("tfns", self.path, tuple(FILES.values()), GET, HUB)
        return [
            Example(
                id=f"{self.title}:{row['row']}",
                dataset=self.title,
                text=raw.text,
                label=raw.label,
                split=tables.part(row, "split"),
                source="tweet",
                group=f"{self.title}:{row['group']}",
            )
            for row, raw in tables.kept("tfns", _records(place), place)
        ]


def _records(place: Path) -> dict[str, tables.Raw]:
    """Every record of both files, by file and number from 0; some tweets hold line breaks."""
    found = {}
    for name, file in FILES.items():
        try:
            for number, row in enumerate(csv.DictReader(io.StringIO(places.read(place, file).decode(), newline=""))):
                found[f"{name}-{number}"] = tables.Raw(row["text"], CODES[row["label"]])
        except (ValueError, KeyError, csv.Error) as error:
            raise DataError(f"{place}: {file} is not the CSV of the release ({error!r}). {GET}") from error
    return found
