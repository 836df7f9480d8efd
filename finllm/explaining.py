"""Explanations of labels, written by the model as JSON of a schema: batched, and cut with a proper end.

The label stands already when writing begins: the scorer has chosen it. llguidance says which tokens keep the answer
within the schema, Transformers' `generate` does the rest, and begins anew without the rows that are done once they are
many. What all prompts begin with is computed once.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import fill_next_token_bitmask_par
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria

from finllm import scoring
from finllm.answer import Answer, AnswerTokens, closed, opening
from finllm.errors import RunError
from finllm.example import LABELS, Label
from finllm.prompts import Prompter
from finllm.shared_prefix import shared_length

DONE_SHARE = 0.25
"""Of the rows that are written together: when so many are done, the others go on without them."""


@dataclass(frozen=True, slots=True)
class Explained:
    """One answer, and how it ended."""

    json: str
    """The whole answer."""
    truncated: bool
    """It was cut at the token limit."""
    tokens: int
    """Written behind the opening."""

    @property
    def answer(self) -> Answer:
        """The answer, read by its schema."""
        return Answer.model_validate_json(self.json)


class Grammar:
    """The schema over one tokenizer: for each label, a matcher that has read the opening."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        """`vocabulary` is the number of the model's logits; raises RunError where the tokenizer is of an unknown kind."""
        try:
            known: LLTokenizer = from_tokenizer(tokenizer, n_vocab=max(vocabulary, len(tokenizer)))
        except ValueError as error:
            raise RunError(f"llguidance does not know the model's kind of tokenizer: {error}") from error
        start = LLMatcher(known, _grammar(), log_level=0)  # a refusal is an error of ours, with its reason
        self.matchers: dict[Label, LLMatcher] = {}
        for label in LABELS:
            self.matchers[label] = start.deep_copy()
            if not self.matchers[label].consume_tokens(known.greedy_tokenize(opening(label))):
                raise RunError(f"the answer's opening does not fit its schema: {self.matchers[label].get_error()}")
        self.tokenizer = known
        self.words = -(-known.vocab_size // 32)
        """int32 words in a mask."""
        self.executor = LLExecutor(num_threads=1)  # 64 masks take a millisecond, and several threads longer


def _grammar() -> str:
    """The schema, written in one way: as `opening` does, and no escapes but those that JSON cannot do without."""
    return LLMatcher.grammar_from_json_schema(
        json.dumps(Answer.model_json_schema()),
        overrides={
            "whitespace_flexible": False,
            "item_separator": ", ",
            "key_separator": ": ",
            "json_allowed_escapes": '"\\',
        },
    )


@dataclass(slots=True)
class Row:
    """One answer while it is written."""

    matcher: LLMatcher
    written: list[int] = field(default_factory=list)
    done: bool = False

    def take(self, token: int) -> None:
        """One more token; raises RunError where the schema does not allow it, which its mask excludes."""
        if not self.matcher.consume_token(token):
            raise RunError(f"token {token} of an explanation does not fit its schema: {self.matcher.get_error()}")
        self.written.append(token)
        self.done = self.matcher.is_stopped()


class Allowed(LogitsProcessor):  # type: ignore[misc]  # Transformers ships no types
    """Leaves each row the tokens that its answer may go on with."""

    def __init__(self, grammar: Grammar, rows: Sequence[Row], device: torch.device) -> None:
        self._grammar, self._rows = grammar, rows
        self._mask = torch.full((len(rows), grammar.words), -1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._bits = torch.arange(32, dtype=torch.int32, device=device)

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocabulary), those of other tokens at minus infinity; a GPU may still be computing them."""
        open_rows = [(row.matcher, place) for place, row in enumerate(self._rows) if not row.done]
        fill_next_token_bitmask_par(self._grammar.executor, open_rows, self._mask.numpy())
        words = self._mask.to(scores.device, non_blocking=True)
        allowed = ((words[:, :, None] >> self._bits) & 1).flatten(1)[:, : scores.shape[1]].bool()
        return scores.masked_fill(~allowed, float("-inf"))


class Done(StoppingCriteria):  # type: ignore[misc]  # Transformers ships no types
    """Takes note of each token, and ends the rows whose answers are complete: all of them once those are many."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        """(rows,) bool."""
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if not row.done:
                row.take(token)
        done = [row.done for row in self._rows]
        if sum(done) >= DONE_SHARE * len(done):
            done = [True] * len(done)
        return torch.tensor(done, device=input_ids.device)


class Explainer:
    """Writes explanations with one model."""

    def __init__(self, model: Any, prompter: Prompter) -> None:
        """Raises RunError where the model's tokenizer cannot serve."""
        self._model, self._base = model, scoring.base_of(model)
        self._prompter = prompter
        self._openings = AnswerTokens(prompter).openings
        self.grammar = Grammar(prompter.tokenizer, self._base.get_output_embeddings().weight.shape[0])

    def explain(
        self, prompts: Sequence[list[int]], labels: Sequence[Label], *, max_tokens: int, batch_tokens: int
    ) -> list[Explained]:
        """The explanation of each prompt's label, the likeliest token each time, at most `max_tokens` of them.

        The result does not depend on `batch_tokens`, the most tokens held at once, beyond rounding.
        """
        if not prompts:
            return []
        begun = [
            [*prompt, *self._prompter.answers[label], *self._openings[label]]
            for prompt, label in zip(prompts, labels, strict=True)
        ]
        rows = [Row(self.grammar.matchers[label].deep_copy()) for label in labels]
        sees_all = scoring.sees_all(self._model, max(map(len, begun)) + max_tokens)
        shared = shared_length(begun) if sees_all else 0
        with torch.inference_mode(), scoring.autocast(self._base):
            prefix = scoring.keys_and_values(self._model, begun[0][:shared]) if shared else []
            lengths = [len(ids) - shared for ids in begun]
            # A window counts padding: where the model has a short one, each row goes alone.
            for batch in scoring.batches_of(lengths, max_tokens, batch_tokens if sees_all else 0):
                self._write(prefix, [begun[i] for i in batch], shared, [rows[i] for i in batch], max_tokens)
        return [self._closed(label, row) for label, row in zip(labels, rows, strict=True)]

    def _write(
        self,
        prefix: list[tuple[Tensor, Tensor]],
        begun: list[list[int]],
        shared: int,
        rows: list[Row],
        max_tokens: int,
    ) -> None:
        """Write the rows of one batch to their ends."""
        ids, mask = padded(begun, shared, self._base.device)
        cache = DynamicCache(config=self._base.config)
        for layer, (keys, values) in enumerate(prefix):
            cache.update(keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1), layer)
        end = ids.shape[1] + max_tokens
        while rows and ids.shape[1] < end:
            ids = self._base.generate(
                ids,
                attention_mask=mask,
                past_key_values=cache,
                generation_config=greedy(end - ids.shape[1], self._prompter.end),
                logits_processor=[Allowed(self.grammar, rows, ids.device)],
                stopping_criteria=[Done(rows)],
            )
            mask = torch.cat([mask, mask.new_ones(len(rows), ids.shape[1] - mask.shape[1])], dim=1)
            left = [place for place, row in enumerate(rows) if not row.done]
            kept = torch.tensor(left, dtype=torch.long, device=ids.device)
            ids, mask, rows = ids[kept], mask[kept], [rows[place] for place in left]
            cache.batch_select_indices(kept)

    def _closed(self, label: Label, row: Row) -> Explained:
        text, cut = closed(label, self.grammar.tokenizer.decode_bytes(row.written))
        return Explained(text, truncated=cut, tokens=len(row.written))


def padded(begun: Sequence[list[int]], shared: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask (rows, longest): the shared beginning, padding, and what each row has of its own."""
    longest = max(map(len, begun))
    gaps = [longest - len(ids) for ids in begun]
    rows = [[*ids[:shared], *[0] * gap, *ids[shared:]] for ids, gap in zip(begun, gaps, strict=True)]
    seen = [[1] * shared + [0] * gap + [1] * (longest - shared - gap) for gap in gaps]
    return torch.tensor(rows, device=device), torch.tensor(seen, device=device)


def greedy(tokens: int, end: int) -> GenerationConfig:
    """At most so many tokens, the likeliest each time, whatever the model's own habits are."""
    return GenerationConfig(
        max_new_tokens=tokens, do_sample=False, num_beams=1, repetition_penalty=1.0, eos_token_id=end, pad_token_id=0
    )
