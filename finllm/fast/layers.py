"""One decoder layer, forward and backward."""

from dataclasses import dataclass

import torch
from torch import Tensor

from finllm.fast.arithmetic import Heads, attend, attend_backward, gate, gate_backward, norm, norm_backward
from finllm.fast.streams import Stream
from finllm.fast.weights import Layer, Stack


@dataclass(slots=True)
class Kept:
    """What the backward pass of a layer needs; inputs of stacks stand beside their product with LoRA's first factor."""

    x: Tensor  # (tokens, size)
    attention_inverse: Tensor  # (tokens,)
    attention_input: Tensor
    qkv: Tensor
    attended: Tensor
    sums: Tensor
    mixed: Tensor  # (rows, ...): of what was attended, what goes on
    middle: Tensor  # (rows, size); rows are the tokens, or in the last layer those that predict
    mlp_inverse: Tensor
    mlp_input: Tensor
    gate_up: Tensor
    gated: Tensor


@dataclass(frozen=True, slots=True)
class Setting:
    """What all layers of a pass share."""

    stream: Stream
    heads: Heads
    eps: float
    adapted: bool = True
    """Whether the LoRA factors take part."""


def forward(
    layer: Layer, matrices: list[Tensor], x: Tensor, setting: Setting, rows: Tensor | None = None
) -> tuple[Tensor, Kept]:
    """The layer's output, (tokens, size), and what is needed to go back; with `rows`, only those of the output."""
    qkv_stack, out_stack, gate_stack, down_stack = layer.stacks
    entered, attention_inverse = norm(x, layer.attention_norm, setting.eps, qkv_stack.width)
    qkv = _product(qkv_stack, matrices[0], entered, setting)
    attended, sums = attend(qkv, setting.stream, setting.heads, out_stack.width)
    residual, mixed = x, attended
    if rows is not None:
        residual, mixed = x.index_select(0, rows), attended.index_select(0, rows)
    middle = _product(out_stack, matrices[1], mixed, setting, residual)
    mlp_input, mlp_inverse = norm(middle, layer.mlp_norm, setting.eps, gate_stack.width)
    gate_up = _product(gate_stack, matrices[2], mlp_input, setting)
    gated = gate(gate_up, down_stack.width)
    y = _product(down_stack, matrices[3], gated, setting, middle)
    kept = Kept(
        x, attention_inverse, entered, qkv, attended, sums, mixed, middle, mlp_inverse, mlp_input, gate_up, gated
    )
    return y, kept


def backward(
    layer: Layer,
    matrices: list[Tensor],
    kept: Kept,
    gradient: Tensor,
    setting: Setting,
    rows: Tensor | None = None,
    *,
    first: bool = False,
) -> Tensor | None:
    """What flows back into the layer's input, or None into that of the first layer; sets the factors' gradients."""
    qkv_stack, out_stack, gate_stack, down_stack = layer.stacks
    into_gated = _back(down_stack, matrices[3], gradient, kept.gated)
    into_gate_up = gate_backward(into_gated, kept.gate_up)
    into_mlp = _back(gate_stack, matrices[2], into_gate_up, kept.mlp_input)
    into_middle = norm_backward(into_mlp, kept.middle, layer.mlp_norm, kept.mlp_inverse, gradient)
    into_attended = _back(out_stack, matrices[1], into_middle, kept.mixed)
    if rows is not None:
        into_attended = _scattered(into_attended, rows, len(kept.x))
        into_middle = _scattered(into_middle, rows, len(kept.x))
    into_qkv = attend_backward(into_attended, kept.qkv, kept.attended, kept.sums, setting.stream, setting.heads)
    if first:
        _back_to_factors(qkv_stack, into_qkv, kept.attention_input, into_qkv @ matrices[0][:, qkv_stack.inputs :])
        return None
    into_norm = _back(qkv_stack, matrices[0], into_qkv, kept.attention_input)
    return norm_backward(into_norm, kept.x, layer.attention_norm, kept.attention_inverse, into_middle)


def _product(stack: Stack, matrix: Tensor, x: Tensor, setting: Setting, residual: Tensor | None = None) -> Tensor:
    """Stack times rows, and `residual` beside it; `x` has room for its product with LoRA's first factor."""
    if stack.width and setting.adapted:
        torch.mm(x[:, : stack.inputs], stack.first.T, out=x[:, stack.inputs :])
    else:
        x, matrix = x[:, : stack.inputs], matrix[:, : stack.inputs]
    return x @ matrix.T if residual is None else torch.addmm(residual, x, matrix.T)


def _back(stack: Stack, matrix: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
    """What flows back into the stack's input, (rows, inputs); sets the factors' gradients."""
    both = gradient @ matrix  # (rows, inputs + width)
    back, into_first = both[:, : stack.inputs], both[:, stack.inputs :]
    if stack.width:
        back.addmm_(into_first, stack.first)
        _back_to_factors(stack, gradient, x, into_first)
    return back


def _back_to_factors(stack: Stack, gradient: Tensor, x: Tensor, into_first: Tensor) -> None:
    torch.mm(into_first.T, x[:, : stack.inputs], out=stack.first_gradient)
    for factor in stack.factors:
        columns = slice(stack.inputs + factor.columns.start, stack.inputs + factor.columns.stop)
        out, entered = factor.second_gradient, x[:, columns]
        torch.addmm(out, gradient[:, factor.rows].T, entered, beta=0, alpha=factor.scale, out=out)


def _scattered(part: Tensor, rows: Tensor, tokens: int) -> Tensor:
    """(tokens, size) with `part` at `rows`, 0 elsewhere."""
    return part.new_zeros(tokens, part.shape[1]).index_copy_(0, rows, part)
