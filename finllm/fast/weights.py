"""The weights of a decoder as the passes use them: linear layers with the same input are one matrix.

A frozen matrix W and its LoRA factors stand side by side, [W | scale B], so that one product with [x | A x] is the whole
layer, and one product with the gradient gives both what flows back into x and what flows back into A x.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from finllm.errors import RunError
from finllm.fast.support import unsupported

WIDTH = {"cpu": 1, "cuda": 64}
"""The rank of a stack is filled up to a multiple of this: the tensor cores' step."""


@dataclass
class Factor:
    """The LoRA factors of one linear layer in a stack."""

    first: torch.nn.Parameter  # (rank, inputs)
    second: torch.nn.Parameter  # (outputs, rank)
    scale: float
    rows: slice
    """Its outputs among those of the stack."""
    columns: slice
    """Its rank among that of the stack."""
    second_gradient: Tensor = field(init=False)


@dataclass
class Stack:
    """Linear layers that read the same input."""

    linears: list[Any]
    inputs: int
    outputs: int
    width: int
    """Sum of the ranks, filled up."""
    factors: list[Factor]
    matrix: Tensor | None = None
    """(outputs, inputs + width): [W | scale B]; None where W is kept in 4 bits."""
    first: Tensor = field(init=False)  # (width, inputs), in the arithmetic's dtype
    first_gradient: Tensor = field(init=False)


@dataclass
class Layer:
    """One decoder layer."""

    attention_norm: Tensor
    mlp_norm: Tensor
    queries_keys_values: Stack
    output: Stack
    gate_up: Stack
    down: Stack

    @property
    def stacks(self) -> tuple[Stack, Stack, Stack, Stack]:
        """In the order in which they are computed."""
        return self.queries_keys_values, self.output, self.gate_up, self.down


class Decoder:
    """A model's weights, stacked in place: the model computes the same as before, from the same memory."""

    def __init__(self, model: Any) -> None:
        """Raises RunError where `unsupported` says why."""
        why = unsupported(model)
        if why is not None:
            raise RunError(why)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config, body = base.config.get_text_config(), base.model
        self.heads: int = config.num_attention_heads
        self.key_heads: int = config.num_key_value_heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.eps: float = config.rms_norm_eps
        self.window: int | None = getattr(config, "sliding_window", None)
        self.embedding: Tensor = body.embed_tokens.weight
        self.norm: Tensor = body.norm.weight
        self.head: Tensor = base.lm_head.weight
        self.device, self.kind = self.head.device, self.head.dtype
        self._rotary = body.rotary_emb
        self._tables = self._rotations(256)
        self.layers = [_layer(layer) for layer in body.layers]
        self._scratch: list[Tensor] = []
        self._spread: list[_Spread] | None = None
        self._spread_of: dict[int, _Spread] = {}
        self._adopt()

    @property
    def stacks(self) -> Iterator[Stack]:
        """Of all layers."""
        return (stack for layer in self.layers for stack in layer.stacks)

    @property
    def factors(self) -> Iterator[Factor]:
        """Of all stacks."""
        return (factor for stack in self.stacks for factor in stack.factors)

    def tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (positions or more, half a head), of the rotary embedding, in fp32 or wider."""
        if positions > len(self._tables[0]):
            self._tables = self._rotations(positions)
        return self._tables

    def _rotations(self, positions: int) -> tuple[Tensor, Tensor]:
        count = 1 << (positions - 1).bit_length()
        like = torch.zeros(1, dtype=torch.promote_types(self.kind, torch.float32), device=self.device)
        cosines, sines = self._rotary(like, torch.arange(count, device=self.device)[None])
        half = self.head_size // 2
        return cosines[0, :, :half].contiguous(), sines[0, :, :half].contiguous()

    def _adopt(self) -> None:
        """Lay all LoRA factors out one after the other, so that copies and gradients of all are one operation."""
        factors = list(self.factors)
        master = factors[0].first.dtype if factors else torch.float32
        sizes = [0]
        for stack in self.stacks:
            sizes += [stack.width * stack.inputs, *(f.second.numel() for f in stack.factors)]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.masters = torch.zeros(ends[-1], dtype=master, device=self.device)
        self.copies = torch.zeros(ends[-1], dtype=self.kind, device=self.device)
        self.gradients = torch.zeros(ends[-1], dtype=self.kind, device=self.device)
        self.master_gradients = torch.zeros_like(self.masters)
        self._views: list[tuple[torch.nn.Parameter, Tensor, Tensor]] = []
        places = pairwise(ends)
        for stack in self.stacks:
            whole = slice(*next(places))
            stack.first = self.copies[whole].view(stack.width, stack.inputs)
            stack.first_gradient = self.gradients[whole].view(stack.width, stack.inputs)
            for factor in stack.factors:
                rows = slice(*(whole.start + row * stack.inputs for row in (factor.columns.start, factor.columns.stop)))
                part = slice(*next(places))
                factor.second_gradient = self.gradients[part].view_as(factor.second)
                for parameter, place in ((factor.first, rows), (factor.second, part)):
                    view = self.masters[place].view_as(parameter)
                    self._views.append((parameter, view, self.master_gradients[place].view_as(parameter)))
        self.keep_adopted()

    def keep_adopted(self) -> None:
        """Take the factors' values back into place where something else has replaced their memory."""
        for parameter, view, _ in self._views:
            if parameter.data_ptr() != view.data_ptr():
                view.copy_(parameter.data)
                parameter.data = view  # as addressed by _Spread

    def refresh(self) -> None:
        """Copy the factors, which the optimizer has changed, to where the passes use them."""
        self.copies.copy_(self.masters)
        if self._spread is None:
            stacks = [stack for stack in self.stacks if stack.matrix is not None]
            self._spread = [_Spread(stacks, [stack.matrix for stack in stacks if stack.matrix is not None])]
        for spread in self._spread:
            spread()

    def give_gradients(self) -> None:
        """Set or add to the gradient of every factor."""
        if self._views[0][0].grad is not None:
            self.master_gradients.add_(self.gradients)
            return
        self.master_gradients.copy_(self.gradients)
        for parameter, _, gradient in self._views:
            parameter.grad = gradient

    def unpacked(self, layer: Layer) -> list[Tensor]:
        """The matrices of a layer's stacks; those kept in 4 bits are valid until the next layer's are asked for."""
        if layer.down.matrix is not None:
            return [stack.matrix for stack in layer.stacks if stack.matrix is not None]
        if not self._scratch:
            self._scratch = [
                torch.zeros(stack.outputs, stack.inputs + stack.width, dtype=self.kind, device=self.device)
                for stack in layer.stacks
            ]
        from finllm.fast.kernels import unpack_4bit

        for stack, matrix in zip(layer.stacks, self._scratch, strict=True):
            row = 0
            for linear in stack.linears:
                unpack_4bit(linear.weight, matrix[row : row + linear.out_features, : stack.inputs])
                row += linear.out_features
        if id(layer) not in self._spread_of:
            self._spread_of[id(layer)] = _Spread(layer.stacks, self._scratch)
        self._spread_of[id(layer)]()
        return self._scratch


class _Spread:
    """Writes LoRA's second factors, scaled, beside the frozen weights in the stacks' matrices."""

    def __init__(self, stacks: Sequence[Stack], matrices: Sequence[Tensor]) -> None:
        self._pairs = [
            (factor, matrix[factor.rows, stack.inputs + factor.columns.start : stack.inputs + factor.columns.stop])
            for stack, matrix in zip(stacks, matrices, strict=True)
            for factor in stack.factors
        ]
        ranks = {factor.second.shape[1] for factor, _ in self._pairs}
        self._tables = [self._table(rank) for rank in sorted(ranks)] if self._on_gpu else []

    @property
    def _on_gpu(self) -> bool:
        return any(place.is_cuda and factor.second.dtype == torch.float32 for factor, place in self._pairs)

    def _table(self, rank: int) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Where the factors of one rank stand and belong, as addresses; their memory stays where it is."""
        pairs = [(factor, place) for factor, place in self._pairs if factor.second.shape[1] == rank]
        lines = [[f.second.data_ptr(), place.data_ptr(), len(place), place.stride(0)] for f, place in pairs]
        like = pairs[0][1]
        scales = torch.tensor([factor.scale for factor, _ in pairs], device=like.device)
        return torch.tensor(lines, device=like.device), scales, like, rank, max(len(place) for _, place in pairs)

    def __call__(self) -> None:
        if self._tables:
            from finllm.fast.kernels import spread

            for table in self._tables:
                spread(*table)
            return
        for factor, place in self._pairs:
            place.copy_(factor.second.detach() * factor.scale)


def _layer(layer: Any) -> Layer:
    return Layer(
        attention_norm=layer.input_layernorm.weight,
        mlp_norm=layer.post_attention_layernorm.weight,
        queries_keys_values=_stack([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
        output=_stack([layer.self_attn.o_proj]),
        gate_up=_stack([layer.mlp.gate_proj, layer.mlp.up_proj]),
        down=_stack([layer.mlp.down_proj]),
    )


def _stack(linears: Sequence[Any]) -> Stack:
    """The layers as one; where they are dense, the model's own weights become views of the new matrix."""
    bases = [getattr(linear, "base_layer", linear) for linear in linears]
    factors, row, column = [], 0, 0
    for linear, base in zip(linears, bases, strict=True):
        if base is not linear:
            first, second = linear.lora_A["default"].weight, linear.lora_B["default"].weight
            rank = first.shape[0]
            rows, columns = slice(row, row + base.out_features), slice(column, column + rank)
            factors.append(Factor(first, second, float(linear.scaling["default"]), rows, columns))
            column += rank
        row += base.out_features
    inputs = bases[0].in_features
    multiple = WIDTH[bases[0].weight.device.type]
    stack = Stack(bases, inputs, row, -(-column // multiple) * multiple, factors)
    if type(bases[0]).__name__ == "Linear":
        stack.matrix = _already_stacked(bases, stack)
        if stack.matrix is None:
            stack.matrix = _stacked(bases, stack)
    return stack


def _stacked(bases: Sequence[Any], stack: Stack) -> Tensor:
    """A new matrix of the layers' weights, which become views of it."""
    like = bases[0].weight
    matrix = torch.zeros(stack.outputs, stack.inputs + stack.width, dtype=like.dtype, device=like.device)
    row = 0
    for base in bases:
        view = matrix[row : row + base.out_features, : stack.inputs]
        view.copy_(base.weight.data)
        base.weight.data = view
        row += base.out_features
    return matrix


def _already_stacked(bases: Sequence[Any], stack: Stack) -> Tensor | None:
    """The matrix of which the weights are views already, if another decoder was made of this model."""
    first, width = bases[0].weight.data, stack.inputs + stack.width
    size = first.element_size()
    ends = accumulate((base.out_features * width * size for base in bases), initial=first.untyped_storage().data_ptr())
    views = all(
        base.weight.data_ptr() == place and base.weight.stride() == (width, 1)
        for base, place in zip(bases, ends, strict=False)
    )
    if not views or first.untyped_storage().nbytes() != stack.outputs * width * size:
        return None
    matrix: Tensor = first.as_strided((stack.outputs, width), (width, 1))
    return matrix
