"""Scoring that several processes share: the same passes, whoever makes them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finllm import models, scoring, spread
from finllm.fast import bushes
from finllm.fast.engine import Engine
from finllm.recipe import Model
from finllm.turns import FEWEST_TOKENS, Turns


@pytest.mark.parametrize(("passes", "processes"), [(7, 1), (7, 2), (8, 4), (2, 3), (0, 2)])
def test_passes_are_dealt_once_and_whoever_needs_the_others_makes_as_many(passes: int, processes: int) -> None:
    every = [[number] for number in range(passes)]
    for in_step in (False, True):
        dealt_to = [list(Turns(rank, processes, in_step).of(every)) for rank in range(processes)]
        assert sorted(turn.own[0] for turns in dealt_to for turn in turns if turn.counts) == list(range(passes))
        assert [one for turn in dealt_to[0] for one in turn.all] == every
        if in_step:
            assert {len(turns) for turns in dealt_to} == {-(-passes // processes)}
        else:
            assert all(turn.counts for turns in dealt_to for turn in turns)


@pytest.mark.parametrize("by", ["the model", "hand", "a token after the other"])
def test_scores_are_the_same_to_the_bit_however_many_share_them(tiny_model: Path, by: str) -> None:
    model = models.load(Model(name=str(tiny_model)), dtype="fp32", device="cpu").model
    rng = np.random.default_rng(5)
    prompts = [[7, 7, 7, *rng.integers(9, 90, size=rng.integers(1, 40)).tolist()] for _ in range(23)]
    if by == "a token after the other":
        model.config.sliding_window = 10
    how: dict[str, Any] = {"engine": Engine(model) if by == "hand" else None, "batch_tokens": 96}
    answers = [(5,), (6, 8), (7, 3, 4)]
    whole = scoring.score(model, prompts, answers, **how)
    for processes in (2, 5, 40):
        turns = [Turns(rank, processes) for rank in range(processes)]
        parts = [scoring.score(model, prompts, answers, turns=one, **how) for one in turns]
        assert np.array_equal(sum(parts), whole)
        assert all(((part != 0).any(axis=1)).sum() < len(prompts) for part in parts)


@pytest.mark.parametrize("count", [3, 40, 500, 1451, 4329, 9000])
def test_passes_are_a_number_that_processes_can_share_evenly(count: int) -> None:
    rng = np.random.default_rng(1)
    prompts = [[*range(26), *rng.integers(30, 900, size=rng.integers(8, 90)).tolist()] for _ in range(count)]
    grown = bushes.grow(prompts, bushes.answers_of([(5,), (6,), (7,)]), shared=26)
    tokens = sum(bush.tokens for bush in grown)
    passes = bushes.batches_of(grown, Turns(multiple=8).count(tokens, 8000))
    assert [bush for one in passes for bush in one] == grown
    sizes = [sum(bush.tokens for bush in one) for one in passes]
    assert max(sizes) < 8000 + 300
    if tokens > 8 * FEWEST_TOKENS:
        assert len(passes) % 8 == 0
        assert max(sizes) < 1.2 * min(sizes)
    else:
        assert len(passes) == max(1, tokens // FEWEST_TOKENS)


def test_a_pass_holds_what_may_be_held_and_at_least_one_prompt() -> None:
    prompts = [[1, 2, *range(row, row + 30)] for row in range(10, 40)]
    grown = bushes.grow(prompts, bushes.answers_of([(5,), (6, 7)]), shared=2)
    for most in (1, 31, 100, 400, 10_000):
        sizes = [sum(b.tokens for b in one) for one in bushes.batches_of(grown, Turns().count(30 * 31, most - 31))]
        assert max(sizes) <= max(most, 31)
        assert sum(sizes) == 30 * 31


def test_passes_of_padded_rows_come_to_the_same_number(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So does a model that is not scored by hand, on a GPU with room for all rows at once."""
    monkeypatch.setattr(scoring, "MOST_ON_CPU", 10**9)
    model = models.load(Model(name=str(tiny_model)), dtype="fp32", device="cpu").model
    made: list[int] = []
    real = scoring._score_batch

    def counted(model: Any, prefix: Any, prompts: Any, *rest: Any) -> Any:
        made.append(len(prompts))
        return real(model, prefix, prompts, *rest)

    monkeypatch.setattr(scoring, "_score_batch", counted)
    prompts = [[7, 8, 9, *range(row % 50, row % 50 + 60)] for row in range(300)]
    spread.score(model, prompts, [(5,), (6,)], batch_tokens=10**9)
    assert len(made) in {8, 9}
    assert sum(made) == 300
