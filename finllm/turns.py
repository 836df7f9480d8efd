"""Passes over a model that several processes deal among themselves."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Pass = TypeVar("Pass")
FEWEST_TOKENS = 2048
"""Of a pass, in which a GPU is about as fast as with more."""


@dataclass(frozen=True)
class Turn(Generic[Pass]):
    """What the processes compute at the same time."""

    own: Pass
    counts: bool
    """Whether this process's pass is its own; else it repeats another's, so that all make one."""
    all: Sequence[Pass]


@dataclass(frozen=True)
class Turns:
    """One process of several, which all know the same passes."""

    rank: int = 0
    processes: int = 1
    in_step: bool = False
    """A pass needs all processes, since each holds a part of the weights."""
    multiple: int = 1
    """Of which the number of passes is one, where that makes none too small: as many for each of 2, 4, or 8 processes."""

    def count(self, tokens: int, most: int) -> int:
        """Passes over so many tokens, at most `most` in one; the same for any number of processes."""
        needed = math.ceil(tokens / max(1, most))
        wanted = self.multiple * math.ceil(needed / self.multiple)
        return max(needed, min(wanted, tokens // FEWEST_TOKENS))

    def of(self, passes: Sequence[Pass]) -> Iterator[Turn[Pass]]:
        """The turns in which this process computes."""
        for first in range(0, len(passes), self.processes):
            turn = passes[first : first + self.processes]
            counts = self.rank < len(turn)
            if counts or self.in_step:
                yield Turn(turn[self.rank if counts else 0], counts, turn)


ALONE = Turns()
"""The process that makes all passes."""
