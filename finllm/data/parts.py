"""The training, validation and test part of a recipe's data sets, as they stand in their files."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from finllm.data import folds
from finllm.data.spec import DatasetSpec
from finllm.errors import DataError
from finllm.example import SPLITS, Example

DRAW_SEED = 42
"""For `train_rows`: a smaller number draws a subset of what a larger one draws."""


@dataclass(frozen=True)
class Parts:
    """The three parts over all data sets of a recipe, each in the order of recipe and file."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    twins_grouped: frozenset[str] = frozenset()
    """Titles of the sets whose near twins all share a group."""

    @property
    def rows(self) -> tuple[Example, ...]:
        """All three parts."""
        return (*self.train, *self.validation, *self.test)


def read_parts(specs: Sequence[DatasetSpec]) -> Parts:
    """The rows that the recipe asks for; raises DataError where a set is missing or one of its asked parts is empty."""
    rows = [example for spec in specs for example in _wanted(spec)]
    again = [name for name, count in Counter(example.id for example in rows).items() if count > 1]
    if again:
        raise DataError(
            f"{len(again)} example id(s) occur more than once, the first is {again[0]}; where a recipe uses "
            "a data set twice, give each its own `alias`"
        )
    part = {split: tuple(example for example in rows if example.split == split) for split in SPLITS}
    return Parts(**part, twins_grouped=frozenset(spec.title for spec in specs if spec.twins_grouped))


def _wanted(spec: DatasetSpec) -> list[Example]:
    """The rows of one set in the parts that the recipe names, at most `train_rows` of them for training."""
    rows = spec.read()
    counts = Counter(example.split for example in rows)
    empty = [part for part in spec.parts if not counts[part]]
    if empty and ("parts" in spec.model_fields_set or len(empty) == len(spec.parts)):
        have = ", ".join(f"{part} {counts[part]}" for part in SPLITS)
        raise DataError(f"{spec.title}: no rows in {', '.join(empty)}, which the recipe asks for; rows: {have}")
    train = [example for example in rows if example.split == "train"]
    random.Random(DRAW_SEED).shuffle(train)  # noqa: S311 - a fixed draw, no secret
    drawn = {example.id for example in train[: spec.train_rows]}
    wanted = [e for e in rows if e.split in spec.parts and (e.split != "train" or e.id in drawn)]
    return folds.held_out(wanted, spec.fold, twins_grouped=spec.twins_grouped) if spec.fold else wanted
