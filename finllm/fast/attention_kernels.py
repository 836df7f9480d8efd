"""Attention over a stream on a GPU, forward and backward; see arithmetic.py.

A block of rows goes over the instruction's keys and over those from the beginning of its first segment. Keys of the
instruction gather gradients from all rows: blocks of rows do so apart, and a last kernel adds them up in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from finllm.fast.arithmetic import Heads
from finllm.fast.streams import Stream

BLOCK = 64
"""Rows, or keys, in one step of attention."""
KEYS = 32
"""Keys whose gradients one program gathers."""
LOG2E = 1.4426950408889634


@triton.jit
def _turn(
    qkv, positions, cosines, sines, stride, sign, TURNED: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Turn the heads of queries and keys by each token's position, in place; a sign of -1 turns them back."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, WIDE)
    half = tl.arange(0, HALF)
    live = (heads < TURNED)[:, None]
    place = qkv + row * stride + heads[:, None] * 2 * HALF + half[None, :]
    turn = tl.load(positions + row) * HALF + half
    cosine, sine = tl.load(cosines + turn)[None, :], sign * tl.load(sines + turn)[None, :]
    one = tl.load(place, mask=live, other=0.0).to(tl.float32)
    other = tl.load(place + HALF, mask=live, other=0.0).to(tl.float32)
    tl.store(place, (one * cosine - other * sine).to(qkv.dtype.element_ty), mask=live)
    tl.store(place + HALF, (other * cosine + one * sine).to(qkv.dtype.element_ty), mask=live)


@triton.jit
def _heads(base, rows, live, stride, SIZE: tl.constexpr):
    """One head of each row, (rows, SIZE)."""
    columns = tl.arange(0, SIZE)
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=live[:, None], other=0.0)


@triton.jit
def _of_one_way(mine, theirs):
    """Which rows' segments (or their trunks, whose numbers are multiples of WAYS) are the keys' segments."""
    return (mine == theirs) | ((mine & -4096) == theirs)  # streams.WAYS


@triton.jit
def _key_places(at, first, span, shared, rows, mine, segments, STEP: tl.constexpr):
    """Places of a step's keys, which are those of the instruction, then those from `first` on; and which rows see."""
    number = at + tl.arange(0, STEP)
    common = number < shared
    keys = tl.where(common, number, number - shared + first)
    live = number < span
    theirs = tl.load(segments + keys, mask=live, other=-1)
    seen = live[None, :] & (keys[None, :] <= rows[:, None])
    return keys, live, seen & (common[None, :] | _of_one_way(mine[:, None], theirs[None, :]))


@triton.jit
def _attend(
    qkv, out, logs, segments, starts, tokens, shared, out_stride, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    stride = (HEADS + 2 * (HEADS // GROUP)) * SIZE
    rows = block * ROWS + tl.arange(0, ROWS)
    live = rows < tokens
    query = _heads(qkv + head * SIZE, rows, live, stride, SIZE)
    key_base = qkv + (HEADS + head // GROUP) * SIZE
    value_base = key_base + (HEADS // GROUP) * SIZE
    mine = tl.load(segments + rows, mask=live, other=-2)
    first = tl.maximum(tl.min(tl.load(starts + rows, mask=live, other=tokens), axis=0), shared)
    span = shared + tl.maximum(tl.minimum((block + 1) * ROWS, tokens) - first, 0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, SIZE], tl.float32)
    for at in range(0, span, STEP):  # the first step gives every row a finite `top`: all see the first token
        keys, there, seen = _key_places(at, first, span, shared, rows, mine, segments, STEP)
        key = _heads(key_base, keys, there, stride, SIZE)
        value = _heads(value_base, keys, there, stride, SIZE)
        scores = tl.where(seen, tl.dot(query, tl.trans(key)) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        shares = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(shares, axis=1)
        sums = sums * shrink[:, None] + tl.dot(shares.to(value.dtype), value)
        top = higher
    columns = head * SIZE + tl.arange(0, SIZE)
    place = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(place, (sums / total[:, None]).to(out.dtype.element_ty), mask=live[:, None])
    tl.store(logs + head * tokens + rows, top + tl.log2(total), mask=live)


@triton.jit
def _attend_backward_queries(
    gradient, qkv, out, into, logs, deltas, segments, starts, tokens, shared, gradient_stride, out_stride, scale,
    plain_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    stride = (HEADS + 2 * (HEADS // GROUP)) * SIZE
    rows = block * ROWS + tl.arange(0, ROWS)
    live = rows < tokens
    query = _heads(qkv + head * SIZE, rows, live, stride, SIZE)
    flowing = _heads(gradient + head * SIZE, rows, live, gradient_stride, SIZE)
    output = _heads(out + head * SIZE, rows, live, out_stride, SIZE)
    delta = tl.sum(flowing.to(tl.float32) * output.to(tl.float32), axis=1)
    tl.store(deltas + head * tokens + rows, delta, mask=live)
    log = tl.load(logs + head * tokens + rows, mask=live, other=0.0)
    key_base = qkv + (HEADS + head // GROUP) * SIZE
    value_base = key_base + (HEADS // GROUP) * SIZE
    mine = tl.load(segments + rows, mask=live, other=-2)
    first = tl.maximum(tl.min(tl.load(starts + rows, mask=live, other=tokens), axis=0), shared)
    span = shared + tl.maximum(tl.minimum((block + 1) * ROWS, tokens) - first, 0)
    into_query = tl.zeros([ROWS, SIZE], tl.float32)
    for at in range(0, span, STEP):
        keys, there, seen = _key_places(at, first, span, shared, rows, mine, segments, STEP)
        key = _heads(key_base, keys, there, stride, SIZE)
        value = _heads(value_base, keys, there, stride, SIZE)
        scores = tl.dot(query, tl.trans(key)) * scale
        shares = tl.where(seen, tl.exp2(scores - log[:, None]), 0.0)
        into_scores = shares * (tl.dot(flowing, tl.trans(value)) - delta[:, None])
        into_query += tl.dot(into_scores.to(key.dtype), key)
    columns = head * SIZE + tl.arange(0, SIZE)
    place = into + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(place, (into_query * plain_scale).to(into.dtype.element_ty), mask=live[:, None])


@triton.jit
def _keys_step(
    into_key, into_value, key, value, keys, theirs, at, until, gradient, qkv, logs, deltas, segments, tokens, shared,
    gradient_stride, scale, key_head,
    INSTRUCTION: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values, (keys, SIZE), from one block of rows and all heads of the group."""
    stride = (HEADS + 2 * (HEADS // GROUP)) * SIZE
    rows = at + tl.arange(0, STEP)
    live = rows < until
    seen = live[None, :] & (keys[:, None] <= rows[None, :])
    if INSTRUCTION:
        seen = seen & (keys < shared)[:, None]
    else:
        mine = tl.load(segments + rows, mask=live, other=-2)
        seen = seen & _of_one_way(mine[None, :], theirs[:, None]) & (keys >= shared)[:, None]
    for member in range(GROUP):
        head = key_head * GROUP + member
        query = _heads(qkv + head * SIZE, rows, live, stride, SIZE)
        flowing = _heads(gradient + head * SIZE, rows, live, gradient_stride, SIZE)
        log = tl.load(logs + head * tokens + rows, mask=live, other=0.0)
        delta = tl.load(deltas + head * tokens + rows, mask=live, other=0.0)
        scores = tl.dot(key, tl.trans(query)) * scale
        shares = tl.where(seen, tl.exp2(scores - log[None, :]), 0.0)
        into_value += tl.dot(shares.to(flowing.dtype), flowing)
        into_scores = shares * (tl.dot(value, tl.trans(flowing)) - delta[None, :])
        into_key += tl.dot(into_scores.to(query.dtype), query)
    return into_key, into_value


@triton.jit
def _attend_backward_keys(
    gradient, qkv, into, logs, deltas, segments, ends, tokens, shared, gradient_stride, scale, plain_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    block, key_head = tl.program_id(0), tl.program_id(1)
    stride = (HEADS + 2 * (HEADS // GROUP)) * SIZE
    keys = block * KEYS + tl.arange(0, KEYS)
    live = keys < tokens
    key_start = (HEADS + key_head) * SIZE
    value_start = key_start + (HEADS // GROUP) * SIZE
    key = _heads(qkv + key_start, keys, live, stride, SIZE)
    value = _heads(qkv + value_start, keys, live, stride, SIZE)
    theirs = tl.load(segments + keys, mask=live, other=-1)
    until = tl.max(tl.load(ends + keys, mask=live, other=0), axis=0)
    into_key = tl.zeros([KEYS, SIZE], tl.float32)
    into_value = tl.zeros([KEYS, SIZE], tl.float32)
    for at in range(block * KEYS, until, STEP):
        into_key, into_value = _keys_step(
            into_key, into_value, key, value, keys, theirs, at, until, gradient, qkv, logs, deltas, segments, tokens,
            shared, gradient_stride, scale, key_head, False, HEADS, GROUP, SIZE, STEP,
        )  # fmt: skip
    own = (live & (keys >= shared))[:, None]
    place = into + keys.to(tl.int64)[:, None] * stride + tl.arange(0, SIZE)[None, :]
    kind = into.dtype.element_ty
    tl.store(place + key_start, (into_key * plain_scale).to(kind), mask=own)
    tl.store(place + value_start, into_value.to(kind), mask=own)


@triton.jit
def _attend_backward_instruction(
    gradient, qkv, partial, logs, deltas, segments, tokens, shared, gradient_stride, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """What one block of rows gives to the instruction's keys and values: (blocks, keys, key heads, 2 SIZE)."""
    chunk, key_head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    stride = (HEADS + 2 * (HEADS // GROUP)) * SIZE
    keys = block * KEYS + tl.arange(0, KEYS)
    live = keys < shared
    key_start = (HEADS + key_head) * SIZE
    key = _heads(qkv + key_start, keys, live, stride, SIZE)
    value = _heads(qkv + key_start + (HEADS // GROUP) * SIZE, keys, live, stride, SIZE)
    into_key = tl.zeros([KEYS, SIZE], tl.float32)
    into_value = tl.zeros([KEYS, SIZE], tl.float32)
    into_key, into_value = _keys_step(
        into_key, into_value, key, value, keys, keys, chunk * STEP, tokens, gradient, qkv, logs, deltas, segments,
        tokens, shared, gradient_stride, scale, key_head, True, HEADS, GROUP, SIZE, STEP,
    )  # fmt: skip
    columns = tl.arange(0, SIZE)
    place = partial + ((chunk * shared + keys[:, None]) * (HEADS // GROUP) + key_head) * 2 * SIZE + columns[None, :]
    tl.store(place, into_key, mask=live[:, None])
    tl.store(place + SIZE, into_value, mask=live[:, None])


@triton.jit
def _add_up_instruction(
    partial, into, chunks, shared, plain_scale, HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    key, key_head = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, SIZE)
    into_key = tl.zeros([SIZE], tl.float32)
    into_value = tl.zeros([SIZE], tl.float32)
    for chunk in range(chunks):
        place = partial + ((chunk * shared + key) * (HEADS // GROUP) + key_head) * 2 * SIZE + columns
        into_key += tl.load(place)
        into_value += tl.load(place + SIZE)
    place = into + key * (HEADS + 2 * (HEADS // GROUP)) * SIZE + (HEADS + key_head) * SIZE + columns
    tl.store(place, (into_key * plain_scale).to(into.dtype.element_ty))
    tl.store(place + (HEADS // GROUP) * SIZE, into_value.to(into.dtype.element_ty))


def _shape(heads: Heads) -> dict[str, Any]:
    return {"HEADS": heads.queries, "GROUP": heads.group, "SIZE": heads.size}


def _turn_heads(qkv: Tensor, stream: Stream, heads: Heads, sign: float) -> None:
    turned = heads.queries + heads.keys
    _turn[(stream.tokens,)](
        qkv, stream.positions, heads.cosines, heads.sines, qkv.stride(0), sign, TURNED=turned,
        WIDE=triton.next_power_of_2(turned), HALF=heads.size // 2, num_warps=8,
    )  # fmt: skip


def attend(qkv: Tensor, stream: Stream, heads: Heads, width: int) -> tuple[Tensor, Tensor]:
    """arithmetic.attend; turns `qkv` in place, and the logarithms of the softmax's sums are to base 2."""
    tokens = stream.tokens
    _turn_heads(qkv, stream, heads, 1.0)
    out = qkv.new_empty(tokens, heads.queries * heads.size + width)
    logs = qkv.new_empty(heads.queries, tokens, dtype=torch.float32)
    _attend[(triton.cdiv(tokens, BLOCK), heads.queries)](
        qkv, out, logs, stream.segments, stream.starts, tokens, stream.shared, out.stride(0),
        heads.size**-0.5 * LOG2E, **_shape(heads), ROWS=BLOCK, STEP=BLOCK, num_warps=4,
    )  # fmt: skip
    return out, logs


def attend_backward(gradient: Tensor, qkv: Tensor, out: Tensor, sums: Tensor, stream: Stream, heads: Heads) -> Tensor:
    """arithmetic.attend_backward, of `qkv` as `attend` left it."""
    tokens, shared = stream.tokens, stream.shared
    scale, shape, blocks = heads.size**-0.5, _shape(heads), triton.cdiv(tokens, BLOCK)
    into, deltas = torch.empty_like(qkv), torch.empty_like(sums)
    strides = (tokens, shared, gradient.stride(0))
    _attend_backward_queries[(blocks, heads.queries)](
        gradient, qkv, out, into, sums, deltas, stream.segments, stream.starts, *strides, out.stride(0),
        scale * LOG2E, scale, **shape, ROWS=BLOCK, STEP=BLOCK, num_warps=4,
    )  # fmt: skip
    _attend_backward_keys[(triton.cdiv(tokens, KEYS), heads.keys)](
        gradient, qkv, into, sums, deltas, stream.segments, stream.ends, *strides, scale * LOG2E, scale, **shape,
        KEYS=KEYS, STEP=BLOCK, num_warps=4,
    )  # fmt: skip
    partial = sums.new_empty(blocks, shared, heads.keys, 2 * heads.size)
    _attend_backward_instruction[(blocks, heads.keys, triton.cdiv(shared, KEYS))](
        gradient, qkv, partial, sums, deltas, stream.segments, *strides, scale * LOG2E, **shape, KEYS=KEYS, STEP=BLOCK,
        num_warps=4,
    )  # fmt: skip
    _add_up_instruction[(shared, heads.keys)](partial, into, blocks, shared, scale, **shape, num_warps=1)
    _turn_heads(into, stream, heads, -1.0)
    return into
