"""Pairs of answers as tensors: padded rows, or one stream in which prompts and what they begin with stand once.

    pair       I I I t t t  A a E     preferred     stream     I I I t t t A a B b b t t ...
               I I I t t t  B b b E   the other     positions  0 1 2 3 4 5 6 7 6 7 8 3 4

B attends to the instruction I, the text t and itself, not to A. The first tokens of both answers are predicted from one
place, the last token of t. Sequences are counted with the preferred answers first, then the others, as TRL has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from finllm.answer import AnswerTokens
from finllm.data.preferences import Preference
from finllm.errors import RunError
from finllm.example import Label
from finllm.methods import Dpo, Explanations
from finllm.prompts import Prompter
from finllm.recipe import Recipe
from finllm.shared_prefix import BRANCHES, IGNORED, NAME, places, shared_length

FIGURES = ("reference_chosen", "reference_rejected", "chosen_tokens", "rejected_tokens", "smoothing", "live")
"""What a batch knows of each pair besides tokens; a pair that is not live fills a pass without pairs."""


@dataclass(frozen=True, slots=True)
class PairRow:
    """One pair as token ids; answers end with the end of sequence."""

    index: int
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    smoothing: float = 0.0
    """Probability that the pair is the wrong way round."""
    reference: tuple[float, float] = (0.0, 0.0)
    """Log-probabilities of both answers under the reference, in nats."""
    given: tuple[range, range] = (range(0), range(0))
    """Places of both answers that are always given, and have no part in the loss: an explanation's opening."""

    @property
    def tokens(self) -> int:
        """How long the pair is on one copy of its prompt."""
        return len(self.prompt) + len(self.answer)

    @property
    def answer(self) -> list[int]:
        """All that follows the prompt in a stream, and a little more: bounds memory and window."""
        return [*self.chosen, *self.rejected]

    @property
    def learnt(self) -> tuple[int, int]:
        """Tokens of both answers that have a part in the loss."""
        return len(self.chosen) - len(self.given[0]), len(self.rejected) - len(self.given[1])


NOTHING = PairRow(-1, [0, 0], [0, 0], [0, 0])
"""Fills a pass without pairs: it takes part in the backward pass, with a loss of 0."""


def encode(pairs: Sequence[Preference], prompter: Prompter, recipe: Recipe) -> list[PairRow]:
    """The pairs as rows; raises RunError where an answer does not fit behind its prompt."""
    spec = recipe.train
    assert isinstance(spec, Dpo), spec
    prompts = prompter.render([pair.text for pair in pairs], [pair.target for pair in pairs])
    tokens = AnswerTokens(prompter) if any(pair.reasons for pair in pairs) else None
    rows = []
    for index, (pair, prompt) in enumerate(zip(pairs, prompts, strict=True)):
        (chosen, first), (rejected, second) = _answers(pair, prompter, tokens)
        longest = len(prompt.ids) + max(len(chosen), len(rejected))
        if longest > prompter.spec.max_tokens:
            raise RunError(
                f"{pair.id}: prompt and answer have {longest} tokens, prompt.max_tokens is {prompter.spec.max_tokens}; "
                "raise it, or shorten the answer"
            )
        smoothing = spec.band_smoothing.get(pair.agreement or "", spec.label_smoothing)
        rows.append(PairRow(index, prompt.ids, chosen, rejected, smoothing, given=(first, second)))
    return rows


def _answers(pair: Preference, prompter: Prompter, tokens: AnswerTokens | None) -> list[tuple[list[int], range]]:
    """Tokens of both answers with their ends, and which of them are always given."""
    both = (pair.chosen, pair.rejected)
    if pair.reasons is None or tokens is None:
        return [([*prompter.answer(words), prompter.end], range(0)) for words in both]
    found = []
    for label, why in zip(both, pair.reasons, strict=True):
        begun = prompter.answers[cast("Label", label)]
        opening = tokens.openings[cast("Label", label)]
        given = range(len(begun), len(begun) + len(opening))
        found.append(([*begun, *opening, *tokens.ending(why, Explanations().max_tokens)], given))
    return found


def meta(rows: Sequence[PairRow]) -> dict[str, Any]:
    """Which pairs a batch holds, and how many tokens are theirs; `learnt` are the pairs, and their chosen tokens."""
    return {
        "rows": [row.index for row in rows],
        "tokens": sum(2 * len(r.prompt) + len(r.answer) for r in rows),
        "learnt": (len(rows), sum(row.learnt[0] for row in rows)),
    }


def real(rows: Sequence[PairRow | None]) -> list[PairRow]:
    """The pairs of a pass that may have none."""
    return [row for row in rows if row is not None]


def figures(rows: Sequence[PairRow]) -> Tensor:
    """(FIGURES, pairs) in fp32."""
    columns = [(*row.reference, *row.learnt, row.smoothing, float(row is not NOTHING)) for row in rows]
    return torch.tensor(columns, dtype=torch.float32).T.contiguous()


def pad(rows: Sequence[PairRow | None]) -> dict[str, Any]:
    """Two right-padded rows for each pair: `input_ids`, `attention_mask`, `labels`, (2 x pairs, longest)."""
    given = real(rows)
    pairs = given or [NOTHING]
    sequences = [(row.prompt, row.chosen, row.given[0]) for row in pairs]
    sequences += [(row.prompt, row.rejected, row.given[1]) for row in pairs]
    longest = max(len(prompt) + len(answer) for prompt, answer, _ in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    labels = torch.full((len(sequences), longest), IGNORED)
    for i, (prompt, answer, given_) in enumerate(sequences):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        mask[i, :end] = 1
        labels[i, len(prompt) : end] = torch.tensor(answer)
        labels[i, len(prompt) + given_.start : len(prompt) + given_.stop] = IGNORED
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {"inputs": inputs, "figures": figures(pairs), "meta": meta(given)}


def stream(rows: Sequence[PairRow | None], *, multiple: int = 1) -> dict[str, Any]:
    """The same pairs as one stream (1, tokens), and `read`, (3, answer tokens): see `Reading`."""
    given = real(rows)
    pairs = given or [NOTHING]
    shared = shared_length([row.prompt for row in pairs])
    ids, positions = [*pairs[0].prompt[:shared]], [*range(shared)]
    for row in pairs:
        end = len(row.prompt)
        ids += [*row.prompt[shared:], *row.chosen[:-1], *row.rejected[:-1]]
        positions += [*range(shared, end)]
        positions += [end + at for answer in (row.chosen, row.rejected) for at in range(len(answer) - 1)]
    padding = -len(ids) % multiple
    reading = read(pairs, shared)
    inputs = {
        "input_ids": torch.tensor([ids + [0] * padding]),
        "position_ids": torch.tensor([[*positions, *range(padding)]]),
        NAME: branched(shared, pairs, padding),
    }
    return {
        "inputs": inputs, "predicting": torch.tensor(reading.predicting), "read": reading.table,
        "figures": figures(pairs), "meta": meta(given),
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reading:
    """Where a stream's answers are read."""

    predicting: list[int]
    """Places that predict, each once."""
    table: Tensor
    """(3, learnt tokens): which of those places, the token, the sequence it belongs to; in the order of sequences."""


def read(pairs: Sequence[PairRow], shared: int) -> Reading:
    """Where the answers of pairs are read in their stream."""
    sizes = [len(r.prompt) - shared + len(r.chosen) + len(r.rejected) - 2 for r in pairs]
    predicting: list[int] = []
    columns: list[tuple[int, int, int]] = []
    for number, (row, start) in enumerate(zip(pairs, accumulate(sizes, initial=shared), strict=False)):
        trunk = start + len(row.prompt) - shared  # where the first answer begins
        first, others = len(predicting), len(predicting) + len(row.chosen)
        predicting += [trunk - 1, *range(trunk, trunk + len(row.chosen) + len(row.rejected) - 2)]
        columns += [(first + at, token, number) for at, token in enumerate(row.chosen) if at not in row.given[0]]
        columns += [
            (first if at == 0 else others + at - 1, token, len(pairs) + number)
            for at, token in enumerate(row.rejected)
            if at not in row.given[1]
        ]
    columns.sort(key=lambda column: column[2])  # stable: tokens stay in order
    return Reading(predicting, torch.tensor(columns).T.contiguous())


def branched(shared: int, pairs: Sequence[PairRow], padding: int) -> dict[str, Any]:
    """`places` of the pairs in their stream; also `branches` and `positions`, (pairs, longest)."""
    trunks = [len(row.prompt) - shared for row in pairs]
    ways = [(len(row.chosen) - 1, len(row.rejected) - 1) for row in pairs]
    found = places(shared, [trunk + sum(way) for trunk, way in zip(trunks, ways, strict=True)], padding)
    branches, positions = (torch.zeros(found["rows"].shape, dtype=torch.long) for _ in range(2))
    for row, (trunk, way) in enumerate(zip(trunks, ways, strict=True)):
        numbers = [0] * trunk + [number for number, tokens in enumerate(way, start=1) for _ in range(tokens)]
        after = [*range(trunk), *(trunk + at for tokens in way for at in range(tokens))]
        branches[row, : len(numbers)] = torch.tensor(numbers)
        positions[row, : len(after)] = shared + torch.tensor(after)
    return {**found, BRANCHES: branches, "positions": positions}
