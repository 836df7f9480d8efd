r"""How an example is shown to a model, and how its answer is read: one module for training, evaluation and prediction.

    plain   INSTRUCTION \n\n Text: TEXT \n [Target: TARGET \n] Sentiment:| label end-of-sequence
    chat    the tokenizer's chat template around the same words; the label is the assistant's turn

What stands right of the bar is learnt. Every prompt of a recipe begins with the same tokens. What follows a label where
it is explained is in answer.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finllm.errors import RunError
from finllm.example import LABELS, Label
from finllm.recipe import Prompt

LONGEST_TOKEN = 32
"""Characters; used to cut an enormous text before it is tokenised. Longer tokens only cut a text earlier."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """One prompt as token ids, up to where the label begins."""

    ids: list[int]
    truncated: bool


class Prompter:
    """Renders texts for one tokenizer; holds the token ids of the three labels and of the end."""

    def __init__(self, tokenizer: Any, spec: Prompt) -> None:
        """Raises RunError where the tokenizer cannot serve: no fast version, no chat template, labels that merge."""
        self.tokenizer = tokenizer
        self.spec = spec
        if not tokenizer.is_fast:
            raise RunError("the model's tokenizer has no fast version, which cutting long texts needs; choose another")
        if spec.template == "chat" and not tokenizer.chat_template:
            raise RunError("prompt.template is chat, but the model's tokenizer has no chat template; write plain")
        if tokenizer.eos_token_id is None:
            raise RunError("the model's tokenizer has no end-of-sequence token, which must follow the label")
        self._special = sorted({t for t in tokenizer.all_special_tokens if len(t) > 1}, key=len, reverse=True)
        self.end: int = tokenizer.eos_token_id
        self.answers: dict[Label, tuple[int, ...]] = {label: self.answer(label) for label in LABELS}
        """Token ids of each label as it follows a prompt, without the end."""
        if len(set(self.answers.values())) < len(LABELS):
            raise RunError(f"the model's tokenizer gives two labels the same tokens: {self.answers}")
        self.longest_answer = max(map(len, self.answers.values())) + 1
        """Tokens of the longest label and the end."""
        if len(self.encode([self.string("")])[0]) + self.longest_answer >= spec.max_tokens:
            raise RunError(f"prompt.max_tokens is {spec.max_tokens}, which the instruction alone fills; raise it")

    def string(self, text: str, target: str | None = None) -> str:
        """The prompt in words, white space in the text folded, up to where the label begins."""
        lines = [f"Text: {self.plain(text)}"]
        if target is not None:
            lines.append(f"Target: {self.plain(target)}")
        if self.spec.template == "plain":
            return "\n".join([self.spec.instruction, "", *lines, "Sentiment:"])
        content = "\n".join([self.spec.instruction, "", *lines])
        turns = [{"role": "user", "content": content}]
        return str(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))

    def render(self, texts: Sequence[str], targets: Sequence[str | None] | None = None) -> list[Rendered]:
        """Prompts as token ids; a text too long for `max_tokens` is cut at its end, the label still fits."""
        if not texts:
            return []
        about = targets or [None] * len(texts)
        room = self.spec.max_tokens - self.longest_answer
        limit = self.spec.max_tokens * LONGEST_TOKEN
        short = [text[:limit] for text in texts]  # no tokenizer needs to see a whole book
        encoded = self.encode([self.string(text, target) for text, target in zip(short, about, strict=True)])
        return [
            Rendered(self._cut(text, target, len(ids) - room, room), truncated=True)
            if len(ids) > room
            else Rendered(ids, truncated=len(whole) > limit)
            for whole, text, target, ids in zip(texts, short, about, encoded, strict=True)
        ]

    def answer(self, words: str) -> tuple[int, ...]:
        """What any answer adds to the tokens of a prompt, without the end; RunError where the tokenizer merges the two."""
        words = self.plain(words)
        prompt = self.string("Sales rose.")
        word = words if self.spec.template == "chat" else f" {words}"
        alone, whole = self.encode([prompt, prompt + word])
        if whole[: len(alone)] != alone or len(whole) == len(alone):
            raise RunError(f"the model's tokenizer merges the prompt's end with {word!r}; choose another template")
        return tuple(whole[len(alone) :])

    def encode(self, strings: list[str]) -> list[list[int]]:
        """Token ids; a chat template writes its own special tokens, so that none is doubled."""
        encoded = self.tokenizer(strings, add_special_tokens=self.spec.template == "plain", return_attention_mask=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _cut(self, text: str, target: str | None, excess: int, room: int) -> list[int]:
        """The prompt with so much of the text's end taken off that it fits into `room` tokens."""
        text = " ".join(text.split())
        spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        keep = len(spans) - excess
        while keep > 0:
            ids = self.encode([self.string(text[: spans[keep - 1][1]], target)])[0]
            if len(ids) <= room:
                return ids
            keep -= len(ids) - room
        ids = self.encode([self.string("", target)])[0]
        if len(ids) > room:
            raise RunError(
                f"a target of {len(target or '')} characters leaves no room in prompt.max_tokens; shorten it"
            )
        return ids

    def plain(self, text: str) -> str:
        """The text on one line; what would read as a special token is broken up, so that no text can end a turn."""
        line = " ".join(text.split())
        for token in self._special:
            line = line.replace(token, f"{token[0]} {token[1:]}")
        return line
