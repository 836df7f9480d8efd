"""Prompts that begin alike and answers that do are computed once, and score as each by itself."""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model

from finllm.errors import RunError
from finllm.fast import bushes, passes
from finllm.fast.engine import Engine
from finllm.fast.streams import WAYS
from finllm.shared_prefix import shared_length

# Checkpointing has new names in Transformers 5.23; PEFT 0.21.2 and Transformers 5.17 know only the old ones.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

INSTRUCTION = [5, 6, 7, 8, 9]
PROMPTS = [
    [*INSTRUCTION, *own]
    for own in (
        [20, 21, 22, 23], [20, 21, 30], [20, 21], [40, 41, 42], [20, 21, 30], [20, 21, 30, 31, 32], [50], [40, 44, 45],
        [60, 61, 62, 63, 64, 65, 66], [20],
    )
]  # fmt: skip
"""Some begin alike, one is the beginning of others, two are the same."""
ONE_TOKEN = [(70,), (71,), (72,)]
SEVERAL = [(70, 80), (70, 81, 82), (71,), (73, 80, 74, 75), (73, 80), (70, 81, 83, 84)]


@pytest.fixture(scope="module")
def made() -> Any:
    """Three layers of Mistral's shape with an adapter that does something."""
    torch.manual_seed(0)
    config = hf.MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2, sliding_window=None,
    )  # fmt: skip
    plain = hf.AutoModelForCausalLM.from_config(config)
    model = get_peft_model(plain, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
def one_by_one(model: Any, answers: Sequence[tuple[int, ...]]) -> NDArray[np.float64]:
    """The definition: a forward pass for each prompt and answer."""
    table = np.zeros((len(PROMPTS), len(answers)))
    for (i, prompt), (j, answer) in itertools.product(enumerate(PROMPTS), enumerate(answers)):
        log_p = model(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
        table[i, j] = sum(log_p[len(prompt) - 1 + k, token].item() for k, token in enumerate(answer))
    return table


@pytest.mark.parametrize("answers", [ONE_TOKEN, SEVERAL], ids=["labels of one token", "labels of several tokens"])
@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
@pytest.mark.parametrize("adapted", [True, False], ids=["adapter on", "adapter off"])
def test_scores_are_those_of_plain_forward_passes(
    made: Any, answers: list[tuple[int, ...]], batch_tokens: int, *, adapted: bool
) -> None:
    found = Engine(made).log_probabilities(PROMPTS, answers, batch_tokens=batch_tokens, adapted=adapted)
    if adapted:
        expected = one_by_one(made, answers)
    else:
        with made.disable_adapter():
            expected = one_by_one(made, answers)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("answers", [ONE_TOKEN, SEVERAL], ids=["labels of one token", "labels of several tokens"])
def test_ways_that_see_each_other_are_noticed(made: Any, answers: list[tuple[int, ...]]) -> None:
    """The comparison can fail: with each trunk and all that grows from it as one segment, scores are others."""
    engine, asked = Engine(made), bushes.answers_of(answers)
    engine.decoder.refresh()
    grown = bushes.grow(PROMPTS, asked, shared=len(INSTRUCTION))
    stream = bushes.pack(INSTRUCTION, grown)
    choices = torch.tensor(asked.choices)
    with torch.inference_mode():
        right = passes.log_probabilities(engine.decoder, stream, choices, adapted=True)
        stream.segments.copy_(stream.segments // WAYS * WAYS)
        wrong = passes.log_probabilities(engine.decoder, stream, choices, adapted=True)
    assert float((right - wrong).abs().max()) > 0.1


def test_labels_of_several_tokens_take_one_pass(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many passes as labels of one token, over the prompts once."""
    sizes: list[int] = []
    real = passes.log_probabilities

    def counted(decoder: Any, stream: Any, *rest: Any, **more: Any) -> torch.Tensor:
        sizes.append(stream.tokens)
        return real(decoder, stream, *rest, **more)

    monkeypatch.setattr(passes, "log_probabilities", counted)
    engine = Engine(made)
    for answers in (ONE_TOKEN, SEVERAL):
        engine.log_probabilities(PROMPTS, answers, batch_tokens=10_000)
    own = sum(len(prompt) - len(INSTRUCTION) for prompt in PROMPTS)
    branches = 3 + 3 + 0  # 70 81 83, 73 80 74; 70, 70 81 and 73 80 are their beginnings
    assert len(sizes) == 2
    assert sizes[1] <= len(INSTRUCTION) + own + branches * len(PROMPTS) + 63


def test_prompts_that_begin_alike_have_fewer_tokens() -> None:
    """And every prompt is in one bush, with as many tokens as it has."""
    grown = bushes.grow(PROMPTS, bushes.answers_of(ONE_TOKEN), shared=len(INSTRUCTION))
    own = sum(len(prompt) - len(INSTRUCTION) for prompt in PROMPTS)
    assert sorted(row for bush in grown for row in bush.rows) == list(range(len(PROMPTS)))
    assert max(len(bush.rows) for bush in grown) == bushes.MOST_TOGETHER
    assert sum(bush.tokens for bush in grown) < own - 6
    for bush in grown:
        for row, way in zip(bush.rows, bush.ways or [[]], strict=True):
            assert [*INSTRUCTION, *bush.trunk, *way] == PROMPTS[row]


def test_groups_save_as_much_as_any_groups_could() -> None:
    """Against all ways to cut short lists."""
    drawn = random.Random(3)
    for _ in range(40):
        alike = [drawn.randrange(5) for _ in range(drawn.randrange(7))]
        cuts = [
            cut
            for cut in itertools.product(range(1, bushes.MOST_TOGETHER + 1), repeat=len(alike) + 1)
            for cut in [tuple(itertools.takewhile(lambda size: size, cut))]
        ]
        best = max(_saved(alike, cut[:count]) for cut in cuts for count in range(1, len(cut) + 1))
        assert _saved(alike, bushes._sizes(alike)) == best


def _saved(alike: list[int], sizes: Sequence[int]) -> int:
    """Tokens that are not computed again; -1 where the sizes are not those of all prompts."""
    if sum(sizes) != len(alike) + 1:
        return -1
    first, saved = 0, 0
    for size in sizes:
        saved += (size - 1) * min(alike[first : first + size - 1], default=0)
        first += size
    return saved


def test_prompts_that_share_nothing_are_scored_too(made: Any) -> None:
    prompts = [[9, 8], [5, 6, 7], [7], [5, 6, 8]]
    assert shared_length(prompts) == 0
    found = Engine(made).log_probabilities(prompts, SEVERAL, batch_tokens=100)
    for prompt, row in zip(prompts, found, strict=True):
        alone = Engine(made).log_probabilities([prompt], SEVERAL, batch_tokens=100)
        np.testing.assert_allclose(row, alone[0], rtol=0, atol=1e-5)


def test_more_answers_than_a_stream_can_tell_apart_are_refused() -> None:
    many = [(number, 1) for number in range(WAYS)]
    assert len(bushes.answers_of(many[:-1]).ways) == WAYS - 1
    with pytest.raises(RunError, match="4096 answers that begin differently; at most 4095"):
        bushes.answers_of(many)


def test_logits_are_held_for_some_places_at_a_time(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Engine(made).log_probabilities(PROMPTS, SEVERAL, batch_tokens=10_000)
    monkeypatch.setattr(passes, "MOST_READ", 7)
    parts = Engine(made).log_probabilities(PROMPTS, SEVERAL, batch_tokens=10_000)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)
