"""Passes over a model that several processes deal among themselves."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Pass = TypeVar("Pass")


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

    def of(self, passes: Sequence[Pass]) -> Iterator[Turn[Pass]]:
        """The turns in which this process computes."""
        for first in range(0, len(passes), self.processes):
            turn = passes[first : first + self.processes]
            counts = self.rank < len(turn)
            if counts or self.in_step:
                yield Turn(turn[self.rank if counts else 0], counts, turn)


ALONE = Turns()
"""The process that makes all passes."""
