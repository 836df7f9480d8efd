"""The micro-batches that a run's steps had, from its plan alone."""

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple


class Largest(NamedTuple):
    """Tokens of the largest micro-batch of streams."""

    of_steps: int
    """That the run's steps had."""
    of_run: int
    """That all its epochs would have."""


def largest(plan: Any) -> Largest:
    """The largest of all processes."""
    from transformers import AutoTokenizer

    from finllm import data
    from finllm.prompts import Prompter
    from finllm.training import sharing
    from finllm.training.batches import NO_ROW, GlobalBatches, encode, stream

    recipe = plan.recipe
    parts, _ = data.training_parts(recipe.data)
    rows = encode(parts.train, Prompter(AutoTokenizer.from_pretrained(recipe.model.name), recipe.prompt))
    made = plan.steps * plan.accumulation
    of_steps = of_run = 0
    for rank in range(plan.processes):
        dealer = GlobalBatches(
            [row.tokens for row in rows], micro_batch=plan.micro_batch, accumulation=plan.accumulation, rank=rank,
            processes=plan.processes, seed=recipe.train.seed,
        )  # fmt: skip
        epochs = max(math.ceil(recipe.train.epochs), math.ceil(made / len(dealer)))
        passes = chain.from_iterable(_of_epoch(dealer, epoch) for epoch in range(epochs))
        for number, batch in enumerate(passes):
            there = [rows[row] for row in batch if row != NO_ROW]
            tokens = stream(there, multiple=sharing.MULTIPLE[plan.device])["input_ids"].numel()
            of_run = max(of_run, tokens)
            of_steps = max(of_steps, tokens if number < made else 0)
    return Largest(of_steps, of_run)


def _of_epoch(dealer: Any, epoch: int) -> Iterator[list[int]]:
    dealer.set_epoch(epoch)
    yield from dealer
