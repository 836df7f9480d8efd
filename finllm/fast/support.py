"""What the hand-written passes know: which models, weights and adapters."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

MODELS = frozenset({"llama", "mistral"})
ROTATIONS = frozenset({"default", "linear", "llama3"})
HEAD_SIZES = frozenset({32, 64, 128})


def unsupported(model: Any) -> str | None:
    """Why the passes cannot compute what this model computes, or None."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    if config.model_type not in MODELS:
        return f"models of type {config.model_type} have other layers than {' and '.join(sorted(MODELS))}"
    if config.hidden_act != "silu" or getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "the model's layers have biases, or another activation than silu"
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotation not in ROTATIONS:
        return f"the model's rotary embedding is {rotation}; known are {', '.join(sorted(ROTATIONS))}"
    for layer in base.model.layers:
        for linear in _linears(layer):
            if why := _unsupported_linear(linear):
                return why
    if why := _unsupported_device(base.lm_head.weight, config):
        return why
    names = {id(p) for layer in base.model.layers for m in layer.modules() for p in _lora_parameters(m)}
    if any(p.requires_grad and id(p) not in names for p in base.parameters()):
        return "weights other than LoRA factors are trained"
    return None


def _unsupported_device(head: Tensor, config: Any) -> str | None:
    if head.device.type == "cpu":
        return None
    if head.device.type != "cuda" or torch.cuda.get_device_capability(head.device) < (8, 0):
        return "the kernels need an NVIDIA GPU of compute capability 8.0 or more"
    if head.dtype != torch.bfloat16:
        return f"the kernels compute in bf16, not {head.dtype}"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size not in HEAD_SIZES:
        return f"the kernels know heads of {', '.join(map(str, sorted(HEAD_SIZES)))}, not {size}"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def _unsupported_linear(linear: Any) -> str | None:
    base = getattr(linear, "base_layer", linear)
    kind = type(base).__name__
    if isinstance(base.weight, DTensor) or hasattr(base.weight, "ds_id"):
        return "the processes share out its weights"
    if kind not in {"Linear", "Linear4bit"}:
        return f"weights held as {kind}"
    if kind == "Linear4bit" and (base.weight.quant_state.quant_type != "nf4" or base.weight.device.type != "cuda"):
        return f"4-bit weights of type {base.weight.quant_state.quant_type} on {base.weight.device.type}"
    if base is linear:
        return None
    if list(linear.lora_A) != ["default"] or linear.active_adapters != ["default"] or linear.merged:
        return "not one LoRA adapter, active and not merged"
    if any(linear.use_dora.values()) or type(linear.lora_dropout["default"]).__name__ != "Identity":
        return "LoRA with dropout or DoRA"
    if linear.lora_A["default"].bias is not None or linear.lora_B["default"].bias is not None:
        return "LoRA with biases"
    return None


def _lora_parameters(module: Any) -> Iterator[Any]:
    if hasattr(module, "lora_A"):
        yield from (*module.lora_A.parameters(), *module.lora_B.parameters())


def _linears(layer: Any) -> tuple[Any, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        mlp.gate_proj, mlp.up_proj, mlp.down_proj,
    )  # fmt: skip
