"""The kernels on a GPU: their errors are those of bf16, and 4-bit weights are read bit by bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from finllm.fast import bushes, passes, streams
from finllm.fast.engine import Engine
from finllm.fast.streams import WAYS
from finllm.shared_prefix import IGNORED, shared_length
from finllm.training.batches import Row, pad

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")]


def model(kind: torch.dtype, heads: int = 16, key_heads: int = 4, head_size: int = 64) -> Any:
    """Three layers, 1,024 wide, on the GPU, with second LoRA factors that are not 0."""
    torch.manual_seed(0)
    config = hf.MistralConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=2816, num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=key_heads, head_dim=head_size, attn_implementation="sdpa",
    )  # fmt: skip
    plain = hf.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    settings = LoraConfig(r=12, lora_alpha=24, target_modules="all-linear", task_type="CAUSAL_LM")
    made = get_peft_model(plain, settings)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
        elif "lora_A" not in name:
            parameter.data = parameter.data.bfloat16().to(kind)  # both models hold the same values
    return made.cuda().train()


def rows(count: int, shared: int) -> list[Row]:
    draw = torch.Generator().manual_seed(2)

    def some(length: int) -> list[int]:
        return torch.randint(3, 4096, (length,), generator=draw).tolist()

    common = some(shared)
    return [Row(i, [*common, 3 + i, *some(4 + 29 * i % 150)], [5 + i % 3, 2]) for i in range(count)]


def gradients(made: Any) -> torch.Tensor:
    found = torch.cat([p.grad.float().flatten() for p in made.parameters() if p.grad is not None])
    made.zero_grad(set_to_none=True)
    return found


def plain(made: Any, examples: list[Row]) -> tuple[float, torch.Tensor]:
    """Loss and gradients of padded rows by autograd, in bf16 where the weights are."""
    batch = pad(examples)
    targets = batch["labels"][:, 1:].flatten().cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=made.dtype == torch.bfloat16):
        ids, mask = batch["input_ids"].cuda(), batch["attention_mask"].cuda()
        logits = made(input_ids=ids, attention_mask=mask, use_cache=False).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum") / 16
    loss.backward()
    return loss.item(), gradients(made)


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(
    ("heads", "key_heads", "head_size", "shared", "recompute"),
    [(16, 4, 64, 9, False), (16, 4, 64, 70, True), (8, 8, 128, 30, False), (9, 3, 64, 30, True)],
    ids=["short instruction", "long instruction, computed again", "large heads", "nine heads, computed again"],
)
def test_gradients_are_as_near_to_fp32_as_the_models_own(
    *, shared: int, heads: int, key_heads: int, head_size: int, recompute: bool
) -> None:
    """An instruction shorter and longer than a block, rows of up to 150 tokens, several shapes of attention."""
    torch.backends.cuda.matmul.allow_tf32 = False
    examples = rows(11, shared)
    loss, exact = plain(model(torch.float32, heads, key_heads, head_size), examples)
    made = model(torch.bfloat16, heads, key_heads, head_size)
    _, own = plain(made, examples)
    engine = Engine(made, recompute=recompute)
    prompts, answers = [row.prompt for row in examples], [row.answer for row in examples]
    stream = streams.pack(prompts, answers, shared=shared, multiple=64)
    found_loss = engine.loss_and_gradients(stream, 1 / 16).item()
    assert found_loss == pytest.approx(loss, rel=2e-2)
    assert error(gradients(made), exact) < max(1.2 * error(own, exact), 5e-3)


def test_nf4_weights_are_read_as_bitsandbytes_reads_them() -> None:
    import bitsandbytes as bnb

    from finllm.fast.kernels import unpack_4bit

    values = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16)
    weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4", compress_statistics=True).to("cuda")
    out = torch.zeros(300, 600, device="cuda", dtype=torch.bfloat16)
    unpack_4bit(weight, out[:, :512])
    assert torch.equal(out[:, :512], bnb.functional.dequantize_4bit(weight.data, weight.quant_state))


def test_scores_are_those_of_fp32_to_the_rounding_of_bf16() -> None:
    exact, made, prompts = model(torch.float32).eval(), model(torch.bfloat16).eval(), [r.prompt for r in rows(9, 30)]
    found = Engine(made).log_probabilities(prompts, [(5,), (6,), (7,)], batch_tokens=500)
    with torch.inference_mode():
        expected = [exact(torch.tensor([ids]).cuda()).logits[0, -1].log_softmax(-1)[5:8].cpu() for ids in prompts]
    assert abs(torch.tensor(found) - torch.stack(expected)).max() < 0.1


def test_bushes_score_as_fp32_does_to_the_rounding_of_bf16() -> None:
    """Prompts that begin alike, one and several tokens to a label; as one segment each, scores are others."""
    own = [ids[30:] for ids in (r.prompt for r in rows(6, 30))]
    prompts = [[*range(40, 70), 7, *begin, *ids] for begin in ([11] * 90, [12, 13], [12, 13, 14]) for ids in own]
    exact, made = model(torch.float32).eval(), model(torch.bfloat16).eval()
    engine = Engine(made)
    for answers in ([(5,), (6,), (7,)], [(5, 8, 9), (5, 8, 10, 11), (6,), (7, 8), (5, 12, 13), (14, 15), (16, 17)]):
        found = engine.log_probabilities(prompts, answers, batch_tokens=1500)
        with torch.inference_mode():
            expected = [[_of(exact, ids, answer) for answer in answers] for ids in prompts]
        longest = max(map(len, answers))
        assert abs(torch.tensor(found) - torch.tensor(expected)).max() < 0.1 * longest
        asked = bushes.answers_of(answers)
        shared = shared_length(prompts)
        stream = bushes.pack(prompts[0][:shared], bushes.grow(prompts, asked, shared=shared), multiple=64)
        flat = replace(stream, numbers=stream.numbers.clone())
        flat.segments.copy_(flat.segments // WAYS * WAYS)
        choices = torch.tensor(asked.choices).cuda()
        with torch.inference_mode():
            right, wrong = (
                passes.log_probabilities(
                    engine.decoder, replace(one, numbers=one.numbers.cuda()), choices, adapted=True
                )
                for one in (stream, flat)
            )
        assert float((right - wrong).abs().max()) > 0.3


def _of(exact: Any, prompt: list[int], answer: tuple[int, ...]) -> float:
    """The definition: the log-probabilities of an answer's tokens added, from one forward pass."""
    log_p = exact(torch.tensor([[*prompt, *answer]]).cuda()).logits[0].log_softmax(-1)
    return sum(float(log_p[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))
