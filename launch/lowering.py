"""A plan for less memory, after a run has shown that the one before needed too much."""

from dataclasses import replace
from typing import Literal

from finllm import choices
from finllm.fitting import FEWEST_SCORED_TOKENS, FILLED_SHARE, Fit, Place, divisors, measured
from finllm.plan import Plan
from finllm.recipe import Recipe
from finllm.shapes import shape_of

ADVICE = (
    "nothing is left to lower; use a larger GPU or fewer processes, a smaller model, model.quantization=nf4, "
    "or a smaller prompt.max_tokens"
)


def lowered(plan: Plan, stage: Literal["train", "evaluate"]) -> tuple[Plan, str] | None:
    """The same steps in less memory, and in words what has changed; None where nothing is left to give up.

    The global batch stays: half the micro-batch at a time, then gradient checkpointing; half the tokens that are
    scored at a time.
    """
    before = Fit(plan.micro_batch, plan.gradient_checkpointing, plan.dequantize, plan.batch_tokens, plan.memory)
    if stage == "evaluate":
        fewer = max(min(plan.batch_tokens, FEWEST_SCORED_TOKENS), plan.batch_tokens // 2)
        if fewer == plan.batch_tokens:
            return None
        return plan.model_copy(update={"batch_tokens": fewer}), f"scoring batches of {fewer} tokens"
    each = plan.micro_batch * plan.accumulation
    after = _less(plan.recipe, _place(plan), each, before)
    if after is None:
        return None
    changes = {
        "ran_out": True,
        "micro_batch": after.micro_batch,
        "accumulation": each // after.micro_batch,
        "gradient_checkpointing": after.checkpointing,
        "dequantize": after.dequantize,
        "batch_tokens": after.batch_tokens,
        "memory": after.memory,
        "shared_prefix": plan.shared_prefix and choices.shared_prefix(plan.recipe, after.micro_batch, []),
    }
    said = f"micro-batch {after.micro_batch} x {each // after.micro_batch} accumulated"
    if after.checkpointing and not before.checkpointing:
        said += ", gradient checkpointing on"
    if before.dequantize and not after.dequantize:
        said += ", weights kept in 4 bits"
    said += f" (the steps are the same), scoring batches of {after.batch_tokens} tokens"
    return plan.model_copy(update={**changes, "reasons": (*plan.reasons, f"out of memory before: {said}")}), said


def _less(recipe: Recipe, place: Place, each: int, before: Fit) -> Fit | None:
    """What needs less memory than a choice that ran out of it; None where nothing is left to give up."""
    batch_tokens = max(FEWEST_SCORED_TOKENS, before.batch_tokens // 2)
    batch_tokens = min(batch_tokens, before.batch_tokens)
    if before.micro_batch > 1:
        size = next(size for size in divisors(each) if size <= before.micro_batch // 2)
        choice = replace(before, micro_batch=size, batch_tokens=batch_tokens)
    elif recipe.train is not None and not before.checkpointing:
        packed = before.dequantize and place.device == "cpu"
        choice = replace(before, checkpointing=True, dequantize=packed, batch_tokens=batch_tokens)
    elif batch_tokens < before.batch_tokens:
        choice = replace(before, batch_tokens=batch_tokens)
    else:
        return None
    return choice if place.shape is None else measured(recipe, place, choice)


def _place(plan: Plan) -> Place:
    limit = plan.memory.limit if plan.memory else None
    shared_by = plan.processes if plan.device == "cpu" else 1
    return Place(
        device=plan.device,
        name=plan.gpu,
        dtype=plan.dtype,
        processes=plan.processes,
        strategy=plan.strategy,
        offload=plan.recipe.distributed.offload,
        memory_gib=None if limit is None else limit * shared_by / FILLED_SHARE,
        shape=shape_of(plan.recipe.model) if plan.memory else None,
        texts=plan.texts,
        scored_texts=max(plan.rows.validation, plan.rows.test) if plan.rows else None,
        hand_written=plan.hand_written,
    )
