"""Which examples make up each optimizer step, and how they become tensors.

The order depends on seed and epoch alone, so that any number of processes and any micro-batch take the same steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from finllm.example import Example
from finllm.prompts import Prompter
from finllm.shared_prefix import IGNORED, layout

NO_ROW = -1
"""Fills the last step of an epoch, so that every process makes as many passes."""


@dataclass(frozen=True, slots=True)
class Row:
    """One training example as token ids: the prompt, then the answer that is learnt."""

    index: int
    prompt: list[int]
    answer: list[int]


def encode(examples: Sequence[Example], prompter: Prompter) -> list[Row]:
    """The examples as rows; the answer is the label and the end of sequence."""
    prompts = prompter.render([e.text for e in examples], [e.target for e in examples])
    return [
        Row(index, prompt.ids, [*prompter.answers[example.label], prompter.end])
        for index, (example, prompt) in enumerate(zip(examples, prompts, strict=True))
    ]


class GlobalBatches(Sampler[list[int]]):
    """The micro-batches of one process, epoch after epoch; row numbers, or NO_ROW."""

    def __init__(self, rows: int, *, micro_batch: int, accumulation: int, rank: int, processes: int, seed: int) -> None:
        self._rows, self._micro_batch, self._accumulation = rows, micro_batch, accumulation
        self._rank, self._processes, self._seed, self._epoch = rank, processes, seed, 0
        self.batch_size = micro_batch

    @property
    def _global_batch(self) -> int:
        return self._micro_batch * self._accumulation * self._processes

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has its own order."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-self._rows // self._global_batch) * self._accumulation

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(self._rows, generator=generator).tolist()
        for start in range(0, self._rows, self._global_batch):
            step = order[start : start + self._global_batch]
            mine = step[self._rank :: self._processes]
            mine += [NO_ROW] * (self._micro_batch * self._accumulation - len(mine))
            for pass_ in range(self._accumulation):
                yield mine[pass_ :: self._accumulation]


class Rows(Dataset[Row | None]):
    """Rows by number; NO_ROW has none."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row | None:
        return None if index == NO_ROW else self._rows[index]


class EpochLoader(DataLoader[Row | None]):
    """A loader whose order changes with the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        sampler = self.batch_sampler
        assert isinstance(sampler, GlobalBatches), type(sampler)
        sampler.set_epoch(epoch)


def pad(rows: Sequence[Row | None]) -> dict[str, Any]:
    """A right-padded batch. What is padding follows from positions, never from the value of a token.

    `input_ids`, `attention_mask`, `labels`: (rows, longest); `meta`: which rows, how many tokens are theirs.
    """
    real = [row for row in rows if row is not None]
    if not real:  # a pass without examples still takes part in the backward pass, with a loss of 0
        ids = torch.zeros(1, 2, dtype=torch.long)
        labels = torch.full((1, 2), IGNORED)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "meta": meta([])}
    longest = max(len(row.prompt) + len(row.answer) for row in real)
    ids = torch.zeros(len(real), longest, dtype=torch.long)
    mask = torch.zeros(len(real), longest, dtype=torch.long)
    labels = torch.full((len(real), longest), IGNORED)
    for i, row in enumerate(real):
        end = len(row.prompt) + len(row.answer)
        ids[i, :end] = torch.tensor(row.prompt + row.answer)
        mask[i, :end] = 1
        labels[i, len(row.prompt) : end] = torch.tensor(row.answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "meta": meta(real)}


def stream(rows: Sequence[Row | None], *, multiple: int = 1) -> dict[str, Any]:
    """The same rows as one stream, in which what all prompts begin with stands once; `meta` is that of `pad`.

    `input_ids`, `position_ids`, `labels`: (1, tokens); tokens are a `multiple`.
    """
    real = [row for row in rows if row is not None]
    if not real:
        batch = layout([[0, 0]], [[0]], multiple=multiple)
        batch["labels"].fill_(IGNORED)
    else:
        batch = layout([row.prompt for row in real], [row.answer for row in real], multiple=multiple)
    return {**batch, "meta": meta(real)}


def meta(rows: Sequence[Row]) -> dict[str, Any]:
    """Which rows a batch holds, and how many tokens are theirs."""
    return {"rows": [row.index for row in rows], "tokens": sum(len(r.prompt) + len(r.answer) for r in rows)}
