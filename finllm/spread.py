"""Scoring that several processes share: each makes some of the passes, and all get all rows."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from finllm import scoring
from finllm.turns import Turns

MULTIPLE = 8
"""Of which the number of passes is one, whatever the number of processes."""


def world() -> tuple[int, int]:
    """Rank of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def local_rank() -> int:
    """Which GPU of this machine is this process's."""
    return int(os.environ.get("LOCAL_RANK", "0")) if dist.is_initialized() else 0


def score(
    model: Any,
    prompts: Sequence[list[int]],
    answers: Sequence[tuple[int, ...]],
    *,
    batch_tokens: int,
    in_step: bool = False,
    **how: Any,
) -> NDArray[np.float64]:
    """Log-probabilities as `scoring.score` gives them, of every prompt, in every process.

    The passes are the same for any number of processes, and so is every bit of the result. `in_step`: a pass needs all
    processes, since each holds a part of the weights, so that all make equally many.
    """
    rank, processes = world()
    turns = Turns(rank, processes, in_step, MULTIPLE)
    found = scoring.score(model, prompts, answers, batch_tokens=batch_tokens, turns=turns, **how)
    if processes == 1:
        return found
    parts: list[Any] = [None] * processes
    dist.all_gather_object(parts, found)
    whole: NDArray[np.float64] = np.sum(parts, axis=0)  # each row is 0 in all processes but one
    return whole
