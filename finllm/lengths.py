"""How long prompts are in tokens, told from their characters: a plan has no tokenizer."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from finllm.example import Example
from finllm.methods import Explanations
from finllm.recipe import Prompt
from finllm.yamlfile import Spec

PIECE = re.compile(r"[A-Za-z]{1,6}|\d|[^\sA-Za-z\d]")
"""About one token. SmolLM2's tokenizer, all training texts: PhraseBank 1.09 pieces a token (179 for the 187 tokens of
its longest text), FiQA 0.95, the shipped sample 1.08, all public sets together 1.02. Characters would mislead: 4.15 a
token on PhraseBank, but 3.1 in its longest texts, which are full of figures."""
AROUND_TEXT = 4
"""Tokens of `Sentiment:` and the line ends, behind the text."""
TARGET = 3
"""Tokens of `Target:` and its line end."""
CHAT = 24
"""Tokens that a chat template puts before the instruction, at most."""
ANSWER = 2
"""Tokens of a label and the end of sequence; none of the known tokenizers needs more for our labels."""
OPENING = 14
"""Tokens between a label and the words of its explanation: the beginning of a JSON object."""
MOST_TEXTS = 20_000
"""Of a large set, every n-th text is looked at, so that a plan stays quick."""


class Lengths(Spec):
    """Tokens of the training texts, with what stands behind them in a prompt, without the instruction."""

    texts: int
    mean: float
    deviation: float
    longest: int
    explanation: int = 0
    """Tokens behind a label of the longest explanation, where explanations are learnt; the others count them too."""


def lengths_of(examples: Sequence[Example], explained: Explanations | None = None) -> Lengths | None:
    """Estimated lengths of the examples' texts, with their targets; None where there are no examples.

    With the explanations that are learnt, where the recipe says so.
    """
    few = examples[:: -(-len(examples) // MOST_TEXTS) or 1]
    if not few:
        return None
    behind = [_explanation(example, explained) for example in few]
    some = [_tokens(example) + more for example, more in zip(few, behind, strict=True)]
    return Lengths(
        texts=len(examples),
        mean=statistics.fmean(some),
        deviation=statistics.pstdev(some),
        longest=max(some),
        explanation=max(behind),
    )


def _explanation(example: Example, explained: Explanations | None) -> int:
    """Tokens behind the label."""
    if explained is None or example.explanation is None:
        return 0
    return OPENING + min(pieces(example.explanation) + 2, explained.max_tokens)


def _tokens(example: Example) -> int:
    target = 0 if example.target is None else pieces(example.target) + TARGET
    return pieces(example.text) + target + AROUND_TEXT


def pieces(text: str) -> int:
    """Estimated tokens of a text."""
    return len(PIECE.findall(text))


@dataclass(frozen=True)
class Batch:
    """The largest batch that one process computes."""

    rows: int
    longest: int
    """Tokens of the longest row, without those of the instruction where these are shared."""
    shared: int
    """Tokens that are computed once for all rows; 0 where each row has its own."""
    tokens: int
    """Tokens computed, with padding."""
    explanation: int = 0
    """Tokens of the longest explanation."""

    @property
    def answers(self) -> int:
        """Tokens that are learnt, at most."""
        return self.rows * (ANSWER + self.explanation)

    @property
    def keys(self) -> int:
        """Keys that all segments attend to: the rows' own, and the instruction once more for each row."""
        return self.tokens + self.rows * self.shared


def instruction_tokens(prompt: Prompt) -> int:
    """Estimated tokens that all prompts begin with."""
    return pieces(prompt.instruction) + 3 + (CHAT if prompt.template == "chat" else 0)  # first token, `Text:`


def largest_batch(
    prompt: Prompt,
    known: Lengths | None,
    *,
    rows: int,
    shares: bool,
    epochs: float = 1,
    multiple: int = 1,
    explained: Explanations | None = None,
) -> Batch:
    """The largest micro-batch of `rows` examples in a run; where lengths are not known, all are `max_tokens` long.

    Every text is in some batch, so padded rows are as long as the longest text. In a stream lengths add up: the
    largest of n sums is about sqrt(2 ln n) standard deviations above their mean (independent normal variables).
    """
    begin = min(instruction_tokens(prompt), prompt.max_tokens)
    behind = known.explanation if known else OPENING + explained.max_tokens if explained else 0
    room = prompt.max_tokens - begin + behind
    one = room if known is None else min(room, known.longest + ANSWER)
    if not shares:
        return Batch(
            rows=rows, longest=begin + one, shared=0, tokens=rows * (begin + one), explanation=behind
        )  # fmt: skip
    own = one - 1  # the end of sequence is no input of a stream
    total = float(rows * own)
    if known is not None:
        sums = max(2.0, known.texts * epochs / rows)
        spread = known.deviation * math.sqrt(2 * math.log(sums) * rows)
        total = min(total, max(rows * (known.mean + ANSWER - 1) + spread, own))
    tokens = begin + math.ceil(total) + 1
    return Batch(
        rows=rows, longest=own, shared=begin, tokens=-(-tokens // multiple) * multiple, explanation=behind
    )  # fmt: skip
