"""What a process holds all through a run: the base model's weights, and what belongs to those that are trained."""

from dataclasses import dataclass
from typing import Literal

from finllm.recipe import APART, BY_DEEPSPEED, FOUR_BIT, SHARDED, Lora, Quantization, Strategy
from finllm.shapes import Shape

STEP = 64
"""finllm.fast fills ranks up to a multiple of this."""


@dataclass(frozen=True)
class Setting:
    """How one process holds and trains a model."""

    device: Literal["cuda", "cpu"]
    dtype: Literal["bf16", "fp32"]
    quantization: Quantization = "none"
    double_quantization: bool = True
    dequantize: bool = False
    trains: bool = True
    lora: Lora | None = None
    """None trains all weights."""
    optimizer: str = "adamw"
    processes: int = 1
    checkpointing: bool = False
    hand_written: bool = False
    """finllm.fast instead of autograd."""
    strategy: Strategy = "single"
    offload: bool = False
    """What is shared out among the processes stands in the host's memory while it is not used."""
    accumulates: bool = True
    """A step has several micro-batches, so that gradients of the first are there while the next passes."""

    @property
    def size(self) -> int:
        """Bytes of a number in the arithmetic's type."""
        return 2 if self.dtype == "bf16" else 4

    @property
    def all_weights(self) -> bool:
        """Whether all weights are trained, and so held in fp32."""
        return self.trains and self.lora is None

    @property
    def four_bit(self) -> bool:
        """Whether weights are unpacked in every pass."""
        return self.quantization in FOUR_BIT and not self.dequantize


def weight_bytes(shape: Shape, how: Setting) -> float:
    """Bytes of the base model's weights in one process."""
    whole = whole_weight_bytes(shape, how)
    if how.strategy not in APART:
        return whole
    return (0.0 if how.offload else whole / how.processes) + _gathered(shape, how)


def whole_weight_bytes(shape: Shape, how: Setting) -> float:
    """Bytes of all of the base model's weights; those that are trained are fp32, but DeepSpeed's copy in bf16."""
    if how.all_weights:
        return float(shape.parameters * (how.size if how.strategy in BY_DEEPSPEED else 4))
    rest = how.size * (shape.embedding_parameters + shape.norm_parameters)  # bitsandbytes leaves head and embeddings
    return rest + _linear_bytes(how) * shape.linear_parameters + _beside(shape, how)


def loading_bytes(shape: Shape, how: Setting) -> float:
    """Bytes of what is there before training begins, where processes share out what each of them has loaded whole."""
    if how.strategy not in APART:
        return 0.0
    factors = 0 if how.lora is None or not how.trains else 4 * lora_parameters(shape, how.lora)
    # Accelerate keeps the whole weights until FSDP has made its parts; DeepSpeed frees each as it is divided. Parts that go
    # to the host are not beside them; where all weights are trained, the peak was that of parts that are (h200x2.json).
    gone = how.strategy != "fsdp" or (how.offload and how.lora is not None)
    parts = 0.0 if gone else 1 / how.processes
    return (1 + parts) * whole_weight_bytes(shape, how) + factors


def offloaded_bytes(shape: Shape, how: Setting) -> float:
    """Bytes that a process puts into the host's memory with `offload`, at least: its part of states, gradients, weights."""
    weights = whole_weight_bytes(shape, how) if how.strategy in APART else 0.0
    trained = shape.parameters if how.lora is None else lora_parameters(shape, how.lora)
    in_weights = 4 if how.strategy == "fsdp" and how.all_weights else 0
    return (weights + (4 + 4 + 8 - in_weights) * trained) / how.processes  # fp32 masters, gradients, AdamW's moments


def gathered_bytes(shape: Shape, how: Setting) -> float:
    """Bytes of all weights as they are gathered for a pass."""
    linear = (float(how.size) if how.all_weights else _linear_bytes(how)) * shape.linear_parameters
    return linear + how.size * (shape.embedding_parameters + shape.norm_parameters)


def _gathered(shape: Shape, how: Setting) -> float:
    """Bytes of what is whole for the moment: the layer that is computed, the next one, and the head."""
    layer = (float(how.size) if how.all_weights else _linear_bytes(how)) * shape.linear_parameters / shape.layers
    return 2 * layer + how.size * shape.vocabulary * shape.hidden


def _linear_bytes(how: Setting) -> float:
    """Bytes for a weight of a linear layer."""
    if how.four_bit:  # blocks of 64 share a scale: fp32, or 8 bits with an fp32 scale for 256 (QLoRA, section 3)
        return 0.5 + (1 / 64 + 4 / (64 * 256) if how.double_quantization else 4 / 64)
    return 1.0 if how.quantization == "int8" else float(how.size)


def _beside(shape: Shape, how: Setting) -> float:
    """finllm.fast keeps LoRA's second factors beside dense weights, or one unpacked layer."""
    if not how.hand_written:
        return 0.0
    columns = sum(outputs * width for _, outputs, width in stacks(shape, how.lora))
    if how.four_bit:
        return how.size * (shape.linear_parameters / shape.layers + columns)
    return float(how.size * shape.layers * columns)


def stacks(shape: Shape, lora: Lora | None) -> list[tuple[int, int, int]]:
    """Inputs, outputs and filled-up rank of the linear layers that finllm.fast computes together."""
    stacks = []
    for names in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        rank = sum(lora.rank for name in names if lora and targets(lora, name))
        outputs = sum(shape.linears[name][1] for name in names)
        stacks.append((shape.linears[names[0]][0], outputs, -(-rank // STEP) * STEP))
    return stacks


def targets(lora: Lora, name: str) -> bool:
    """Whether a linear layer has an adapter."""
    return lora.targets == "all-linear" or any(target.endswith(name) for target in lora.targets)


def lora_parameters(shape: Shape, lora: Lora) -> int:
    """Weights of the adapters: rank x (inputs + outputs) for each targeted layer."""
    each = (lora.rank * sum(sizes) for name, sizes in shape.linears.items() if targets(lora, name))
    return shape.layers * sum(each)


def state_bytes(shape: Shape, how: Setting) -> float:
    """Bytes of what is trained beyond the base weights: factors in fp32, gradients, optimizer, copies."""
    if how.strategy in SHARDED:
        return _shared_out(shape, how)
    states = {"adamw": 8, "adamw_8bit": 2 + 8 / 256}.get(
        how.optimizer, 0.0
    )  # paged: evicted to the host under pressure
    buckets = 4 if how.processes > 1 else 0  # DDP's, one number for each gradient
    if how.lora is None:
        copies = 2 if how.dtype == "bf16" else 0  # autocast casts each weight once, and keeps it for the backward pass
        return shape.parameters * (4 + states + buckets + copies)
    if how.hand_written:  # fp32 factors and gradients, and both in bf16; first factors with their filling
        filled = shape.layers * sum(inputs * width for inputs, _, width in stacks(shape, how.lora))
        second = lora_parameters(shape, how.lora) * 0.5
        return (filled + second) * 2 * (4 + how.size) + lora_parameters(shape, how.lora) * (states + buckets)
    copies = 2 if how.dtype == "bf16" else 0
    return lora_parameters(shape, how.lora) * (4 + 4 + states + buckets + copies)


def late_gradients(shape: Shape, how: Setting) -> float:
    """Bytes of gradients that take the place of activations in the backward pass, and are gone before the next."""
    if how.strategy != "fsdp" or how.accumulates or how.offload:
        return 0.0
    trained = shape.parameters if how.lora is None else lora_parameters(shape, how.lora)
    return 4 * trained / how.processes


def _shared_out(shape: Shape, how: Setting) -> float:
    """The same where each process has its part: arXiv 1910.02054, section 5, with what the libraries keep beside it."""
    trained = shape.parameters if how.lora is None else lora_parameters(shape, how.lora)
    part = 0.0 if how.offload else trained / how.processes
    in_flight = trained / shape.layers  # gradients of a layer, before each process has its part
    if how.strategy == "fsdp":  # fp32 factors, gradients and AdamW's moments; all weights are counted as such
        gradients = 4 if how.accumulates else 0
        return part * (gradients + 8 + (0 if how.lora is None else 4)) + in_flight * (how.size + 4)
    # DeepSpeed: fp32 masters, AdamW's moments, gradients, and those once more in fp32 for the step
    buckets = 2 * how.size * min(shape.hidden**2, trained)
    factors = 0.0 if how.lora is None else how.size * trained / (1 if how.strategy == "zero2" else how.processes)
    return factors + part * (4 + 8 + how.size + 4) + buckets + in_flight * how.size
