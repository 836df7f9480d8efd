"""Sequence classifiers of the hub, such as FinBERT, read through their own `id2label`."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
from numpy.typing import NDArray

from finllm.errors import RunError
from finllm.example import LABELS, Example, Label

WORDS: dict[str, Label] = {
    "negative": "negative", "neg": "negative", "bearish": "negative",
    "neutral": "neutral", "neu": "neutral", "none": "neutral",
    "positive": "positive", "pos": "positive", "bullish": "positive",
}  # fmt: skip
"""What classifiers call the three classes, in lower case."""
BATCH = 32
HUB_SECONDS = 5.0
LONGEST = 512
"""Tokens, where neither model nor tokenizer says."""


@dataclass(frozen=True)
class HubClassifier:
    """A classifier on a device."""

    model: Any
    tokenizer: Any
    columns: tuple[int, int, int]
    """Which of its outputs stands for each of LABELS."""
    max_tokens: int

    def probabilities(self, examples: Sequence[Example]) -> tuple[NDArray[np.float64], list[bool]]:
        """(examples, labels) from the text alone, and which texts were cut; batches are of like length."""
        import torch

        texts = [example.text for example in examples]
        lengths = [len(ids) for ids in self.tokenizer(texts, truncation=False)["input_ids"]] if texts else []
        rows = np.zeros((len(texts), len(LABELS)))
        order = sorted(range(len(texts)), key=lambda i: lengths[i])
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            encoded = self.tokenizer(
                [texts[i] for i in batch], truncation=True, max_length=self.max_tokens, padding=True,
                return_tensors="pt",
            ).to(self.model.device)  # fmt: skip
            with torch.inference_mode():
                logits = self.model(**encoded).logits.double()
            rows[batch] = torch.softmax(logits, dim=-1)[:, list(self.columns)].cpu().numpy()
        return rows, [length > self.max_tokens for length in lengths]


def load(name: str, device: str) -> HubClassifier:
    """The classifier of a hub id or folder, in fp32; raises RunError where it cannot be had or its labels read."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from finllm.models import quiet_libraries

    quiet_libraries()
    local = Path(name).is_dir() or not _hub_answers()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        model = AutoModelForSequenceClassification.from_pretrained(name, local_files_only=local).eval().to(device)
    except (OSError, ValueError, ImportError) as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise RunError(f"{name} cannot be loaded: {words[0]}") from error
    known = [n for n in (tokenizer.model_max_length, model.config.max_position_embeddings) if n and n < 1_000_000]
    return HubClassifier(model, tokenizer, columns(name, model.config.id2label), min(known, default=LONGEST))


@cache
def _hub_answers() -> bool:
    """Whether the hub can be reached at all: its library tries for a minute where there is no network."""
    from huggingface_hub import constants

    if getproxies():
        return True
    place = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((place.hostname, place.port or 443), timeout=HUB_SECONDS).close()
    except OSError:
        return False
    return True


def columns(name: str, id2label: dict[int, str]) -> tuple[int, int, int]:
    """Which output stands for each of LABELS; raises RunError where the names do not say so, once each."""
    meaning = {int(number): WORDS.get(str(word).strip().lower()) for number, word in id2label.items()}
    if sorted(meaning.values(), key=str) != sorted(LABELS):
        shown = ", ".join(f"{number}: {word}" for number, word in id2label.items())
        raise RunError(
            f"{name}: its id2label ({shown}) does not name negative, neutral and positive once each; "
            "write the right names into its config.json, as the order cannot be guessed"
        )
    first, second, third = (next(n for n, label in meaning.items() if label == wanted) for wanted in LABELS)
    return first, second, third
