"""Whether rows may share their common tokens on a model: asked of the model itself, once, before training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from finllm import scoring, shared_prefix
from finllm.errors import RunError
from finllm.plan import Plan
from finllm.shared_prefix import IGNORED
from finllm.training.batches import Row, pad, stream

SHORTEST = 8
"""Tokens; to share fewer is not worth a stream."""
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}
"""Relative difference of hidden states; SmolLM2 has 8e-7 and 0.014, and 0.12 to 0.34 with a wrong mask or position."""
ROUNDINGS = 4
"""Times that rounding may be: of bf16 it is larger in deeper models (0.05 in 32 layers of random weights), of which
streams are off by 1 to 2 times the difference between padded rows and rows alone; a wrong position by 15 to 60 times."""
ASKED = frozenset({"llama", "mistral", "qwen2", "gemma3_text"})
"""Types of models whose streams tests/test_shared_prefix.py compares with separate rows."""
MULTIPLE = {"cpu": 1, "cuda": 64}
"""Tokens of a stream are a multiple of this: on a GPU, few lengths serve its memory and its kernels."""


def collate(
    model: Any, rows: Sequence[Any], plan: Plan, *, is_main: bool, make: Callable[..., dict[str, Any]] = stream
) -> Callable[[Sequence[Any]], dict[str, Any]] | None:
    """`make` with the right sizes, or None where padded rows are right; raises RunError if the recipe forbids those."""
    if not plan.shared_prefix:
        return None
    why = unsupported(model, rows, plan.dtype, asks=not plan.loads_on_host)
    if why is None:
        return partial(make, multiple=MULTIPLE[plan.device])
    assert plan.recipe.train is not None, plan.name
    if plan.recipe.train.shared_prefix == "on":
        raise RunError(f"train.shared_prefix is on, but {why}; write auto")
    if is_main:
        print(f"shared prefix off: {why}", flush=True)
    return None


def unsupported(model: Any, rows: Sequence[Row], dtype: str, *, asks: bool = True) -> str | None:
    """Why these rows cannot share their common tokens on this model, or None.

    Where a pass would take minutes, the model is not asked; its type must be one that tests have asked.
    """
    shared = shared_prefix.shared_length([row.prompt for row in rows])
    if shared < SHORTEST:
        return f"the prompts have only {shared} tokens in common at their beginning, and {SHORTEST} are needed"
    if not asks:
        kind = scoring.base_of(model).config.get_text_config().model_type
        return None if kind in ASKED else f"models of type {kind} were never asked, and this one is too large to be"
    two = [Row(row.index, row.prompt, row.answer) for row in rows[:2]]
    try:
        error = difference(model, two, dtype)
    except (RunError, TypeError, ValueError) as problem:
        return str(problem)
    if error <= TOLERANCE[dtype] or error <= ROUNDINGS * rounding(model, two, dtype):
        return None
    return f"the model computes something else on a stream than on separate rows (relative difference {error:.1e})"


def difference(model: Any, rows: Sequence[Row], dtype: str) -> float:
    """Relative difference of the hidden states that predict answers, between a stream and padded rows.

    The model is as in training, so that dropout anywhere shows.
    """
    with _in_training(model):
        separate = _predicting(model, pad(rows), dtype)
        with shared_prefix.attending(model):
            together = _predicting(model, stream(rows), dtype)
    return _apart(together, separate)


def rounding(model: Any, rows: Sequence[Row], dtype: str) -> float:
    """The same between padded rows and each row alone, which should be the same: what the arithmetic leaves open.

    Dropout is off, since it would excuse any difference.
    """
    with _in_training(model, dropout=False):
        padded = _predicting(model, pad(rows), dtype)
        alone = torch.cat([_predicting(model, pad([row]), dtype) for row in rows])
    return _apart(alone, padded)


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@contextmanager
def _in_training(model: Any, *, dropout: bool = True) -> Iterator[None]:
    training = model.training
    model.train(dropout)
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _predicting(model: Any, batch: dict[str, Any], dtype: str) -> torch.Tensor:
    """Hidden states (answer tokens, size) from which the answers' tokens are predicted."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = base.device
    predicting = (batch["labels"][:, 1:] != IGNORED).to(device)
    inputs = {name: _moved(value, device) for name, value in batch.items() if name not in {"labels", "meta"}}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16"):
        hidden: torch.Tensor = base.get_decoder()(**inputs, use_cache=False).last_hidden_state
    return hidden[:, :-1][predicting].float()


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _moved(inner, device) for name, inner in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value
