"""What prompts have in common behind the instruction, and what their answers begin with, computed once.

A bush is a trunk of tokens and ways that grow from it. Prompts that begin alike share a trunk; where answers have several
tokens, each prompt is a trunk, and the answers' beginnings are its ways.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from finllm.errors import RunError
from finllm.fast.streams import WAYS, Stream, plant

MOST_TOGETHER = 3
"""Prompts to one trunk. PhraseBank's, sorted, have 4.3 % fewer tokens so, and 13 % more steps of attention; groups of up
to 8 would have 4.9 % fewer, and 33 % more (counted: docs/experiments.md 5)."""


@dataclass(frozen=True, slots=True)
class Bush:
    """Tokens behind the instruction, and where something is predicted."""

    rows: tuple[int, ...]
    """Numbers of the prompts that it holds."""
    trunk: list[int]
    ways: list[list[int]]
    reads: list[int]
    """Places that predict, from the trunk's beginning: for each prompt, its end, and those of the answers' beginnings."""

    @property
    def tokens(self) -> int:
        """Of trunk and ways."""
        return len(self.trunk) + sum(map(len, self.ways))


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers by what they begin with."""

    ways: list[list[int]]
    """The beginnings that are part of no longer one."""
    reads: list[int]
    """Where each beginning but the empty one ends, from the end of the prompt."""
    choices: list[int]
    """Tokens that follow any beginning."""
    picks: list[int]
    """For each token of each answer, place in (beginnings, choices), flat; the empty beginning is the first."""
    bounds: list[int]
    """Where each answer's tokens begin among `picks`."""


def answers_of(answers: Sequence[Sequence[int]]) -> Answers:
    """Raises RunError where there are more ways than a stream can tell apart."""
    whole = [tuple(answer) for answer in answers]
    begins = sorted({answer[:length] for answer in whole for length in range(1, len(answer))})
    last = [one for one, after in pairwise([*begins, ()]) if after[: len(one)] != one]
    if len(last) >= WAYS:
        raise RunError(f"{len(last)} answers that begin differently; at most {WAYS - 1} can be scored at once")
    offsets = [0, *accumulate(map(len, last))]
    reads = []
    for begin in begins:
        way = next(number for number, one in enumerate(last) if one[: len(begin)] == begin)
        reads.append(offsets[way] + len(begin) - 1)
    choices = list(dict.fromkeys(token for answer in whole for token in answer))
    column = {token: number for number, token in enumerate(choices)}
    line = {begin: number for number, begin in enumerate([(), *begins])}
    picks = [
        line[answer[:place]] * len(choices) + column[token] for answer in whole for place, token in enumerate(answer)
    ]
    bounds = [0, *accumulate(map(len, whole))][:-1]
    return Answers([list(one) for one in last], reads, choices, picks, bounds)


def grow(prompts: Sequence[list[int]], answers: Answers, *, shared: int) -> list[Bush]:
    """All prompts, which begin with the same `shared` tokens."""
    if not answers.ways:
        return _together(prompts, shared)
    bushes = []
    for row, prompt in enumerate(prompts):
        own = prompt[shared:]
        reads = [len(own) - 1, *(len(own) + place for place in answers.reads)]
        bushes.append(Bush((row,), own, answers.ways, reads))
    return bushes


def batches_of(bushes: Sequence[Bush], count: int) -> list[list[Bush]]:
    """The bushes in order, in at most so many batches: each about its share of the tokens, and less than a bush more."""
    total = sum(bush.tokens for bush in bushes)
    batches: dict[int, list[Bush]] = {}
    before = 0
    for bush in bushes:
        batches.setdefault(before * count // total, []).append(bush)
        before += bush.tokens
    return list(batches.values())


def pack(instruction: Sequence[int], bushes: Sequence[Bush], *, multiple: int = 1) -> Stream:
    """The bushes as a stream behind the instruction, filled up to a `multiple`."""
    starts = accumulate((bush.tokens for bush in bushes), initial=len(instruction))
    predicting = [start + place for start, bush in zip(starts, bushes, strict=False) for place in bush.reads]
    return plant(instruction, [(bush.trunk, bush.ways) for bush in bushes], predicting, multiple=multiple)


def _together(prompts: Sequence[list[int]], shared: int) -> list[Bush]:
    """Prompts in dictionary order, up to MOST_TOGETHER to a bush, such that the fewest tokens are left."""
    order = sorted(range(len(prompts)), key=lambda row: prompts[row][shared:])
    alike = [_alike(prompts[one], prompts[other], shared) for one, other in pairwise(order)]
    bushes, first = [], 0
    for size in _sizes(alike):
        rows = order[first : first + size]
        owns = [prompts[row][shared:] for row in rows]
        length = min(alike[first : first + size - 1], default=len(owns[0]))
        ways = [own[length:] for own in owns] if size > 1 else []
        ends = accumulate(map(len, ways), initial=length)
        reads = [length - 1]
        if size > 1:  # a prompt that is all of the trunk ends with it
            reads = [end - 1 if way else length - 1 for way, end in zip(ways, list(ends)[1:], strict=True)]
        bushes.append(Bush(tuple(rows), owns[0][:length], ways, reads))
        first += size
    return bushes


def _alike(one: list[int], other: list[int], start: int) -> int:
    """How many tokens from `start` on are the same."""
    most = min(len(one), len(other))
    place = start
    while place < most and one[place] == other[place]:
        place += 1
    return place - start


def _sizes(alike: Sequence[int]) -> list[int]:
    """Sizes of the groups of neighbours, `alike` in so many tokens each, that save the most; those of 2 or more save."""
    saved, sizes = [0], [1]
    for end in range(1, len(alike) + 2):
        best, size = saved[-1], 1
        for more in range(2, min(MOST_TOGETHER, end) + 1):
            found = saved[end - more] + (more - 1) * min(alike[end - more : end - 1])
            if found > best:
                best, size = found, more
        saved.append(best)
        sizes.append(size)
    chosen, end = [], len(alike) + 1
    while end:
        chosen.append(sizes[end])
        end -= sizes[end]
    return chosen[::-1]
