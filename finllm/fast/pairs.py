"""Two answers to each prompt, in one stream: both hang on one copy of the prompt, which hangs on one instruction."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finllm.fast.streams import WAYS, Stream


@dataclass(frozen=True, slots=True)
class Pairs:
    """A stream of pairs, and where their answers are read."""

    stream: Stream
    """`predicting` are the places that predict, each once."""
    table: Tensor
    """(3, answer tokens): which of those places, the token, the sequence; chosen answers are the first sequences."""
    sequences: int

    def summed(self, log_p: Tensor) -> Tensor:
        """Log-probabilities (sequences,) from those of all tokens at the places that predict."""
        places, tokens, sequences = self.table.long()
        return log_p.new_zeros(self.sequences).index_add_(0, sequences, log_p[places, tokens])


def pack(
    trunks: Sequence[list[int]],
    answers: Sequence[tuple[list[int], list[int]]],
    reading: tuple[Sequence[int], Tensor],
    *,
    shared: int,
    multiple: int = 1,
) -> Pairs:
    """Prompts, which begin with the same `shared` tokens, each with two answers without their last tokens.

    `reading` are the places that predict, and the table, as `training.pairs.read` finds them.
    """
    ids, positions = [*trunks[0][:shared]], [*range(shared)]
    segments, starts, ends = [0] * shared, [0] * shared, [shared] * shared
    for number, (prompt, both) in enumerate(zip(trunks, answers, strict=True), start=1):
        start, own = len(ids), prompt[shared:]
        ids += own
        positions += range(shared, len(prompt))
        segments += [WAYS * number] * len(own)
        for way, answer in enumerate(both, start=1):
            ids += answer[:-1]
            positions += range(len(prompt), len(prompt) + len(answer) - 1)
            segments += [WAYS * number + way] * (len(answer) - 1)
        starts += [start] * (len(ids) - start)
        ends += [len(ids)] * (len(ids) - start)
    used = len(ids)
    tokens = -(-used // multiple) * multiple
    more = tokens - used
    ids += [0] * more
    positions += range(more)
    segments += [WAYS * (len(trunks) + 1)] * more
    starts += [used] * more
    ends += [tokens] * more
    predicting, table = reading
    nothing = [0] * len(predicting)
    numbers = torch.tensor([*ids, *positions, *segments, *starts, *ends, *predicting, *nothing], dtype=torch.int32)
    return Pairs(Stream(numbers, tokens, shared), table, 2 * len(trunks))
