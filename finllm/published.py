"""Figures that others have published, with their protocols: to be shown beside ours, never among them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Evidence = Literal["read", "abstract", "second hand"]
SAID: dict[Evidence, str] = {"read": "", "abstract": "; abstract or model card", "second hand": "; second hand"}


@dataclass(frozen=True)
class Published:
    """One published figure; per cent, as given by its source."""

    dataset: str
    """As recipes name it."""
    title: str
    system: str
    accuracy: str
    f1: str
    """With its kind: mF1 is macro-F1, wF1 weighted F1."""
    protocol: str
    source: str
    evidence: Evidence = "read"


_50 = ("phrasebank", "PhraseBank 50Agree")
_ALL = ("phrasebank", "PhraseBank AllAgree")
_FIQA = ("fiqa", "FiQA, three classes")
_TFNS = ("tfns", "TFNS, validation tweets")
_FLARE = "FLARE's 970 rows, split unknown"
_FINGPT = (
    "FinGPT's 1,212 rows; 59 have a near twin in its training part, and an answer it cannot read counts as neutral"
)
_FLARE_FIQA = "flare's 235 rows; 28 have a near twin in its training part"
_FINGPT_FIQA = "FinGPT's 275 rows; some are in its training part too"

PUBLISHED: tuple[Published, ...] = (
    Published(*_50, "FinBERT (Araci)", "86", "mF1 84", "80/20", "arXiv 1908.10063", "second hand"),
    Published(*_50, "FinBERT-FinVocab (Yang et al.)", "87.2", "", "random 90/10, mean of 10", "arXiv 2006.08097"),
    Published(
        *_50, "ModernBERT-base 149M, LoRA r=16", "86.9 ± 1.0", "mF1 85.4 ± 1.4", "10-fold, stratified", "ModernFinBERT"
    ),
    Published(*_50, "finbert-tone, off the shelf", "79.1", "mF1 75.3", "all 4,846 rows", "ModernFinBERT"),
    Published(*_50, "GPT-4 (1106), zero-shot", "80.4", "wF1 80.6", _FLARE, "arXiv 2411.02476"),
    Published(*_50, "Mistral-7B-Instruct, zero-shot", "73.4", "wF1 69.8", _FLARE, "arXiv 2411.02476"),
    Published(*_50, "Llama-3-8B-Instruct, zero-shot", "77.5", "wF1 76.7", _FLARE, "arXiv 2411.02476"),
    Published(*_50, "Mistral-7B, QLoRA r=32", "86.8", "wF1 86.6", _FLARE, "arXiv 2411.02476"),
    Published(*_50, "Llama-3-8B-Instruct, QLoRA r=32", "86.2", "wF1 86.3", _FLARE, "arXiv 2411.02476"),
    Published(*_50, "FinGPT v3.3 (Llama-2-13B)", "88.2", "wF1 88.2", _FINGPT, "FinGPT"),
    Published(*_50, "FinLoRA Llama-3.1-8B, LoRA r=8, 8 bit", "85.6", "", _FINGPT, "FinLoRA"),
    Published(
        *_50,
        "Qwen2.5-1.5B-Instruct, QLoRA r=16",
        "88.9",
        "mF1 88.7",
        "random 80/10/10, 486 rows",
        "wrtdevcod",
        "abstract",
    ),
    Published(
        *_50,
        "Llama-3.1-8B, QLoRA r=16",
        "89.0 ± 0.4",
        "mF1 88.6 ± 0.4",
        "80/20, 966 rows, three seeds; trained on TFNS and NWGI too",
        "khoaminh2957/findpo",
    ),
    Published(
        *_ALL, "roberta-large, all weights", "97.8 ± 0.5", "wF1 97.8", "3 x 453 rows", "gtfintechlab/zero-shot-finance"
    ),
    Published(
        *_ALL, "roberta-base, all weights", "97.3 ± 0.8", "wF1 97.3", "3 x 453 rows", "gtfintechlab/zero-shot-finance"
    ),
    Published(*_ALL, "GPT-4, zero-shot", "93.9 ± 0.9", "mF1 93.4", "3 x 453 rows", "gtfintechlab/zero-shot-finance"),
    Published(*_ALL, "FinBERT (Araci)", "97", "mF1 95", "not stated", "survey tables", "second hand"),
    Published(*_ALL, "Qwen2.5-7B-Instruct, QLoRA", "", "mF1 97.2", "80/10/10, 227 rows", "afzall003"),
    Published(*_FIQA, "GPT-4 (1106), zero-shot", "71.9", "wF1 75.7", _FLARE_FIQA, "arXiv 2411.02476"),
    Published(*_FIQA, "Mistral-7B, QLoRA r=32", "85.5", "wF1 85.1", _FLARE_FIQA, "arXiv 2411.02476"),
    Published(*_FIQA, "Llama-3-8B, QLoRA r=32", "87.2", "wF1 85.3", _FLARE_FIQA, "arXiv 2411.02476"),
    Published(*_FIQA, "FinLoRA Llama-3.1-8B, LoRA", "81.3", "", _FLARE_FIQA, "FinLoRA"),
    Published(*_FIQA, "Gemini 2.0 Flash-Lite, fine-tuned", "88.1", "", _FLARE_FIQA, "FinLoRA"),
    Published(*_FIQA, "FinGPT v3.2 (Llama-2-7B)", "84.4", "wF1 86.0, mF1 75.2", _FINGPT_FIQA, "FinGPT"),
    Published(*_FIQA, "FinBERT-FinVocab (Yang et al.)", "84.4", "", "two classes, 90/10 x 10", "arXiv 2006.08097"),
    Published(*_TFNS, "FinGPT v3.3 (Llama-2-13B)", "", "wF1 90.3", "2,388 rows as released", "FinGPT"),
    Published(*_TFNS, "GPT-4, zero-shot", "", "wF1 80.8", "2,388 rows as released", "FinGPT"),
    Published(*_TFNS, "FinBERT", "", "wF1 73.3", "2,388 rows as released", "FinGPT"),
    Published(
        *_TFNS, "Llama-3.1-8B, QLoRA r=16", "", "wF1 91.1 ± 0.1", "its own 80/20, three seeds", "khoaminh2957/findpo"
    ),
)
"""From the sources' own tables unless `evidence` says otherwise."""

FOUNDING: tuple[tuple[str, str, str], ...] = (
    ("FinBERT (baseline)", "87.2", "85.1"),
    ("Mistral-7B (no fine-tuning)", "72.4", "68.9"),
    ("Mistral + LoRA", "89.8", "88.3"),
    ("Llama-3-8B (no fine-tuning)", "74.1", "70.2"),
    ("Llama-3 + LoRA", "90.2", "89.1"),
)
"""System, PhraseBank and FiQA accuracy, as the text that this project began with states them; nobody measured them."""


def tables(datasets: Sequence[str]) -> dict[str, list[tuple[str, str, str, str, str]]]:
    """System, accuracy, F1, protocol and source of what is published for these data sets, by title."""
    found: dict[str, list[tuple[str, str, str, str, str]]] = {}
    for one in PUBLISHED:
        if one.dataset in datasets:
            source = one.source + SAID[one.evidence]
            found.setdefault(one.title, []).append((one.system, one.accuracy, one.f1, one.protocol, source))
    return found
