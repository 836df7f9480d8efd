"""What a decoder layer computes besides products of matrices, forward and backward.

On a GPU these are the kernels of kernels.py and attention_kernels.py; elsewhere the same in torch. A result that a product with a stack's matrix
follows has room for the stack's `width` at the end of each row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from finllm.fast.streams import WAYS, Stream


@dataclass(frozen=True, slots=True)
class Heads:
    """Shape of attention, and the rotary embedding's tables (positions, half a head)."""

    queries: int
    keys: int
    size: int
    cosines: Tensor
    sines: Tensor

    @property
    def group(self) -> int:
        """Query heads to one key head."""
        return self.queries // self.keys


def norm(x: Tensor, weight: Tensor, eps: float, width: int) -> tuple[Tensor, Tensor]:
    """RMS norm, (rows, size + width) with room at the end, and the inverse root mean squares."""
    if x.is_cuda:
        from finllm.fast import kernels

        return kernels.norm(x, weight, eps, width)
    inverse = x.float().pow(2).mean(-1).add(eps).rsqrt()  # in fp32 whatever the dtype, as Transformers has it
    return _with_room(weight * (x.float() * inverse[:, None]).to(x.dtype), width), inverse


def norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, residual: Tensor) -> Tensor:
    """What flows back into `x` through the norm, and `residual` beside it."""
    if x.is_cuda:
        from finllm.fast import kernels

        return kernels.norm_backward(gradient, x, weight, inverse, residual)
    scaled, unit = (gradient * weight).float(), x.float() * inverse[:, None]
    back = (scaled - unit * (scaled * unit).mean(-1, keepdim=True)) * inverse[:, None]
    return residual + back.to(x.dtype)


def gate(gate_up: Tensor, width: int) -> Tensor:
    """silu(gate) * up, (rows, size + width), of (rows, gate and up)."""
    if gate_up.is_cuda:
        from finllm.fast import kernels

        return kernels.gate(gate_up, width)
    gates, ups = gate_up.chunk(2, dim=1)
    return _with_room(torch.nn.functional.silu(gates) * ups, width)


def gate_backward(gradient: Tensor, gate_up: Tensor) -> Tensor:
    """What flows back into gate and up; takes the place of `gate_up`."""
    if gate_up.is_cuda:
        from finllm.fast import kernels

        return kernels.gate_backward(gradient, gate_up)
    gates, ups = (_wide(part) for part in gate_up.chunk(2, dim=1))
    share = torch.sigmoid(gates)
    into_gates = _wide(gradient) * ups * share * (1 + gates * (1 - share))
    into_ups = _wide(gradient) * gates * share
    return gate_up.copy_(torch.cat([into_gates, into_ups], dim=1))


def attend(qkv: Tensor, stream: Stream, heads: Heads, width: int) -> tuple[Tensor, Tensor]:
    """Attention over a stream: (tokens, heads x size + width), and what the backward pass needs of the softmax."""
    if qkv.is_cuda:
        from finllm.fast import attention_kernels as kernels

        return kernels.attend(qkv, stream, heads, width)
    queries, keys, values = _rotated(qkv, stream, heads)
    scores = (queries @ keys.transpose(1, 2)) * heads.size**-0.5
    scores = scores.masked_fill(~_seen(stream), float("-inf"))
    out = scores.softmax(-1) @ values  # (heads, tokens, size)
    return _with_room(out.transpose(0, 1).flatten(1), width), scores.logsumexp(-1)


def attend_backward(gradient: Tensor, qkv: Tensor, out: Tensor, sums: Tensor, stream: Stream, heads: Heads) -> Tensor:
    """What flows back into queries, keys and values, side by side as they came."""
    if qkv.is_cuda:
        from finllm.fast import attention_kernels as kernels

        return kernels.attend_backward(gradient, qkv, out, sums, stream, heads)
    queries, keys, values = _rotated(qkv, stream, heads)
    scale, tokens = heads.size**-0.5, len(qkv)
    scores = ((queries @ keys.transpose(1, 2)) * scale).masked_fill(~_seen(stream), float("-inf"))
    shares = (scores - sums[..., None]).exp()
    into_out = gradient.reshape(tokens, heads.queries, heads.size).transpose(0, 1)
    whole = heads.queries * heads.size
    each = (gradient * out[:, :whole]).reshape(tokens, heads.queries, heads.size)
    delta = each.sum(-1).T[..., None]  # (heads, tokens, 1)
    into_scores = shares * (into_out @ values.transpose(1, 2) - delta) * scale
    into_queries = _turned_back(into_scores @ keys, stream, heads)
    grouped = (heads.keys, heads.group, tokens, heads.size)
    into_keys = _turned_back((into_scores.transpose(1, 2) @ queries).view(grouped).sum(1), stream, heads)
    into_values = (shares.transpose(1, 2) @ into_out).view(grouped).sum(1)
    parts = (into_queries, into_keys, into_values)
    return torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)


def _rotated(qkv: Tensor, stream: Stream, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (query heads, tokens, size); the first two turned by their positions."""
    parts = qkv.split([heads.queries * heads.size, heads.keys * heads.size, heads.keys * heads.size], dim=1)
    queries, keys, values = (part.unflatten(1, (-1, heads.size)).transpose(0, 1) for part in parts)
    keys, values = (part.repeat_interleave(heads.group, dim=0) for part in (keys, values))
    return _turned(queries, stream, heads), _turned(keys, stream, heads), values


def _turned(part: Tensor, stream: Stream, heads: Heads) -> Tensor:
    cosines, sines = (table[stream.positions].to(part.dtype) for table in (heads.cosines, heads.sines))
    one, other = part.chunk(2, dim=-1)
    return torch.cat([one * cosines - other * sines, other * cosines + one * sines], dim=-1)


def _turned_back(part: Tensor, stream: Stream, heads: Heads) -> Tensor:
    cosines, sines = (table[stream.positions].to(part.dtype) for table in (heads.cosines, heads.sines))
    one, other = part.chunk(2, dim=-1)
    return torch.cat([one * cosines + other * sines, other * cosines - one * sines], dim=-1)


def _seen(stream: Stream) -> Tensor:
    """(tokens, tokens) bool: a token sees the instruction, its trunk and its own segment, up to itself."""
    places = torch.arange(stream.tokens)
    mine, theirs = stream.segments[:, None], stream.segments
    same = (mine == theirs) | (mine - mine % WAYS == theirs)
    return (places <= places[:, None]) & (same | (places < stream.shared))


def _with_room(rows: Tensor, width: int) -> Tensor:
    return torch.cat([rows, rows.new_empty(len(rows), width)], dim=1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
