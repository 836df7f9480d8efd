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
        mine = [*mine, *[mine[-1] if mine else 0] * (len(shares[0]) - len(mine)), *_deciding(prompts)]
        longest = [
            max(len(prompts[share[min(row, len(share) - 1)]]) for share in shares if share)
            for row in range(len(shares[0]))
        ]
        most = len(prompts[_deciding(prompts)[0]])
        lengths = [*longest, *[most] * (len(mine) - len(longest))]
        how["batches"] = list(scoring.batches_of(lengths, sum(map(len, answers)), batch_tokens))
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


def _deciding(prompts: Sequence[list[int]]) -> list[int]:
    """Rows on which it depends how all are scored: the longest, and the two that have the least in common."""
    rows = range(len(prompts))
    return [
        max(rows, key=lambda row: len(prompts[row])),
        min(rows, key=prompts.__getitem__),
        max(rows, key=prompts.__getitem__),
    ]
