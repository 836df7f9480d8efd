"""The hand-written passes compute what the model computes by itself: loss, every gradient, scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from finllm import models, scoring
from finllm.errors import RunError
from finllm.fast import passes, streams, weights
from finllm.fast.engine import Engine
from finllm.fast.support import unsupported
from finllm.recipe import Model
from finllm.shared_prefix import IGNORED
from finllm.training.batches import Row, pad

# Checkpointing has new names in Transformers 5.23; PEFT 0.21.2 and Transformers 5.17 know only the old ones.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

WITHIN = {torch.float32: 5e-6, torch.float64: 5e-7}  # Transformers' RMSNorm rounds to fp32 inside, even in fp64
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "llama 3.1's rotation": lambda: hf.LlamaConfig(
        **SIZES, rope_parameters={**LLAMA3, "original_max_position_embeddings": 16}
    ),
    "mistral": lambda: hf.MistralConfig(**SIZES, sliding_window=4096),
    "tied embeddings": lambda: hf.LlamaConfig(**SIZES, tie_word_embeddings=True),
}


def model(config: str = "llama", kind: torch.dtype = torch.float32, targets: Any = "all-linear", **lora: Any) -> Any:
    """A model as in the middle of training: LoRA's second factors are not 0, or the first would have no gradient."""
    hf.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    plain = hf.AutoModelForCausalLM.from_config(CONFIGS[config]()).to(kind)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": targets, "task_type": "CAUSAL_LM", **lora}
    made = get_peft_model(plain, LoraConfig(**settings))
    for name, parameter in made.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.to(kind)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return made.train()


def rows(count: int, shared: int = 9) -> list[Row]:
    """Rows of 12 to 24 prompt tokens with the first in common, and answers of one to three tokens."""
    draw = torch.Generator().manual_seed(1)

    def some(length: int) -> list[int]:
        return torch.randint(3, 96, (length,), generator=draw).tolist()

    common = some(shared)
    return [Row(i, [*common, 3 + i, *some(2 + 4 * i % 13)], [*some(1 + i % 3), 2]) for i in range(count)]


def expected(made: Any, examples: list[Row], share: float) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of separate padded rows, by autograd."""
    batch = pad(examples)
    made.zero_grad(set_to_none=True)
    logits = made(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = batch["labels"][:, 1:].flatten()
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum") * share
    loss.backward()
    return loss.item(), taken(made)


def taken(made: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    made.zero_grad(set_to_none=True)
    return found


def found(
    made: Any, examples: list[Row], share: float, *, recompute: bool = False, **sizes: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the hand-written passes."""
    decoder = weights.Decoder(made)
    decoder.refresh()
    stream = packed(examples, **sizes)
    loss = passes.loss_and_gradients(decoder, stream, torch.tensor(share), recompute=recompute)
    decoder.give_gradients()
    return loss.item(), taken(made)


def packed(examples: list[Row], **sizes: Any) -> streams.Stream:
    return streams.pack([row.prompt for row in examples], [row.answer for row in examples], shared=9, **sizes)


def worst(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest relative error of any tensor."""
    assert one.keys() == other.keys()
    assert other
    return max(float((one[name] - value).norm() / value.norm()) for name, value in other.items())


@pytest.mark.parametrize("kind", WITHIN, ids=["fp32", "fp64"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "computed again"])
def test_loss_and_every_gradient_are_those_of_padded_rows(config: str, kind: torch.dtype, recompute: bool) -> None:
    """Over several answer lengths, with padding at the stream's end."""
    made, examples = model(config, kind), rows(5)
    loss, gradients = expected(made, examples, 0.125)
    own_loss, own = found(made, examples, 0.125, recompute=recompute, multiple=16)
    assert own_loss == pytest.approx(loss, rel=WITHIN[kind])
    assert worst(own, gradients) < WITHIN[kind]


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj"], ["down_proj", "up_proj"]], ids=" ".join)
def test_adapters_may_stand_on_some_layers_only(targets: list[str]) -> None:
    made, examples = model(targets=targets), rows(4)
    loss, gradients = expected(made, examples, 1.0)
    own_loss, own = found(made, examples, 1.0)
    assert own_loss == pytest.approx(loss, rel=1e-6)
    assert worst(own, gradients) < WITHIN[torch.float32]


def test_adapters_of_different_scales_are_each_scaled_as_they_should() -> None:
    made, examples = model(rank_pattern={"q_proj": 2, "up_proj": 5}, alpha_pattern={"q_proj": 9}), rows(4)
    _, gradients = expected(made, examples, 1.0)
    assert worst(found(made, examples, 1.0)[1], gradients) < WITHIN[torch.float32]


def test_a_wrong_mask_is_noticed() -> None:
    """Rows that see each other have other gradients: the comparison can fail."""
    made, examples = model(), rows(5)
    _, gradients = expected(made, examples, 1.0)
    decoder = weights.Decoder(made)
    decoder.refresh()
    stream = packed(examples)
    stream.segments[9:] = 1
    passes.loss_and_gradients(decoder, stream, torch.tensor(1.0), recompute=False)
    decoder.give_gradients()
    assert worst(taken(made), gradients) > 0.01


def test_the_model_itself_computes_the_same_after_its_weights_are_stacked() -> None:
    made, examples = model(), rows(3)
    before = expected(made, examples, 1.0)
    weights.Decoder(made)
    after = expected(made, examples, 1.0)
    assert after[0] == pytest.approx(before[0], rel=1e-6)
    assert worst(after[1], before[1]) < WITHIN[torch.float32]


def test_a_second_decoder_takes_no_more_memory() -> None:
    """It finds the matrices that the first has made, and not those of an adapter of another width."""
    made = model()
    first, second = weights.Decoder(made), weights.Decoder(made)
    for one, other in zip(first.stacks, second.stacks, strict=True):
        assert one.matrix is not None
        assert other.matrix is not None
        assert other.matrix.data_ptr() == one.matrix.data_ptr()
        assert other.matrix.shape == one.matrix.shape
    plain = made.unload()
    for one, other in zip(first.stacks, weights.Decoder(plain.requires_grad_(False)).stacks, strict=True):
        assert one.matrix is not None
        assert other.matrix is not None
        assert other.matrix.data_ptr() != one.matrix.data_ptr()
        assert torch.equal(other.matrix, one.matrix[:, : one.inputs])


def test_gradients_of_several_passes_add_up() -> None:
    made, examples = model(), rows(6)
    _, gradients = expected(made, examples, 1.0)
    decoder = weights.Decoder(made)
    decoder.refresh()
    for part in (examples[:2], examples[2:]):
        passes.loss_and_gradients(decoder, packed(part), torch.tensor(1.0), recompute=False)
        decoder.give_gradients()
    assert worst(taken(made), gradients) < WITHIN[torch.float32]


def test_factors_that_were_loaded_into_other_memory_are_taken_back() -> None:
    made, examples = model(), rows(4)
    decoder = weights.Decoder(made)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone() * 1.5
    _, gradients = expected(made, examples, 1.0)
    decoder.keep_adopted()
    decoder.refresh()
    passes.loss_and_gradients(decoder, packed(examples), torch.tensor(1.0), recompute=False)
    decoder.give_gradients()
    assert worst(taken(made), gradients) < WITHIN[torch.float32]


@pytest.mark.parametrize("adapted", [True, False], ids=["adapter on", "adapter off"])
def test_log_probabilities_are_those_of_plain_forward_passes(adapted: bool) -> None:
    made, examples = model().eval(), rows(5)
    decoder = weights.Decoder(made)
    decoder.refresh()
    stream = streams.pack([r.prompt for r in examples], [[0]] * 5, shared=9, multiple=16)
    with torch.inference_mode():
        scores = passes.log_probabilities(decoder, stream, torch.tensor([5, 7, 90]), adapted=adapted)
        for score, row in zip(scores, examples, strict=True):
            ids = torch.tensor([row.prompt])
            if adapted:
                logits = made(ids).logits[0, -1]
            else:
                with made.disable_adapter():
                    logits = made(ids).logits[0, -1]
            assert torch.allclose(score, logits.log_softmax(-1)[[5, 7, 90]], atol=1e-5)


def divided() -> Any:
    """As ZeRO-3 marks weights of which each process has a part."""
    made = model()
    made.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.ds_id = 7
    return made


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (divided, "the processes share out its weights"),
        (lambda: model(lora_dropout=0.1), "dropout"),
        (lambda: model(use_dora=True), "DoRA"),
        (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)), "models of type qwen2"),
        (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)), "weights other than LoRA factors"),
        (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, attention_bias=True)).requires_grad_(False), "biases"),
    ],
    ids=["divided", "dropout", "DoRA", "another architecture", "full fine-tuning", "biases"],
)
def test_what_the_passes_cannot_compute_is_refused(made: Any, said: str) -> None:
    with pytest.raises(RunError, match=said):
        weights.Decoder(made())


def test_scores_do_not_depend_on_the_size_of_a_batch() -> None:
    made, prompts = model().eval(), [row.prompt for row in rows(7)]
    engine = Engine(made)
    whole = engine.log_probabilities(prompts, [(5,), (7,)], batch_tokens=10_000)
    parts = engine.log_probabilities(prompts, [(5,), (7,)], batch_tokens=40)
    assert whole.shape == (7, 2)
    assert abs(whole - parts).max() < 1e-5


def test_a_base_without_an_adapter_is_scored_by_hand_too(tiny_model: Path) -> None:
    """Nothing of what is loaded is trained until `trainable` says so; else zero-shot scoring would be the slow one."""
    base = models.load(Model(name=str(tiny_model)), dtype="fp32", device="cpu").model
    assert unsupported(base) is None
    prompts, answers = [[*range(9), 20], [*range(9), 30, 31], [*range(9), 40, 41, 42]], [(5,), (6,), (7,)]
    own = scoring.score(base, prompts, answers, batch_tokens=1000)
    found = Engine(base).log_probabilities(prompts, answers, batch_tokens=1000)
    np.testing.assert_allclose(found, own, rtol=0, atol=1e-5)
    assert unsupported(models.trainable(base, None, 0)) == "weights other than LoRA factors are trained"
