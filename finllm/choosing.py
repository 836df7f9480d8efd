"""The way that a run is made to fit, and why, in words. Imports no torch."""

from collections.abc import Sequence
from dataclasses import replace

from finllm.errors import RecipeError
from finllm.fitting import LARGEST_ON_CPU, Fit, Place, best, divisors, measured, sizes
from finllm.recipe import APART, FOUR_BIT, Recipe

LARGEST_UNKNOWN = 16
"""Examples in a micro-batch where the memory that they need is not known."""


def fit(recipe: Recipe, place: Place, each: int, reasons: list[str]) -> Fit:
    """What a process uses for its `each` examples of a step; raises RecipeError where not even one fits on the GPU."""
    if place.shape is None:
        return _by_rule(recipe, place, each, reasons)
    found = best(recipe, place, each)
    if not found.chosen.fits:
        said = _too_large(recipe, place, found.chosen)
        if place.device == "cuda":
            raise RecipeError(said)
        reasons.append(said)
    _explain(recipe, place, each, found.chosen, found.ways, reasons)
    return found.chosen


def _by_rule(recipe: Recipe, place: Place, each: int, reasons: list[str]) -> Fit:
    """Without the model's shape: a moderate micro-batch, and checkpointing for quantised models on a GPU."""
    reasons.append(f"memory not estimated: the shape of {recipe.model.name} is not known before it is loaded")
    four_bit = recipe.model.quantization in FOUR_BIT
    unpacked = four_bit and place.device == "cpu"
    if unpacked:
        reasons.append("4-bit weights dequantised once: the CPU would do it in every pass")
    if recipe.train is None:
        return Fit(1, checkpointing=False, dequantize=unpacked, batch_tokens=recipe.evaluation.batch_tokens)
    asked, checkpointing = recipe.train.micro_batch, recipe.train.gradient_checkpointing
    micro = next(size for size in divisors(each) if size <= LARGEST_UNKNOWN) if asked == "auto" else asked
    if asked == "auto":
        reasons.append(f"micro-batch {micro}: the largest divisor of {each} up to {LARGEST_UNKNOWN}")
    if checkpointing == "auto":
        checkpointing = place.device == "cuda" and recipe.model.quantization != "none"
        reasons.append(f"gradient checkpointing {'on: quantised model on a GPU' if checkpointing else 'off'}")
    return Fit(micro, checkpointing, unpacked, recipe.evaluation.batch_tokens)


def _explain(recipe: Recipe, place: Place, each: int, chosen: Fit, ways: Sequence[Fit], reasons: list[str]) -> None:
    if place.texts is None:
        reasons.append(f"texts not at hand: memory is for prompts of {recipe.prompt.max_tokens} tokens")
    if recipe.train is not None and recipe.train.micro_batch == "auto":
        reasons.append(f"micro-batch {chosen.micro_batch}: {_why_this_size(recipe, place, each, chosen)}")
    if recipe.train is not None and recipe.train.gradient_checkpointing == "auto":
        reasons.append(f"gradient checkpointing {_why_checkpointing(chosen, ways)}")
    if recipe.model.quantization in FOUR_BIT:
        reasons.append(_why_this_form(place, chosen, ways))
    if chosen.batch_tokens < recipe.evaluation.batch_tokens:
        reasons.append(f"scoring batches of {chosen.batch_tokens} tokens: more would not fit")


def _why_this_size(recipe: Recipe, place: Place, each: int, chosen: Fit) -> str:
    larger = [size for size in sizes(recipe, place, each) if size > chosen.micro_batch]
    if not larger:
        return (
            "all of a step" if chosen.micro_batch == each else f"the largest divisor of {each} up to {LARGEST_ON_CPU}"
        )
    more = measured(recipe, place, replace(chosen, micro_batch=larger[-1]))
    assert more.memory is not None, "the caller has asked"
    return f"{larger[-1]} would need {more.memory.total:.1f} GiB"


def _why_checkpointing(chosen: Fit, ways: Sequence[Fit]) -> str:
    if not chosen.checkpointing:
        return "off: activations fit"
    best = max((way for way in ways if not way.checkpointing), key=lambda way: (way.fits, way.micro_batch))
    if best.fits:
        return f"on: without it, not more than micro-batch {best.micro_batch} fits"
    assert best.memory is not None, "only an estimate can be too large"
    return f"on: without it, micro-batch {best.micro_batch} needs {best.memory.total:.1f} GiB"


def _why_this_form(place: Place, chosen: Fit, ways: Sequence[Fit]) -> str:
    if chosen.dequantize and place.device == "cpu":
        return "4-bit weights dequantised once: the CPU would do it in every pass"
    if chosen.dequantize:
        return "4-bit weights dequantised once: the same values, and they fit"
    others = [way for way in ways if way.dequantize and way.memory is not None]
    if not others or others[0].memory is None:
        return "4-bit weights unpacked in every pass"
    one = others[0]
    needs = f"dequantised they need {others[0].memory.total:.1f} GiB at micro-batch {one.micro_batch}"
    return f"4-bit weights unpacked in every pass: {needs}"


def _too_large(recipe: Recipe, place: Place, smallest: Fit) -> str:
    """Why a recipe does not fit, in numbers, and what would."""
    memory = smallest.memory
    assert memory is not None
    assert memory.limit is not None, "without a limit, everything fits"
    terms = f"weights {memory.weights:.1f}, trained {memory.trained:.1f}, activations {memory.activations:.1f}, other {memory.other:.1f}"
    what = f"training with micro-batch {smallest.micro_batch}" if recipe.train else "scoring"
    return (
        f"{what} needs about {memory.total:.1f} GiB in each process ({terms}), and of the {place.memory_gib:.1f} GiB of "
        f"{place.name or 'this machine'} it may fill {memory.limit:.1f}; {_advice(recipe, place, smallest)}"
    )


def _advice(recipe: Recipe, place: Place, smallest: Fit) -> str:
    larger = "a larger GPU" if place.device == "cuda" else "a machine with more memory"
    changes = []
    if recipe.train is not None and recipe.lora is None:
        changes.append("give lora a rank instead of training all weights")
    elif recipe.model.quantization != "nf4":
        changes.append("set model.quantization to nf4")
    if recipe.train is not None and smallest.micro_batch > 1:
        changes.append("set train.micro_batch to auto")
    if recipe.train is not None and recipe.train.gradient_checkpointing is False:
        changes.append("set train.gradient_checkpointing to auto")
    if recipe.train is not None and place.processes > 1 and not place.offload:
        shared = "set distributed.offload to true" if place.strategy in APART else "set distributed.strategy to fsdp"
        changes.append(shared)
    return ", or ".join([*changes, f"lower prompt.max_tokens ({recipe.prompt.max_tokens})", f"use {larger}"])
