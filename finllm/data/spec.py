"""What every data set of a recipe has in common."""

from abc import abstractmethod
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from finllm.data import folds
from finllm.example import Example, Split
from finllm.yamlfile import Spec

AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
"""A path, relative to the current folder where it is not absolute."""


def _fold(text: str) -> str:
    folds.numbers(text)
    return text


class DatasetSpec(Spec):
    """One data set of a recipe. A subclass sets `name: Literal["..."]` and reads the rows."""

    name: str
    alias: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """What tables and file names call this set; needed where a recipe uses one set twice."""
    parts: tuple[Split, ...] = Field(default=("train", "validation", "test"), min_length=1)
    """Use only these parts, such as `[test]` for a set that is only evaluated."""
    train_rows: int | None = Field(default=None, ge=1)
    """Use at most so many training rows, drawn with a fixed seed; null is all."""
    fold: Annotated[str, AfterValidator(_fold)] | None = None
    """`2/5` trains on the other four fifths of the training part, and tests on this one; the test part is left out."""

    @property
    def title(self) -> str:
        """What tables and file names call this set."""
        return self.alias or self.name

    @property
    def twins_grouped(self) -> bool:
        """Whether all near twins of the set are known to share a group; else the leak check looks for them."""
        return False

    @abstractmethod
    def read(self) -> list[Example]:
        """Every row of every part, in the order of the files; raises DataError where they cannot be had."""
