"""The last layer on the places that are read: the same values and gradients there, for less work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from finllm import last_layer

# Checkpointing has new names in Transformers 5.23; PEFT 0.21.2 and Transformers 5.17 know only the old ones.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "mistral": lambda: hf.MistralConfig(**SIZES, sliding_window=4),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "gemma3": lambda: hf.Gemma3TextConfig(**SIZES, layer_types=["sliding_attention", "full_attention"]),
}
PLACES = torch.tensor([3, 8, 17])  # of 2 rows of 9 tokens: the first's fourth and last, the second's last


def model(name: str) -> Any:
    torch.manual_seed(0)
    made = hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).double()
    made = get_peft_model(made, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter_name, parameter in made.named_parameters():
        parameter.data = parameter.data.double()
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    return made.train()


def read(made: Any, seen: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states at the places, and the gradients of all adapters."""
    ids = torch.arange(18).view(2, 9) + 5
    made.zero_grad(set_to_none=True)
    with last_layer.only(made, seen):
        hidden = made.get_base_model().get_decoder()(ids, use_cache=False).last_hidden_state.flatten(0, 1)[PLACES]
    hidden.square().sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_at_the_places_stay(name: str) -> None:
    """In fp64, with LoRA on all linear layers; keys and values of the other places still count."""
    made = model(name)
    expected, slopes = read(made, torch.tensor([], dtype=torch.long))
    found, own = read(made, PLACES)
    torch.testing.assert_close(found, expected)
    assert own.keys() == slopes.keys()
    for parameter, slope in slopes.items():
        torch.testing.assert_close(own[parameter], slope, rtol=1e-7, atol=1e-9)


def test_reading_other_places_would_show() -> None:
    """The comparison above can fail: a place that was left out has another value."""
    made = model("llama")
    expected, _ = read(made, torch.tensor([], dtype=torch.long))
    found, _ = read(made, PLACES[:2])
    torch.testing.assert_close(found[:2], expected[:2])
    assert (found[2] - expected[2]).abs().max() > 0.01


def test_the_last_feed_forward_sees_the_places_only_while_asked() -> None:
    """3 of 18 places, in the last layer only; afterwards all of them again."""
    made = model("llama")
    layers = made.get_base_model().model.layers
    seen: list[tuple[int, ...]] = []
    for layer in layers:
        layer.mlp.gate_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(tuple(inputs[0].shape)))
    read(made, PLACES)
    read(made, torch.tensor([], dtype=torch.long))
    assert seen == [(2, 9, 32), (1, 3, 32), (2, 9, 32), (2, 9, 32)]


def test_a_layer_that_is_computed_again_is_left_alone() -> None:
    """Gradient checkpointing calls the layer in the backward pass, when the places are no longer known."""
    made = model("llama")
    expected, slopes = read(made, torch.tensor([], dtype=torch.long))
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made.enable_input_require_grads()
    found, own = read(made, PLACES)
    torch.testing.assert_close(found, expected)
    for parameter, slope in slopes.items():
        torch.testing.assert_close(own[parameter], slope)
