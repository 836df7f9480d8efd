"""Checks that run with every evaluation: what must hold for its figures to mean what they say."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from finllm.example import LABELS, Example
from finllm.predictions import Answers
from finllm.prompts import Prompter
from finllm.scores import Check

ROWS = 32
"""Texts that a check looks at, spread over all."""
FEW = 8
TOLERANCE = {"fp32": 1e-3, "bf16": 0.25}
"""Nats between two ways of computing one log-probability: bf16 rounds each of a model's sums to three digits."""
CUT_SHARE = 0.01

Score = Callable[[Sequence[list[int]]], NDArray[np.float64]]
"""Log-probabilities (prompts, labels)."""


def some(count: int, most: int = ROWS) -> list[int]:
    """Up to `most` row numbers, spread evenly."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))}) if count else []


def batch_invariance(alone: Score, prompts: Sequence[list[int]], together: NDArray[np.float64], dtype: str) -> Check:
    """Whether texts scored one at a time have the log-probabilities that they have in batches."""
    rows = some(len(prompts))
    difference = _largest(alone([prompts[i] for i in rows]) - together[rows])
    return Check(
        name="a text's figures do not depend on its batch",
        passed=difference <= TOLERANCE[dtype],
        found=f"{len(rows)} texts one at a time: at most {difference:.1e} nats from those in batches "
        f"({TOLERANCE[dtype]:g} allowed in {dtype})",
    )


def adapter_off(off: Score, prompts: Sequence[list[int]], base: NDArray[np.float64], dtype: str) -> Check:
    """Whether the tuned model with its adapter off is the base that it is compared with."""
    rows = some(len(prompts), FEW)
    difference = _largest(off([prompts[i] for i in rows]) - base[rows])
    return Check(
        name="with the adapter off, the tuned model is its base",
        passed=difference <= TOLERANCE[dtype],
        found=f"{len(rows)} texts: at most {difference:.1e} nats apart ({TOLERANCE[dtype]:g} allowed in {dtype})",
    )


def prompts_agree(train: Sequence[Example], prompter: Prompter, saved: Prompter) -> list[Check]:
    """Whether training rows are the prompts of evaluation and of the saved model, byte for byte, with whole labels."""
    from finllm.training.batches import encode

    chosen = [train[i] for i in some(len(train))]
    rows = encode(chosen, prompter)
    shown = saved.render([e.text for e in chosen], [e.target for e in chosen])
    texts = [prompter.tokenizer.decode(row.prompt) for row in rows]
    differ = sum(
        row.prompt != other.ids or text.encode() != saved.tokenizer.decode(other.ids).encode()
        for row, other, text in zip(rows, shown, texts, strict=True)
    )
    wanted = [(*saved.answers[e.label], saved.end) for e in chosen]
    broken = sum(tuple(row.answer) != answer for row, answer in zip(rows, wanted, strict=True))
    long = sum(len(row.prompt) + len(row.answer) > prompter.spec.max_tokens for row in rows)
    return [
        Check(
            name="prompts of training and evaluation are the same bytes",
            passed=differ == 0,
            found=f"{len(rows)} training texts, as trained on and as the saved tokenizer and prompt show them: "
            f"{differ} differ",
        ),
        Check(
            name="label tokens are whole",
            passed=broken == 0 and long == 0,
            found=f"{len(rows)} training rows: {broken} without the whole label and the end, {long} over "
            f"{prompter.spec.max_tokens} tokens; the labels have "
            + ", ".join(str(len(prompter.answers[label])) for label in LABELS)
            + " tokens",
        ),
    ]


def truncation(answers: Sequence[Answers]) -> Check:
    """How many texts each system saw cut short."""
    cut = {one.key: sum(p.truncated for p in one.predictions) for one in answers}
    rows = len(answers[0].predictions)
    worst = max(cut.values(), default=0) / max(rows, 1)
    told = ", ".join(f"{key} {count} ({count / rows:.1%})" for key, count in cut.items() if count) or "none"
    return Check(name="texts are read whole", passed=worst <= CUT_SHARE, found=f"cut, of {rows:,} texts: {told}")


def leaks(rows: int, notes: Sequence[str]) -> Check:
    """That the parts of the data were compared, and what was left out; a leak within a set ends a run before this."""
    told = "; ".join(notes) or "nothing had to be left out"
    return Check(
        name="no text, and no near twin of one, stands in two parts",
        passed=True,
        found=f"{rows:,} texts compared; {told}",
    )


def contamination(answers: Sequence[Answers]) -> Check:
    """Which systems have seen texts that they are tested on."""
    seen = [f"{one.key} {mark}" for one in answers for mark in one.marks if mark.startswith("has seen")]
    found = "; ".join(seen) or "no system is known to have seen them"
    return Check(name="no system was trained on what it is tested on", passed=not seen, found=found)


def _largest(differences: NDArray[np.float64]) -> float:
    return float(np.abs(differences).max()) if differences.size else 0.0
