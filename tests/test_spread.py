"""Scoring that several processes share: the same passes, whoever makes them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finllm import models, scoring, spread
from finllm.fast.engine import Engine
from finllm.recipe import Model
from finllm.turns import Turns


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


def test_few_prompts_make_no_tiny_passes_and_many_make_enough() -> None:
    assert spread.pass_tokens([]) == spread.pass_tokens([[1, 2, 3]] * 5) == spread.FEWEST_TOKENS
    many = [[1, 2, *range(row, row + 50)] for row in range(2000)]
    assert spread.pass_tokens(many) == 2000 * 50 // spread.PASSES
