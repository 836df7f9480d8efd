"""The tokens that all rows of a micro-batch begin with, computed once: the layout of a stream, and its attention.

    rows   I I I a a        stream     I I I a a b b b c
           I I I b b b      positions  0 1 2 3 4 3 4 5 3
           I I I c

A row attends to the instruction I and to itself, so that values and gradients are those of separate rows.
docs/shared_prefix.md says why, and when.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from finllm.errors import RunError

NAME = "shared_prefix"
"""Of the attention, in Transformers' register; and of the argument by which a model passes it a stream's places."""
IGNORED = -100
"""Label of a position that has no part in the loss."""
BRANCHES = "branches"
"""Of a row that goes on in several ways (rows, longest): 0 for the tokens of all ways, then which way."""
NO_EFFECT = frozenset({"position_ids", "use_cache", "output_hidden_states", "return_dict"})
"""Arguments that Transformers passes down to attention, which does not depend on them."""
Places = Mapping[str, Any]
"""Where the rows of a stream are: numbers and tensors, as `places` makes them."""
GQA: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""Older versions of torch take fewer key heads than query heads without being told."""


def shared_length(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with; each keeps at least one token of its own."""
    first, last = min(prompts), max(prompts)  # the extremes in dictionary order share the least
    limit = min(map(len, prompts)) - 1
    length = 0
    while length < limit and first[length] == last[length]:
        length += 1
    return length


def layout(prompts: Sequence[list[int]], answers: Sequence[list[int]], *, multiple: int = 1) -> dict[str, Any]:
    """The rows as one stream: `input_ids`, `position_ids`, `labels`, each (1, tokens), and their `shared_prefix`.

    The last token of an answer is only ever a label. It stands at the place after its row's last token: there the next
    row begins, or padding, neither of which predicts or is predicted there. Tokens are padded to a `multiple`.
    """
    shared = shared_length(prompts)
    own = [[*prompt[shared:], *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    ids, positions = [*prompts[0][:shared]], [*range(shared)]
    labels: list[int] = [IGNORED] * shared
    for tokens, answer in zip(own, answers, strict=True):
        ids += tokens
        positions += range(shared, shared + len(tokens))
        labels += [IGNORED] * (len(ids) + 1 - len(labels))
        labels[len(ids) + 1 - len(answer) :] = answer
    size = -(-len(labels) // multiple) * multiple
    padding = size - len(ids)
    return {
        "input_ids": torch.tensor([ids + [0] * padding]),
        "position_ids": torch.tensor([[*positions, *range(padding)]]),
        "labels": torch.tensor([labels + [IGNORED] * (size - len(labels))]),
        NAME: places(shared, [len(tokens) for tokens in own], padding),
    }


def places(shared: int, lengths: Sequence[int], padding: int) -> dict[str, Any]:
    """Where the instruction (`shared` tokens), the rows of these `lengths` and the padding are in a stream.

    For attention on rows padded to the longest: `rows` (rows, longest), the place of each token; `back` (tokens behind
    the instruction), where each is among those. For attention on segments (instruction, rows, padding): `queries` and
    `keys`, where each begins and the last ends; `attended`, the place of each key; `own` and `copies`, which keys are
    the tokens behind the instruction, and which repeat the instruction, segment by segment.
    """
    longest, ends = max(lengths), list(accumulate(lengths, initial=shared))
    offsets, sizes = torch.arange(longest), torch.tensor(lengths)[:, None]
    back = (offsets < sizes).flatten().nonzero().squeeze(1)
    segments = [shared, *(shared + length for length in lengths), padding]
    keys = list(accumulate(segments, initial=0))
    head = torch.arange(shared)
    attended = [head]
    for start, end in pairwise(ends):
        attended += [head, torch.arange(start, end)]
    tail = torch.arange(ends[-1], ends[-1] + padding)
    behind = [torch.arange(start + shared, end) for start, end in pairwise(keys[1:-1])]
    return {
        "length": shared,
        "rows": torch.tensor(ends[:-1])[:, None] + torch.minimum(offsets, sizes - 1),
        "back": torch.cat([back, back.new_zeros(padding)]),
        "queries": torch.tensor([0, *ends, ends[-1] + padding], dtype=torch.int32),
        "keys": torch.tensor(keys, dtype=torch.int32),
        "most_queries": max(shared, longest, padding),
        "most_keys": max(segments),
        "attended": torch.cat([*attended, tail]),
        "own": torch.cat([*behind, torch.arange(keys[-2], keys[-1])]),
        "copies": (torch.tensor(keys[:-2])[:, None] + head).flatten(),
    }


@contextmanager
def attending(model: Any, *, streams: bool = True) -> Iterator[None]:
    """While open, the model attends to streams, or again to ordinary batches; raises RunError where it cannot."""
    AttentionInterface.register(NAME, attention)  # no mask goes by this name, so Transformers builds none
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = _implementation(base)
    ordinary = "sdpa" if before == NAME else before
    wanted = NAME if streams else ordinary
    if wanted == before:
        yield
        return
    base.set_attn_implementation(wanted)
    try:
        if _implementation(base) != wanted:
            raise RunError(f"{type(base).__name__} does not use Transformers' attention interface")
        yield
    finally:
        base.set_attn_implementation(before)


def _implementation(base: Any) -> str:
    return str(base.config.get_text_config()._attn_implementation)  # noqa: SLF001  Transformers has no public name


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    shared_prefix: Places | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention over a stream, (1, tokens, heads, head size), as Transformers calls it.

    Raises RunError for everything that it would have to ignore.
    """
    if shared_prefix is None or attention_mask is not None:
        raise RunError("the model attends to streams, but was given something else; wrap the call in attending(...)")
    if dropout:
        raise RunError(f"attention dropout of {dropout}: the shared instruction would drop the same for all rows")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise RunError("attention that is not causal cannot share an instruction")
    unknown = sorted(name for name, given in others.items() if given is not None and name not in NO_EFFECT)
    if unknown:
        raise RunError(f"attention with {', '.join(unknown)} is not supported on streams")
    longest = shared_prefix["length"] + shared_prefix["rows"].shape[1]
    window = sliding_window if sliding_window is not None and sliding_window < longest else None
    kernel = on_padded_rows if BRANCHES in shared_prefix else _kernel(query)
    return kernel(query, key, value, shared_prefix, window, scaling)[None], None


Kernel = Callable[[Tensor, Tensor, Tensor, Places, int | None, float | None], Tensor]
"""(1, heads, tokens, size) queries, keys, values -> (tokens, heads, size); a window counts the query's own token."""


def _kernel(query: Tensor) -> Kernel:
    """The fastest exact attention for such tensors on their device."""
    half = _arithmetic(query) in {torch.bfloat16, torch.float16}
    if query.is_cuda and half and query.shape[-1] <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0):
        return on_segments
    return on_padded_rows


def _arithmetic(query: Tensor) -> torch.dtype:
    """What autocast would make of the queries: it does not know the kernels that take segments."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def on_padded_rows(
    query: Tensor, key: Tensor, value: Tensor, where: Places, window: int | None, scaling: float | None
) -> Tensor:
    """Attention by sdpa: the instruction by itself, and all rows, padded to the longest, after it."""
    shared, (count, longest) = where["length"], where["rows"].shape
    places_of_rows = where["rows"].flatten()

    def rows(tensor: Tensor) -> Tensor:  # (1, heads, tokens, size) -> (rows, heads, longest, size)
        taken = tensor[0].index_select(1, places_of_rows)
        return taken.reshape(-1, count, longest, taken.shape[-1]).transpose(0, 1)

    def after_instruction(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:, :, :shared].expand(count, -1, -1, -1), rows(tensor)], dim=2)

    if query.is_cuda:  # with a mask, only equal numbers of heads have a fast kernel there
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
    seen = _seen_by_branches(where, window) if BRANCHES in where else None
    last = _sdpa(rows(query), after_instruction(key), after_instruction(value), window, scaling, seen)
    last = last.transpose(0, 1).flatten(1, 2).index_select(1, where["back"])  # (heads, tokens, size)
    if shared:
        first = _sdpa(query[:, :, :shared], key[:, :, :shared], value[:, :, :shared], window, scaling)
        last = torch.cat([first[0], last], dim=1)
    return last.transpose(0, 1)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, scaling: float | None, mask: Tensor | None = None
) -> Tensor:
    """Attention under a mask; without one, causal attention whose last query stands at the last key."""
    if mask is None:
        queries, keys = query.shape[2], key.shape[2]
        places_of_keys = torch.arange(keys, device=query.device)
        distance = places_of_keys[keys - queries :, None] - places_of_keys
        mask = (distance >= 0) & (distance < (keys if window is None else window))
    several = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=several)


def _seen_by_branches(where: Places, window: int | None) -> Tensor:
    """(rows, 1, longest, instruction + longest) bool: a token sees what stands before it on its way from the root.

    Two branches of a row do not see each other. Distances are those of positions: branches begin at the same one.
    """
    branches, positions, shared = where[BRANCHES], where["positions"], where["length"]
    longest = branches.shape[1]
    order = torch.arange(longest, device=branches.device)
    one_way = (branches[:, None] == 0) | (branches[:, None] == branches[:, :, None])
    own = (order <= order[:, None]) & one_way
    seen = torch.cat([own.new_ones(1, 1, shared).expand(*own.shape[:2], -1), own], dim=2)
    if window is not None:
        keys = torch.cat([torch.arange(shared, device=order.device).expand(len(positions), -1), positions], dim=1)
        seen = seen & (positions[:, :, None] - keys[:, None] < window)
    return seen[:, None]


def on_segments(
    query: Tensor, key: Tensor, value: Tensor, where: Places, window: int | None, scaling: float | None
) -> Tensor:
    """Attention by FlashAttention on segments of any length, in one call; the last query stands at the last key."""
    kind = _arithmetic(query)
    output = varlen_attn(
        query[0].transpose(0, 1).to(kind).contiguous(),
        attended(key, where).to(kind),
        attended(value, where).to(kind),
        where["queries"],
        where["keys"],
        where["most_queries"],
        where["most_keys"],
        scale=scaling,
        window_size=(-1, 0) if window is None else (window - 1, 0),  # flash counts the tokens before the query's own
        **GQA,
    )
    assert isinstance(output, Tensor), type(output)
    return output


def attended(tensor: Tensor, where: Places) -> Tensor:
    """Keys or values (1, heads, tokens, size) of each segment, one after the other: (keys, heads, size)."""
    taken: Tensor = _Attended.apply(  # type: ignore[no-untyped-call]  # as torch has it
        tensor[0].transpose(0, 1), where["length"], where["attended"], where["own"], where["copies"]
    )
    return taken


class _Attended(torch.autograd.Function):
    """A gather whose backward pass adds up the copies of the instruction in fp32, in a fixed order."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, length: int, places_of_keys: Tensor, own: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(own, copies)
        ctx.length = length
        return tokens.index_select(0, places_of_keys)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        own, copies = ctx.saved_tensors
        rows = gradient.index_select(0, own)
        if not ctx.length:
            return rows, None, None, None, None
        repeated = gradient.index_select(0, copies).reshape(-1, ctx.length, *gradient.shape[1:])
        wide = torch.promote_types(gradient.dtype, torch.float32)
        instruction = repeated.sum(dim=0, dtype=wide).to(gradient.dtype)
        return torch.cat([instruction, rows]), None, None, None, None
