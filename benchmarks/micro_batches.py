"""The micro-batches that a run's steps had, from its plan alone."""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any


def largest(plan: Any) -> int:
    """Tokens of the largest micro-batch of streams that the run's steps had."""
    from transformers import AutoTokenizer

    from finllm import data
    from finllm.prompts import Prompter
    from finllm.training import sharing
    from finllm.training.batches import NO_ROW, GlobalBatches, encode, stream

    recipe = plan.recipe
    parts, _ = data.training_parts(recipe.data)
    rows = encode(parts.train, Prompter(AutoTokenizer.from_pretrained(recipe.model.name), recipe.prompt))
    found = 0
    for rank in range(plan.processes):
        dealer = GlobalBatches(
            [row.tokens for row in rows], micro_batch=plan.micro_batch, accumulation=plan.accumulation, rank=rank,
            processes=plan.processes, seed=recipe.train.seed,
        )  # fmt: skip
        epochs = range(-(-plan.steps * plan.accumulation // len(dealer)))
        passes = chain.from_iterable(_of_epoch(dealer, epoch) for epoch in epochs)
        for batch in islice(passes, plan.steps * plan.accumulation):
            there = [rows[row] for row in batch if row != NO_ROW]
            found = max(found, stream(there, multiple=sharing.MULTIPLE[plan.device])["input_ids"].numel())
    return found


def _of_epoch(dealer: Any, epoch: int) -> Iterator[list[int]]:
    dealer.set_epoch(epoch)
    yield from dealer
