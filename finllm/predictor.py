"""Sentiment of texts from a trained run, an adapter or any causal language model."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, TypedDict, overload

import numpy as np

from finllm import models, scoring
from finllm.errors import RunError
from finllm.example import LABELS, Label
from finllm.explaining import Explainer
from finllm.models import Card
from finllm.prompts import Prompter
from finllm.recipe import Model, Prompt

log = logging.getLogger(__name__)


class Prediction(TypedDict):
    """The answer for one text."""

    sentiment: Label
    confidence: float
    """Probability of that label among the three."""
    probabilities: dict[Label, float]


class Explanation(Prediction):
    """The answer for one text, with the model's own reason for it."""

    explanation: str
    truncated: bool
    """The explanation was cut at the token limit; it then ends in an ellipsis."""


class SentimentPredictor:
    """A model on a device, ready to read texts."""

    def __init__(self, source: str | Path, *, device: str | None = None, batch_tokens: int = 16_384) -> None:
        """Load a run folder, an adapter folder, a model folder, a hub id, or the embedded `smollm2-135m`.

        `device` is `cuda`, `cpu` or null for the GPU where there is one. `batch_tokens` bounds memory, not results.
        Raises RunError where `source` is none of these, or its run has not finished training.
        """
        import torch

        folder = _weights(Path(source))
        base, prompt = _base_and_prompt(str(source), folder)
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        has_bf16 = place.startswith("cuda") and torch.cuda.is_bf16_supported()
        dtype: Literal["bf16", "fp32"] = (
            "bf16" if base.dtype == "bf16" or (base.dtype == "auto" and has_bf16) else "fp32"
        )
        loaded = models.load(base, dtype=dtype, device=place, dequantize=place == "cpu")
        adapted = folder is not None and models.is_adapter(folder)
        self.model: Any = models.attach(loaded.model, folder) if folder is not None and adapted else loaded.model
        self.prompter = Prompter(loaded.tokenizer, prompt)
        self.batch_tokens = batch_tokens
        self._engine = scoring.engine_of(self.model)  # made once: it takes tens of milliseconds
        self._explainer: Explainer | None = None
        self.base_explains = folder is not None and adapted and not _explains(folder)
        """Whether the adapter learnt labels alone, so that it is off while explanations are written."""

    @overload
    def predict(self, texts: str, target: str | None = None) -> Prediction: ...  # type: ignore[overload-overlap]  # a str is a sequence of str
    @overload
    def predict(self, texts: Sequence[str], target: str | None = None) -> list[Prediction]: ...

    def predict(self, texts: str | Sequence[str], target: str | None = None) -> Prediction | list[Prediction]:
        """The sentiment of one text, or of each of several (batched, in their order).

        A text longer than the model was trained for is cut at its end, with a warning.
        """
        _, predictions = self._read([texts] if isinstance(texts, str) else list(texts), target)
        return predictions[0] if isinstance(texts, str) else predictions

    @overload
    def explain(self, texts: str, target: str | None = None, *, max_tokens: int = ...) -> Explanation: ...  # type: ignore[overload-overlap]  # a str is a sequence of str
    @overload
    def explain(
        self, texts: Sequence[str], target: str | None = None, *, max_tokens: int = ...
    ) -> list[Explanation]: ...

    def explain(
        self, texts: str | Sequence[str], target: str | None = None, *, max_tokens: int = 96
    ) -> Explanation | list[Explanation]:
        """The sentiment as `predict` gives it, and an explanation of that label, of one text or of each of several.

        An adapter that has learnt labels alone is switched off while the explanation is written.
        An explanation is always a whole JSON string; one of more than `max_tokens` tokens is cut and says so. Raises
        RunError where the model's tokenizer cannot serve.
        """
        if max_tokens < 1:
            raise RunError(f"max_tokens is {max_tokens}; an explanation needs at least 1")
        prompts, predictions = self._read([texts] if isinstance(texts, str) else list(texts), target)
        labels = [prediction["sentiment"] for prediction in predictions]
        # Adapters that have learnt labels alone stammer where words are wanted (docs/experiments.md).
        with self.model.disable_adapter() if self.base_explains else nullcontext():
            written = self._writer().explain(prompts, labels, max_tokens=max_tokens, batch_tokens=self.batch_tokens)
        explained: list[Explanation] = [
            {**prediction, "explanation": one.answer.explanation, "truncated": one.truncated}
            for prediction, one in zip(predictions, written, strict=True)
        ]
        return explained[0] if isinstance(texts, str) else explained

    def _writer(self) -> Explainer:
        """Made when it is first needed: to read a tokenizer's words takes a second."""
        if self._explainer is None:
            self._explainer = Explainer(self.model, self.prompter)
        return self._explainer

    def _read(self, texts: list[str], target: str | None) -> tuple[list[list[int]], list[Prediction]]:
        """The texts' prompts, and what the labels' probabilities are after each."""
        rendered = self.prompter.render(texts, [target] * len(texts))
        cut = sum(prompt.truncated for prompt in rendered)
        if cut:
            log.warning("%d text(s) cut to fit %d tokens", cut, self.prompter.spec.max_tokens)
        empty = sum(not text.strip() for text in texts)
        if empty:
            log.warning("%d empty text(s): the answer is what the model says of nothing", empty)
        answers = [self.prompter.answers[label] for label in LABELS]
        prompts = [prompt.ids for prompt in rendered]
        rows = scoring.score(self.model, prompts, answers, batch_tokens=self.batch_tokens, engine=self._engine)
        return prompts, [_prediction(row) for row in scoring.probabilities(rows)]


def _prediction(row: Any) -> Prediction:
    best = int(np.argmax(row))
    return {
        "sentiment": LABELS[best],
        "confidence": float(row[best]),
        "probabilities": {label: float(p) for label, p in zip(LABELS, row, strict=True)},
    }


def _weights(source: Path) -> Path | None:
    """The folder of trained weights in a run folder or an adapter folder; None for a base model."""
    if (source / "plan.json").is_file():
        if not (source / "adapter" / models.CARD).is_file():
            raise RunError(f"{source} has no trained weights yet; see `finllm status {source.name}`")
        return source / "adapter"
    return source if (source / models.CARD).is_file() or models.is_adapter(source) else None


def _explains(folder: Path) -> bool:
    """Whether weights have learnt explanations; those of others may have."""
    return not (folder / models.CARD).is_file() or Card.of(folder).explains


def _base_and_prompt(source: str, folder: Path | None) -> tuple[Model, Prompt]:
    """The base model to load, and the prompt it was trained with (the default one where nobody says)."""
    if folder is None:
        return Model(name=source), Prompt()
    if not (folder / models.CARD).is_file():
        return Model(name=models.adapter_base(folder)), Prompt()
    card = Card.of(folder)
    return (card.base if card.trained == "adapter" else Model(name=str(folder))), card.prompt
