r"""A label with its explanation: JSON on the line behind the label, which itself is scored and learnt as ever.

prompt| positive \n{"sentiment": "positive", "explanation": "| Profit rose by a fifth."} end-of-sequence
      ^ label    ^ opening: always given, so never learnt     ^ ending: learnt, and written under constraint
"""

import json

from pydantic import Field

from finllm.errors import RunError
from finllm.example import Label
from finllm.prompts import Prompter
from finllm.yamlfile import Spec

CLOSING = '"}'
CUT = "…"
"""Stands at the end of an explanation that was cut."""
LINE_END = "\n"
"""What tokenizers never merge with the word behind it."""


class Answer(Spec):
    """A label and the reason for it."""

    sentiment: Label
    explanation: str = Field(min_length=1, pattern=r"^\S")


def opening(label: Label) -> str:
    """The beginning of the JSON, up to where the explanation's own words begin."""
    return f'{{"sentiment": "{label}", "explanation": "'


def closed(label: Label, written: bytes) -> tuple[str, bool]:
    """The JSON of an answer whose ending was written so far, and whether it had to be cut: behind its last character."""
    text = written.decode("utf-8", errors="ignore")  # the last character may lack bytes
    for end in (CLOSING, CLOSING[0]):
        if text.endswith(end) and not _is_escaped(text.removesuffix(end)):
            return opening(label) + text.removesuffix(end) + CLOSING, False
    words = (text[:-1] if _is_escaped(text) else text).rstrip()
    return opening(label) + words + CUT + CLOSING, True


def _is_escaped(before: str) -> bool:
    """Whether the next character would be escaped."""
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


class AnswerTokens:
    """Openings and endings as the tokens of one tokenizer."""

    def __init__(self, prompter: Prompter) -> None:
        """Raises RunError where the tokenizer merges a label with a line end."""
        self._prompter = prompter
        self.openings: dict[Label, list[int]] = {label: self._opening(label) for label in prompter.answers}
        """Between the label and the explanation's own words."""

    def ending(self, explanation: str, most: int) -> list[int]:
        """The explanation's words, closing and end of sequence; of more than `most` tokens, only the first of them."""
        words = self._prompter.plain(explanation)
        tokens = self._behind(LINE_END, json.dumps(words, ensure_ascii=False)[1:-1] + CLOSING)
        return tokens[:most] if len(tokens) >= most else [*tokens, self._prompter.end]

    def _opening(self, label: Label) -> list[int]:
        chat = self._prompter.spec.template == "chat"
        labelled = self._prompter.string("Sales rose.") + (label if chat else f" {label}")
        return self._behind(labelled, LINE_END + opening(label))

    def _behind(self, before: str, text: str) -> list[int]:
        """What a text adds to the tokens of what stands before it."""
        alone, whole = self._prompter.encode([before, before + text])
        if whole[: len(alone)] != alone:
            raise RunError(
                f"the model's tokenizer merges {before[-10:]!r} with {text[:10]!r}, so that explanations cannot follow "
                "labels; use another base model"
            )
        return whole[len(alone) :]
