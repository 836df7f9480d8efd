"""Pairs on a GPU: the kernels keep the two answers apart, to the rounding of bf16; whole steps learn."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from finllm.fast.engine import Engine
from finllm.fast.pairs import Pairs
from finllm.fast.streams import WAYS
from finllm.shared_prefix import attending, shared_length
from finllm.training import pairs
from finllm.training.dpo import Dpo, log_probabilities
from finllm.training.pairs import PairRow
from finllm.training.preferring import Loss, judge

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")]


def model(kind: torch.dtype) -> Any:
    """Three layers, 1,024 wide, on the GPU, with second LoRA factors that are not 0."""
    torch.manual_seed(0)
    config = hf.MistralConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=2816, num_hidden_layers=3, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, attn_implementation="sdpa",
    )  # fmt: skip
    plain = hf.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    made = get_peft_model(plain, LoraConfig(r=12, lora_alpha=24, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
        elif "lora_A" not in name:
            parameter.data = parameter.data.bfloat16().to(kind)  # both models hold the same values
    return made.cuda().train()


def rows(count: int, longest: int) -> list[PairRow]:
    draw = torch.Generator().manual_seed(2)

    def some(length: int) -> list[int]:
        return torch.randint(3, 4096, (length,), generator=draw).tolist()

    common = some(30)
    return [
        PairRow(i, [*common, 3 + i, *some(4 + 29 * i % 90)], [5 + i, *some(i % longest), 2],
                [90 + i, *some((i + 1) % longest), 2], reference=(-9.0 - i % 3, -8.0))
        for i in range(count)
    ]  # fmt: skip


def gradients(made: Any) -> torch.Tensor:
    found = torch.cat([p.grad.float().flatten() for p in made.parameters() if p.grad is not None])
    made.zero_grad(set_to_none=True)
    return found


def plain(made: Any, given: list[PairRow], *, streams: bool) -> tuple[float, torch.Tensor]:
    """Loss and gradients by autograd, on a stream or on single rows, in bf16 where the weights are."""
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=made.dtype == torch.bfloat16):
        if streams:
            batch = moved(pairs.stream(given, multiple=64))
            with attending(made):
                log_p = log_probabilities(made, batch)
        else:
            both = [(row.prompt, row.chosen) for row in given] + [(row.prompt, row.rejected) for row in given]
            log_p = torch.stack([of_row(made, prompt, answer) for prompt, answer in both])
    loss = judge(Loss(beta=0.3, sft_weight=0.5), log_p, pairs.figures(given).cuda(), (len(given), 4 * len(given))).loss
    loss.backward()
    return loss.item(), gradients(made)


def of_row(made: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logits = made(torch.tensor([[*prompt, *answer]], device="cuda"), use_cache=False).logits[0].float()
    places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1, device="cuda")
    chosen = torch.tensor(answer, device="cuda")[:, None]
    total: torch.Tensor = logits[places].log_softmax(-1).gather(1, chosen).sum()
    return total


def moved(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: moved(inner) for name, inner in value.items()}
    return value.cuda() if isinstance(value, torch.Tensor) else value


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("longest", [1, 40], ids=["labels", "sentences"])
def test_gradients_are_as_near_to_fp32_as_the_models_own(longest: int, *, recompute: bool) -> None:
    """Answers within one block of keys, and over several."""
    torch.backends.cuda.matmul.allow_tf32 = False
    given = rows(11, longest)
    loss, exact = plain(model(torch.float32), given, streams=False)
    made = model(torch.bfloat16)
    _, own = plain(made, given, streams=False)
    _, streamed = plain(made, given, streams=True)
    assert error(streamed, exact) < max(1.2 * error(own, exact), 5e-3)
    engine = Engine(made, recompute=recompute)
    packed = Dpo.packed(given, shared=shared_length([row.prompt for row in given]), device="cuda")
    found, by_hand = handwritten(engine, made, packed["stream"], packed["figures"])
    assert found == pytest.approx(loss, rel=2e-2)
    assert error(by_hand, exact) < max(1.2 * error(own, exact), 5e-3)


def handwritten(engine: Engine, made: Any, stream: Pairs, figures: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Loss and gradients of the hand-written passes over eleven pairs."""

    def objective(log_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            leaf = log_p.detach().requires_grad_()
            judged = judge(Loss(beta=0.3, sft_weight=0.5), leaf, figures.cuda(), (11, 44))
            (into,) = torch.autograd.grad(judged.loss, leaf)
        return judged.loss.detach(), into

    return engine.preference_gradients(stream, objective).item(), gradients(made)


def test_a_rejected_answer_that_sees_the_chosen_one_is_noticed() -> None:
    """The comparison can fail: with prompt and both answers as one segment."""
    torch.backends.cuda.matmul.allow_tf32 = False
    given, made = rows(11, 40), model(torch.bfloat16)
    _, exact = plain(model(torch.float32), given, streams=False)
    packed = Dpo.packed(given, shared=shared_length([row.prompt for row in given]), device="cuda")
    stream, engine = packed["stream"], Engine(made)
    _, right = handwritten(engine, made, stream, packed["figures"])
    numbers, tokens = stream.stream.numbers.clone(), stream.stream.tokens
    numbers[2 * tokens : 3 * tokens] = numbers[2 * tokens : 3 * tokens] // WAYS * WAYS
    _, wrong = handwritten(
        engine, made, replace(stream, stream=replace(stream.stream, numbers=numbers)), packed["figures"]
    )
    assert error(wrong, exact) > 3 * error(right, exact)
