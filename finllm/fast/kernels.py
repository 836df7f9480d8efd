"""What a decoder layer computes besides products of matrices and attention, on a GPU; see arithmetic.py."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm(x, weight, out, inverse, size, out_stride, eps, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDE)
    live = columns < size
    values = tl.load(x + row * size + columns, mask=live, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(values * values, axis=0) / size + eps)
    scale = tl.load(weight + columns, mask=live, other=0.0).to(tl.float32)
    unit = (values * root).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * out_stride + columns, (unit * scale).to(out.dtype.element_ty), mask=live)
    tl.store(inverse + row, root)


@triton.jit
def _norm_backward(gradient, x, weight, inverse, residual, out, size, gradient_stride, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDE)
    live = columns < size
    flowing = tl.load(gradient + row * gradient_stride + columns, mask=live, other=0.0).to(tl.float32)
    scaled = flowing * tl.load(weight + columns, mask=live, other=0.0).to(tl.float32)
    root = tl.load(inverse + row)
    unit = tl.load(x + row * size + columns, mask=live, other=0.0).to(tl.float32) * root
    back = (scaled - unit * (tl.sum(scaled * unit, axis=0) / size)) * root
    beside = tl.load(residual + row * size + columns, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, (beside + back).to(out.dtype.element_ty), mask=live)


@triton.jit
def _gate(gate_up, out, size, out_stride, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    live = columns < size
    gates = tl.load(gate_up + row * 2 * size + columns, mask=live, other=0.0).to(tl.float32)
    ups = tl.load(gate_up + row * 2 * size + size + columns, mask=live, other=0.0).to(tl.float32)
    opened = (gates * tl.sigmoid(gates)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * out_stride + columns, (opened * ups).to(out.dtype.element_ty), mask=live)


@triton.jit
def _gate_backward(gradient, gate_up, size, gradient_stride, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    live = columns < size
    flowing = tl.load(gradient + row * gradient_stride + columns, mask=live, other=0.0).to(tl.float32)
    place = gate_up + row * 2 * size + columns
    gates = tl.load(place, mask=live, other=0.0).to(tl.float32)
    ups = tl.load(place + size, mask=live, other=0.0).to(tl.float32)
    share = tl.sigmoid(gates)
    into_gates = flowing * ups * share * (1 + gates * (1 - share))
    tl.store(place, into_gates.to(gate_up.dtype.element_ty), mask=live)
    tl.store(place + size, (flowing * gates * share).to(gate_up.dtype.element_ty), mask=live)


@triton.jit
def _spread(table, scales, like, RANK: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """Copy matrices of RANK columns, each times its scale; a line of `table` is from, to, rows, stride of `to`."""
    line = table + tl.program_id(0) * 4
    source = tl.load(line).to(tl.pointer_type(tl.float32))
    goal = tl.load(line + 1).to(tl.pointer_type(like.dtype.element_ty))
    count, stride = tl.load(line + 2), tl.load(line + 3)
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, WIDE)[None, :]
    live = (rows < count) & (columns < RANK)
    values = tl.load(source + rows * RANK + columns, mask=live, other=0.0) * tl.load(scales + tl.program_id(0))
    tl.store(goal + rows * stride + columns, values.to(like.dtype.element_ty), mask=live)


@triton.jit
def _unpack(packed, scales, scale_code, scale_scales, offset, code, out, count, inputs, out_stride, WIDE: tl.constexpr):
    """NF4 with double quantisation: two values a byte, the first in the high half; 64 to a scale, 256 scales to one."""
    places = tl.program_id(0).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    live = places < count
    both = tl.load(packed + places, mask=live, other=0).to(tl.int32)
    scale_place = places // 32
    scale = tl.load(scale_code + tl.load(scales + scale_place, mask=live, other=0).to(tl.int32))
    scale = scale * tl.load(scale_scales + scale_place // 256, mask=live, other=0.0) + tl.load(offset)
    high = tl.load(code + (both >> 4)) * scale
    low = tl.load(code + (both & 15)) * scale
    element = 2 * places
    place = out + (element // inputs) * out_stride + element % inputs
    tl.store(place, high.to(out.dtype.element_ty), mask=live)
    tl.store(place + 1, low.to(out.dtype.element_ty), mask=live)


def norm(x: Tensor, weight: Tensor, eps: float, width: int) -> tuple[Tensor, Tensor]:
    """arithmetic.norm."""
    rows, size = x.shape
    out = x.new_empty(rows, size + width)
    inverse = x.new_empty(rows, dtype=torch.float32)
    _norm[(rows,)](x, weight, out, inverse, size, size + width, eps, WIDE=triton.next_power_of_2(size), num_warps=8)
    return out, inverse


def norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, residual: Tensor) -> Tensor:
    """arithmetic.norm_backward."""
    rows, size = x.shape
    out = torch.empty_like(x)
    wide = triton.next_power_of_2(size)
    _norm_backward[(rows,)](
        gradient, x, weight, inverse, residual, out, size, gradient.stride(0), WIDE=wide, num_warps=8
    )
    return out


def gate(gate_up: Tensor, width: int) -> Tensor:
    """arithmetic.gate."""
    rows, size = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size + width)
    _gate[(rows, triton.cdiv(size, 2048))](gate_up, out, size, size + width, WIDE=2048, num_warps=8)
    return out


def gate_backward(gradient: Tensor, gate_up: Tensor) -> Tensor:
    """arithmetic.gate_backward."""
    rows, size = len(gate_up), gate_up.shape[1] // 2
    _gate_backward[(rows, triton.cdiv(size, 2048))](gradient, gate_up, size, gradient.stride(0), WIDE=2048, num_warps=8)
    return gate_up


def spread(table: Tensor, scales: Tensor, like: Tensor, rank: int, most_rows: int) -> None:
    """Copy LoRA's second factors, fp32, to where the passes use them, in the dtype of `like`; see `_spread`."""
    grid = (len(table), triton.cdiv(most_rows, 256))
    _spread[grid](table, scales, like, RANK=rank, WIDE=triton.next_power_of_2(rank), ROWS=256, num_warps=4)


def unpack_4bit(weight: Any, out: Tensor) -> None:
    """Write the values of bitsandbytes' NF4 weights, with double quantisation, to `out`, (outputs, inputs)."""
    state = weight.quant_state
    count = weight.numel()
    _unpack[(triton.cdiv(count, 1024),)](
        weight.data, state.absmax, state.state2.code, state.state2.absmax, state.offset, state.code, out, count,
        out.shape[1], out.stride(0), WIDE=1024, num_warps=4,
    )  # fmt: skip
