"""Scoring that several processes share: each makes some of the passes, and all get all rows."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from finllm import scoring
from finllm.shared_prefix import shared_length
from finllm.turns import Turns

PASSES = 16
"""At least so many are made where they are not too small, so that there are some for every process."""
FEWEST_TOKENS = 2048
"""Of a pass, in which a GPU is about as fast as with more."""


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
    most = min(batch_tokens, pass_tokens(prompts))
    found = scoring.score(model, prompts, answers, batch_tokens=most, turns=Turns(rank, processes, in_step), **how)
    if processes == 1:
        return found
    parts: list[Any] = [None] * processes
    dist.all_gather_object(parts, found)
    whole: NDArray[np.float64] = np.sum(parts, axis=0)  # each row is 0 in all processes but one
    return whole


def pass_tokens(prompts: Sequence[list[int]]) -> int:
    """The most tokens of a pass by which the prompts come to enough passes."""
    own = sum(map(len, prompts)) - shared_length(prompts) * len(prompts) if prompts else 0
    return max(FEWEST_TOKENS, own // PASSES)
