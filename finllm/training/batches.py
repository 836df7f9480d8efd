"""Which examples make up each optimizer step, and how they become tensors.

The order depends on seed and epoch alone, so that any number of processes and any micro-batch take the same steps.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from finllm.answer import AnswerTokens
from finllm.errors import RunError
from finllm.example import Example
from finllm.methods import Explanations
from finllm.prompts import Prompter
from finllm.recipe import Recipe
from finllm.shared_prefix import IGNORED, layout

NO_ROW = -1
"""Fills the last step of an epoch, so that every process makes as many passes."""


@dataclass(frozen=True, slots=True)
class Row:
    """One training example as token ids: the prompt, then the answer that is learnt."""

    index: int
    prompt: list[int]
    answer: list[int]
    weights: tuple[float, ...] | None = None
    """Of each token of the answer in the loss, 0 where it is always given; None is 1 for all."""

    @property
    def tokens(self) -> int:
        """How long the row is."""
        return len(self.prompt) + len(self.answer)

    @property
    def targets(self) -> list[int]:
        """What is learnt at each place of the answer, or IGNORED."""
        if self.weights is None:
            return self.answer
        return [token if weight else IGNORED for token, weight in zip(self.answer, self.weights, strict=True)]


def encode(examples: Sequence[Example], prompter: Prompter, recipe: Recipe | None = None) -> list[Row]:
    """The examples as rows; the answer is the label and the end of sequence, or the label, its explanation and the end.

    The recipe says which, labels alone without one. Raises RunError where explanations are to be learnt and no example
    has one.
    """
    prompts = prompter.render([e.text for e in examples], [e.target for e in examples])
    if recipe is not None and recipe.explanations is not None:
        return _explained(examples, [prompt.ids for prompt in prompts], prompter, recipe.explanations)
    return [
        Row(index, prompt.ids, [*prompter.answers[example.label], prompter.end])
        for index, (example, prompt) in enumerate(zip(examples, prompts, strict=True))
    ]


def _explained(
    examples: Sequence[Example], prompts: Sequence[list[int]], prompter: Prompter, explanations: Explanations
) -> list[Row]:
    """Rows with weights; what stands between a label and its explanation is always given, and has none."""
    if not any(example.explanation for example in examples):
        raise RunError(
            "train.explanations is set, but no training example has an explanation; take it out, add the data set "
            "`sample`, or name the column of a table with `explanation: COLUMN`"
        )
    tokens = AnswerTokens(prompter)
    rows = []
    for index, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        label = list(prompter.answers[example.label])
        given, more = [], []
        if example.explanation:
            given = tokens.openings[example.label]
            more = tokens.ending(example.explanation, explanations.max_tokens)
        else:
            label.append(prompter.end)
        weights = (
            *[explanations.label_weight] * len(label),
            *[0.0] * len(given),
            *[explanations.explanation_weight] * len(more),
        )
        rows.append(Row(index, prompt, [*label, *given, *more], weights))
    return rows


class GlobalBatches(Sampler[list[int]]):
    """The micro-batches of one process, epoch after epoch; row numbers, or NO_ROW.

    What a step consists of depends on the order alone. It is dealt by length, so that processes and passes have about
    equally many tokens.
    """

    def __init__(
        self, lengths: Sequence[int], *, micro_batch: int, accumulation: int, rank: int, processes: int, seed: int
    ) -> None:
        """`lengths`: tokens of each row."""
        self._lengths, self._micro_batch, self._accumulation = lengths, micro_batch, accumulation
        self._rank, self._processes, self._seed, self._epoch = rank, processes, seed, 0
        self.batch_size = micro_batch

    @property
    def _global_batch(self) -> int:
        return self._micro_batch * self._accumulation * self._processes

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has its own order."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-len(self._lengths) // self._global_batch) * self._accumulation

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        each = self._micro_batch * self._accumulation
        for start in range(0, len(order), self._global_batch):
            step = order[start : start + self._global_batch]
            mine = dealt(step, self._lengths, self._processes, each)[self._rank]
            for hand in dealt(mine, self._lengths, self._accumulation, self._micro_batch):
                yield hand + [NO_ROW] * (self._micro_batch - len(hand))


def dealt(rows: Sequence[int], lengths: Sequence[int], hands: int, most: int) -> list[list[int]]:
    """Rows in `hands` of at most `most`, with about equally many tokens: the longest first, each to whom has least."""
    if hands == 1:
        return [list(rows)]
    found: list[list[int]] = [[] for _ in range(hands)]
    tokens = [0] * hands
    for place in sorted(range(len(rows)), key=lambda place: -lengths[rows[place]]):
        hand = min((h for h in range(hands) if len(found[h]) < most), key=lambda h: tokens[h])
        found[hand].append(place)
        tokens[hand] += lengths[rows[place]]
    return [[rows[place] for place in sorted(hand)] for hand in found]


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


def loader(rows: Sequence[Any], collate: Callable[[Sequence[Any]], dict[str, Any]], trainer: Any) -> EpochLoader:
    """The rows of a trainer's process in our own order."""
    sampler = GlobalBatches(
        [row.tokens for row in rows],
        micro_batch=trainer.args.per_device_train_batch_size,
        accumulation=trainer.args.gradient_accumulation_steps,
        rank=trainer.accelerator.process_index,
        processes=trainer.accelerator.num_processes,
        seed=trainer.args.seed,
    )
    return EpochLoader(Rows(rows), batch_sampler=sampler, collate_fn=collate)


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
        labels[i, len(row.prompt) : end] = torch.tensor(row.targets)
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
        answers = batch["labels"] != IGNORED  # in the order of the rows
        batch["labels"][answers] = torch.tensor([token for row in real for token in row.targets])
    return {**batch, "meta": meta(real)}


def meta(rows: Sequence[Row]) -> dict[str, Any]:
    """Which rows a batch holds, how many tokens are theirs, and where rows have weights, those of what is learnt."""
    counts = {"rows": [row.index for row in rows], "tokens": sum(row.tokens for row in rows)}
    if not any(row.weights for row in rows):
        return counts
    return {**counts, "weights": torch.tensor([weight for row in rows for weight in row.weights or () if weight])}
