"""Scoring that several processes share: each asks for its part of the prompts, and all get all rows."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from finllm import scoring


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

    `in_step`: a pass needs all processes, since each holds a part of the weights, so that all make equally many.
    """
    rank, processes = world()
    if processes == 1 or not prompts:
        return scoring.score(model, prompts, answers, batch_tokens=batch_tokens, **how)
    shares = _shares([len(prompt) for prompt in prompts], processes)
    mine = shares[rank]
    if in_step:
        mine, how["batches"] = together(prompts, shares, rank, sum(map(len, answers)), batch_tokens)
    found = scoring.score(model, [prompts[row] for row in mine], answers, batch_tokens=batch_tokens, **how)
    parts: list[Any] = [None] * processes
    dist.all_gather_object(parts, found[: len(shares[rank])])
    rows = np.zeros((len(prompts), len(answers)))
    for share, part in zip(shares, parts, strict=True):
        rows[share] = part
    return rows


def _shares(lengths: Sequence[int], processes: int) -> list[list[int]]:
    """Rows of each process, of about the same lengths; the first have one more where they cannot be equally many."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[rank::processes] for rank in range(processes)]


def together(
    prompts: Sequence[list[int]], shares: Sequence[list[int]], rank: int, extra: int, batch_tokens: int
) -> tuple[list[int], list[list[int]]]:
    """The prompts that one process asks for, filled up to as many as the others have, and the passes that all make.

    To its share come the prompts on which it depends how all are scored, so that every process comes to the same way.
    """
    places = range(len(shares[0]))  # the first share is the longest
    deciding = _deciding(prompts)
    filled = [[*share, *[(share or deciding)[-1]] * (len(places) - len(share)), *deciding] for share in shares]
    longest = [max(len(prompts[share[place]]) for share in filled) for place in range(len(filled[0]))]
    return filled[rank], list(scoring.batches_of(longest, extra, batch_tokens))


def _deciding(prompts: Sequence[list[int]]) -> list[int]:
    """Rows on which it depends how all are scored: the longest, and the two that have the least in common."""
    rows = range(len(prompts))
    return [
        max(rows, key=lambda row: len(prompts[row])),
        min(rows, key=prompts.__getitem__),
        max(rows, key=prompts.__getitem__),
    ]
