"""Tests of a difference between two systems on the same rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from finllm.metrics import Indices


@dataclass(frozen=True, slots=True)
class McNemar:
    """The exact test of McNemar (1947), two-sided."""

    only_first: int
    """Rows that only the first system has right."""
    only_second: int
    p: float
    """Probability of so uneven a division of these rows, were both systems equally good; 1 without such rows."""


def mcnemar(gold: Indices, first: Indices, second: Indices) -> McNemar:
    """The test for two systems' answers; rows count as independent of one another."""
    only_first = int(((first == gold) & (second != gold)).sum())
    only_second = int(((first != gold) & (second == gold)).sum())
    both, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(comb(both, k) for k in range(fewer + 1))
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**both))


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values corrected for their number (Holm 1979), in the same order; at most 1."""
    corrected, highest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = highest
    return corrected
