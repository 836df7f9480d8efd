"""Two answers to each prompt, in one stream: both hang on one copy of the prompt, which hangs on one instruction."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from finllm.fast.streams import Stream, plant


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
    bushes = [(prompt[shared:], [answer[:-1] for answer in both]) for prompt, both in zip(trunks, answers, strict=True)]
    predicting, table = reading
    return Pairs(plant(trunks[0][:shared], bushes, predicting, multiple=multiple), table, 2 * len(trunks))
