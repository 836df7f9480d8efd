"""The last layer on the places that are read: nothing after it looks at the others, except as keys and values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

QUERIES = ("q_proj", "o_proj")


@contextmanager
def only(model: Any, places: Tensor) -> Iterator[None]:
    """While open, the model's last layer computes its hidden states at these places alone; elsewhere they mean nothing.

    `places` counts through a batch (rows x tokens) as if it were one row. A model is left as it is where its layers have
    other names, or compute their activations again in the backward pass, when this is closed.
    """
    hooks = []
    for module in _of_one_place(model) if places.numel() else []:
        reading = _Reading(places)
        hooks += [module.register_forward_pre_hook(reading.take), module.register_forward_hook(reading.put)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _of_one_place(model: Any) -> list[Any]:
    """Modules of the last layer whose output at a place depends on their input at that place alone, and on no other."""
    model = getattr(model, "module", model)  # of DistributedDataParallel
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = getattr(base.get_decoder(), "layers", None)
    if not layers or (layers[-1].training and getattr(layers[-1], "gradient_checkpointing", False)):
        return []
    attention, feed_forward = getattr(layers[-1], "self_attn", None), getattr(layers[-1], "mlp", None)
    found = [getattr(attention, name) for name in QUERIES if hasattr(attention, name)]
    return [*found, feed_forward] if hasattr(feed_forward, "down_proj") else found  # a mixture of experts has none


class _Reading:
    """Hooks that take the places out of a module's input, and put its output back among zeros."""

    def __init__(self, places: Tensor) -> None:
        self._places = places
        self._shape: tuple[int, ...] = ()

    def take(self, _module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(rows, tokens, size) -> (1, places, size)."""
        self._shape = tuple(inputs[0].shape[:-1])
        return (inputs[0].flatten(0, 1).index_select(0, self._places)[None], *inputs[1:])

    def put(self, _module: Any, _inputs: Any, output: Tensor) -> Tensor:
        """(1, places, size) -> (rows, tokens, size)."""
        rows, tokens = self._shape
        whole = output.new_zeros(rows * tokens, output.shape[-1]).index_copy(0, self._places, output[0])
        return whole.reshape(rows, tokens, -1)
