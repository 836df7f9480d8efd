"""Rows that share an instruction as one stream, in a single tensor of places that goes to the device in one copy."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PARTS = 5
"""Numbers kept for each token: id, position, segment, start and end of its segment."""
WAYS = 4096
"""Segments are numbered in steps of this, a power of 2, so that what grows from a trunk has the trunk's number and 1, 2, …"""


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream on a device. A token attends to the instruction, to its row's trunk and to its own segment, up to itself.

    The trunk is the segment whose number is the token's own without the remainder by WAYS; most rows are nothing else.
    """

    numbers: Tensor
    """int32: five for each token, then the places that predict, then what they predict."""
    tokens: int
    shared: int
    """Tokens of the instruction, which is segment 0."""

    @property
    def ids(self) -> Tensor:
        """Token ids."""
        return self._part(0)

    @property
    def positions(self) -> Tensor:
        """Positions within instruction and row."""
        return self._part(1)

    @property
    def segments(self) -> Tensor:
        """Number of each token's segment, a multiple of WAYS but in what grows from a trunk."""
        return self._part(2)

    @property
    def starts(self) -> Tensor:
        """Where each token's row begins."""
        return self._part(3)

    @property
    def ends(self) -> Tensor:
        """Where each token's row ends."""
        return self._part(4)

    @property
    def predicting(self) -> Tensor:
        """Places that predict."""
        return self.numbers[PARTS * self.tokens :].chunk(2)[0]

    @property
    def targets(self) -> Tensor:
        """What they predict, in the same order."""
        return self.numbers[PARTS * self.tokens :].chunk(2)[1]

    def _part(self, number: int) -> Tensor:
        return self.numbers[number * self.tokens : (number + 1) * self.tokens]


def pack(
    prompts: Sequence[list[int]],
    answers: Sequence[Sequence[int]],
    *,
    shared: int,
    multiple: int = 1,
) -> Stream:
    """Prompts, which begin with the same `shared` tokens, each with all tokens of its answer but the last.

    Tokens are filled up to a `multiple`.
    """
    ids, positions = [*prompts[0][:shared]], [*range(shared)]
    segments, starts, ends = [0] * shared, [0] * shared, [shared] * shared
    predicting: list[int] = []
    targets: list[int] = []
    for segment, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1):
        own = [*prompt[shared:], *answer[:-1]]
        start, end = len(ids), len(ids) + len(own)
        ids += own
        positions += range(shared, shared + len(own))
        segments += [WAYS * segment] * len(own)
        starts += [start] * len(own)
        ends += [end] * len(own)
        predicting += range(end - len(answer), end)
        targets += answer
    used = len(ids)
    tokens = -(-used // multiple) * multiple
    more = tokens - used
    ids += [0] * more
    positions += range(more)
    segments += [WAYS * (len(prompts) + 1)] * more
    starts += [used] * more
    ends += [tokens] * more
    numbers = torch.tensor([*ids, *positions, *segments, *starts, *ends, *predicting, *targets], dtype=torch.int32)
    return Stream(numbers, tokens, shared)


def plant(
    instruction: Sequence[int],
    bushes: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    predicting: Sequence[int],
    *,
    multiple: int = 1,
) -> Stream:
    """Trunks, each with fewer than WAYS ways that grow from it, behind the instruction; targets are none."""
    shared = len(instruction)
    ids, positions = [*instruction], [*range(shared)]
    segments, starts, ends = [0] * shared, [0] * shared, [shared] * shared
    for number, (trunk, ways) in enumerate(bushes, start=1):
        start, above = len(ids), shared + len(trunk)
        ids += trunk
        positions += range(shared, above)
        segments += [WAYS * number] * len(trunk)
        for way, own in enumerate(ways, start=1):
            ids += own
            positions += range(above, above + len(own))
            segments += [WAYS * number + way] * len(own)
        starts += [start] * (len(ids) - start)
        ends += [len(ids)] * (len(ids) - start)
    used = len(ids)
    tokens = -(-used // multiple) * multiple
    more = tokens - used
    ids += [0] * more
    positions += range(more)
    segments += [WAYS * (len(bushes) + 1)] * more
    starts += [used] * more
    ends += [tokens] * more
    nothing = [0] * len(predicting)
    numbers = torch.tensor([*ids, *positions, *segments, *starts, *ends, *predicting, *nothing], dtype=torch.int32)
    return Stream(numbers, tokens, shared)
