"""FiQA 2018 task 1 (Maia et al. 2018): headlines and StockTwits posts, one score per sentence and target."""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

from finllm.data import places, tables
from finllm.data.spec import AbsolutePath, DatasetSpec
from finllm.errors import DataError
from finllm.example import Example, Label

KINDS = ("headline", "post")
FILES = tuple(f"task1_{kind}_ABSA_train.json" for kind in KINDS)
"""Only these two files of the release have scores."""
GET = (
    f"Get {' and '.join(FILES)} of the FiQA 2018 release (https://sites.google.com/view/fiqa; a copy: "
    "https://github.com/elinsky/fiqa at commit 31b144b, its first) into $FINLLM_DATA/fiqa, or set `path` to their "
    "folder. The hub has no copy with the rows of this release"
)


def _known_threshold(value: float) -> float:
    if value not in (0.1, 0.2):
        raise ValueError(f"threshold is {value}; write 0.1 (as published) or 0.2 (to see how much it matters)")
    return value


class Fiqa(DatasetSpec):
    """FiQA; scores from -1 to 1 become three classes."""

    name: Literal["fiqa"]
    target: bool = False
    """Show the model which company or asset the score is about; 11 sentences have several answers without it."""
    threshold: Annotated[float, AfterValidator(_known_threshold)] = 0.1
    """Negative below minus this, positive from this on, neutral between (0.1 as in arXiv 2303.17564, appendix B)."""
    split: tables.SplitName = "split_s42"
    """`split_s42` is the headline split; `cv5-0` to `cv5-4` are five folds."""
    path: AbsolutePath | None = None
    """Folder of the release's JSON files; null looks in the usual places."""

    @property
    def twins_grouped(self) -> bool:
        """The groups of the split table hold all near twins."""
        return True

    def read(self) -> list[Example]:
        """One example per sentence and target, without repeated ones, in the order of the files."""
        place = places.locate("fiqa", self.path, FILES, GET)
        return [
            Example(
                id=f"{self.title}:{row['row']}",
                dataset=self.title,
                text=raw.text,
                label=label_of(raw.score, self.threshold),
                split=tables.part(row, self.split),
                target=raw.target if self.target else None,
                source=row["row"].split("-")[0],
                group=f"{self.title}:{row['group']}",
            )
            for row, raw in tables.kept("fiqa", _scored_rows(place), place)
        ]


def label_of(score: float, threshold: float = 0.1) -> Label:
    """The class of a score: negative below -threshold, positive from threshold on."""
    return "negative" if score < -threshold else "positive" if score >= threshold else "neutral"


def _scored_rows(place: Path) -> dict[str, tables.Raw]:
    """Every scored row, by kind, id and place in the sentence's list of scores."""
    found = {}
    for kind, file in zip(KINDS, FILES, strict=True):
        try:
            for name, entry in json.loads(places.read(place, file)).items():
                for index, info in enumerate(entry["info"]):
                    score = float(info["sentiment_score"])
                    row = tables.Raw(entry["sentence"], label_of(score), info["target"], score)
                    found[f"{kind}-{name}-{index}"] = row
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{place}: {file} is not the JSON of the FiQA release ({error!r}). {GET}") from error
    return found
