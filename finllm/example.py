"""The one record that passes between data sets, prompts, training and evaluation."""

from dataclasses import dataclass
from typing import Literal

Label = Literal["negative", "neutral", "positive"]
LABELS: tuple[Label, ...] = ("negative", "neutral", "positive")
"""Every table, probability row and confusion matrix uses this order."""

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled text."""

    id: str
    """Unique over all data sets, such as `phrasebank:1234`; stands in predictions and error messages."""
    dataset: str
    """Name of the data set, as in the recipe."""
    text: str
    label: Label
    split: Split
    target: str | None = None
    """The company or asset the sentiment is about, where the data set names one and the recipe uses it."""
    source: str | None = None
    """Kind of text within the data set: `headline`, `post`, `news`, `filing`, ..."""
    agreement: str | None = None
    """Band of annotator agreement in per cent: `100`, `75-99`, `66-75`, `50-66`."""
    group: str | None = None
    """Near twins share a group; no split separates them, and bootstrap draws whole groups."""
    careless: Label | None = None
    """What a careless reader would answer; set on mixed-signal sentences only."""
    seen_by: tuple[str, ...] = ()
    """Published models whose training or validation rows hold this one, as the split tables call them: `prosus`."""
    explanation: str | None = None
    """Why the label is right, in one or two sentences."""
