"""The checks of an evaluation hold where they should, and fail where something is wrong."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import AutoTokenizer

from finllm import predictions, selfchecks
from finllm.example import LABELS, Example
from finllm.predictions import Answers
from finllm.prompts import Prompter
from finllm.recipe import Prompt

PROMPTS = [[n, n + 1] for n in range(100)]
TOGETHER = np.random.default_rng(0).normal(size=(100, 3))


def scored(prompts: Sequence[list[int]]) -> NDArray[np.float64]:
    return TOGETHER[[prompt[0] for prompt in prompts]]


def test_figures_that_depend_on_the_batch_are_seen() -> None:
    """32 texts spread over all; a shift of one of them by 0.01 nats fails in fp32, and passes as rounding in bf16."""
    assert selfchecks.batch_invariance(scored, PROMPTS, TOGETHER, "fp32").passed
    shifted = TOGETHER.copy()
    shifted[99] += 0.01
    found = selfchecks.batch_invariance(scored, PROMPTS, shifted, "fp32")
    assert not found.passed
    assert "32 texts one at a time: at most 1.0e-02 nats" in found.found
    assert selfchecks.batch_invariance(scored, PROMPTS, shifted, "bf16").passed


def test_an_adapter_that_stays_on_is_seen() -> None:
    """The base's figures must come back."""
    assert selfchecks.adapter_off(scored, PROMPTS, TOGETHER, "fp32").passed
    assert not selfchecks.adapter_off(lambda p: scored(p) + 0.5, PROMPTS, TOGETHER, "bf16").passed


@pytest.fixture(scope="module")
def prompter(tiny_model: Path) -> Prompter:
    return Prompter(AutoTokenizer.from_pretrained(tiny_model), Prompt())


def texts(count: int) -> list[Example]:
    return [Example(f"x:{n}", "x", f"Sales rose by {n} %.", LABELS[n % 3], "train") for n in range(count)]


def test_prompts_of_training_and_of_the_saved_model_are_compared(prompter: Prompter, tiny_model: Path) -> None:
    """Another instruction in the saved card is seen, and so is a blank more."""
    same = Prompter(AutoTokenizer.from_pretrained(tiny_model), Prompt())
    assert all(check.passed for check in selfchecks.prompts_agree(texts(40), prompter, same))
    other = Prompter(same.tokenizer, Prompt(instruction=Prompt().instruction + " "))
    bytes_, labels = selfchecks.prompts_agree(texts(40), prompter, other)
    assert not bytes_.passed
    assert "32 differ" in bytes_.found
    assert labels.passed


def test_labels_that_would_be_cut_are_seen(prompter: Prompter) -> None:
    """A saved model whose end token is another does not answer as it was trained to."""
    saved = Prompter(prompter.tokenizer, Prompt())
    saved.end += 1
    assert not selfchecks.prompts_agree(texts(5), prompter, saved)[1].passed


def answers(cut: int, mark: str = "") -> Answers:
    rows = texts(200)
    made = predictions.of(rows, np.full((200, 3), 1 / 3), [n < cut for n in range(200)])
    return Answers("tuned", "tuned", 1.0, made, marks=(mark,) if mark else ())


def test_truncation_and_contamination_are_told() -> None:
    """One text in a hundred may be cut; a system that has seen the texts fails its check."""
    assert selfchecks.truncation([answers(2)]).passed
    assert not selfchecks.truncation([answers(3)]).passed
    assert "tuned 3 (1.5%)" in selfchecks.truncation([answers(3)]).found
    assert selfchecks.contamination([answers(0, "what it was trained on is not known")]).passed
    assert not selfchecks.contamination([answers(0, "has seen phrasebank: all of it")]).passed
    assert "3 rows left out" in selfchecks.leaks(10, ["3 rows left out"]).found
