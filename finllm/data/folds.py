"""Folds of the training part: a run that trains on all but one, and is tested on that one, has not seen its rows."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from finllm.data.twins import comparable, groups
from finllm.errors import DataError
from finllm.example import Example

LIKENESS = 0.65
"""Cosine from which on two texts stay in one fold; below that of near twins, as it changes with the texts compared."""


def numbers(fold: str) -> tuple[int, int]:
    """Which fold, from 1, and of how many: `2/5`; raises ValueError where it is neither."""
    number, _, count = fold.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) and int(count) >= 2):
        raise ValueError(f"{fold!r} is no fold; write number/count, such as 2/5")
    return int(number), int(count)


def held_out(rows: Sequence[Example], fold: str, *, twins_grouped: bool) -> list[Example]:
    """The rows with this fold of the training part as test part; the data set's own test part is left out.

    Validation rows stay. Near twins share a fold.
    """
    number, count = numbers(fold)
    train = [row for row in rows if row.split == "train"]
    if len(train) < count:
        raise DataError(f"fold {fold}: there are only {len(train)} training rows; write fewer folds")
    together = _groups(train, twins_grouped=twins_grouped)
    place = _dealt(train, together, count)
    mine = {row.id for row, group in zip(train, together, strict=True) if place[group] == number - 1}
    return [
        replace(row, split="test") if row.id in mine else row for row in rows if row.split != "test" or row.id in mine
    ]


def _groups(train: Sequence[Example], *, twins_grouped: bool) -> list[str]:
    """Which group each row is of; rows of a group share a fold."""
    if twins_grouped:
        return [row.group or row.id for row in train]
    return [str(number) for number in groups([row.text for row in train], LIKENESS)]


def _dealt(train: Sequence[Example], together: Sequence[str], count: int) -> dict[str, int]:
    """The fold of each group, the same whatever the order of the rows; one label is dealt out after the other."""
    members: dict[str, list[Example]] = defaultdict(list)
    for row, group in zip(train, together, strict=True):
        members[group].append(row)
    deck = []
    for group, rows in members.items():
        labels = Counter(row.label for row in rows)
        commonest = max(sorted(labels), key=lambda label: labels[label])
        name = min(comparable(row.text) for row in rows)
        deck.append((commonest, hashlib.sha256(name.encode()).hexdigest(), group, len(rows)))
    filled = [0] * count
    place = {}
    for _, _, group, size in sorted(deck):
        fewest = filled.index(min(filled))
        place[group] = fewest
        filled[fewest] += size
    return place
