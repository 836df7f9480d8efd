"""Label scores: equal to one plain forward pass for each label, at every batch size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from finllm import scoring

ONE_TOKEN = [(40,), (41,), (42,)]
SEVERAL = [(40, 50), (40, 51, 52), (41,), (43, 50, 44, 45)]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> torch.nn.Module:
    loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(tiny_model)
    return loaded.eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Prompts of 12 shared tokens and 1 to 40 of their own."""
    drawn = np.random.default_rng(0)
    return [[*range(5, 17), *drawn.integers(3, 500, size=n).tolist()] for n in (1, 7, 7, 40, 3, 22, 13, 1)]


@torch.no_grad()
def one_by_one(model: torch.nn.Module, prompts: list[list[int]], answers: list[tuple[int, ...]]) -> NDArray[np.float64]:
    """The definition: a forward pass for each prompt and answer, the log-probabilities of its tokens added."""
    table = np.zeros((len(prompts), len(answers)))
    for i, prompt in enumerate(prompts):
        for j, answer in enumerate(answers):
            log_p = torch.log_softmax(model(torch.tensor([[*prompt, *answer]])).logits[0].double(), dim=-1)
            table[i, j] = sum(log_p[len(prompt) - 1 + k, token].item() for k, token in enumerate(answer))
    return table


@pytest.mark.parametrize("answers", [ONE_TOKEN, SEVERAL], ids=["labels of one token", "labels of several tokens"])
@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_scores_equal_plain_forward_passes(
    model: torch.nn.Module, prompts: list[list[int]], answers: list[tuple[int, ...]], batch_tokens: int
) -> None:
    """Sharing the prefix, padding, sorting and the tree of labels change nothing, at any batch size."""
    scores = scoring.score(model, prompts, answers, batch_tokens=batch_tokens)
    np.testing.assert_allclose(scores, one_by_one(model, prompts, answers), atol=1e-5)


def test_a_first_token_alone_would_give_other_scores(model: torch.nn.Module, prompts: list[list[int]]) -> None:
    """Negative control: the comparison above can tell whole labels from their first tokens."""
    whole = scoring.score(model, prompts, SEVERAL, batch_tokens=512)
    first = scoring.score(model, prompts, [answer[:1] for answer in SEVERAL[1:]], batch_tokens=512)
    assert np.abs(whole[:, [1, 3]] - first[:, [0, 2]]).min() > 0.1


def test_prompts_that_share_nothing_are_scored_too(model: torch.nn.Module) -> None:
    """Without a common beginning every prompt is computed whole."""
    prompts = [[5, 6, 7], [9, 8], [7]]
    scores = scoring.score(model, prompts, SEVERAL, batch_tokens=512)
    np.testing.assert_allclose(scores, one_by_one(model, prompts, SEVERAL), atol=1e-5)


@pytest.mark.parametrize("answers", [ONE_TOKEN, SEVERAL], ids=["labels of one token", "labels of several tokens"])
def test_a_sliding_window_shorter_than_the_prompt_is_kept(
    prompts: list[list[int]], answers: list[tuple[int, ...]]
) -> None:
    """Mistral-7B-v0.1 looks back only so far; a shared prefix must not let it see further."""
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=600,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
    )
    model = MistralForCausalLM(config).eval()
    scores = scoring.score(model, prompts, answers, batch_tokens=512)
    np.testing.assert_allclose(scores, one_by_one(model, prompts, answers), atol=1e-5)
    model.config.sliding_window = None
    assert np.abs(one_by_one(model, prompts, answers) - scores).max() > 1e-3  # the window matters here


def test_no_prompts_give_no_scores(model: torch.nn.Module) -> None:
    """An empty list is an empty table."""
    assert scoring.score(model, [], ONE_TOKEN, batch_tokens=512).shape == (0, 3)


def test_probabilities_are_those_of_the_labels_alone() -> None:
    """Rows sum to 1, also where the log-probabilities are far below zero."""
    rows = scoring.probabilities(np.array([[-1000.0, -1001.0, -1002.0], [0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(rows.sum(axis=1), 1.0)
    np.testing.assert_allclose(rows[0], np.exp([0.0, -1.0, -2.0]) / np.exp([0.0, -1.0, -2.0]).sum())
