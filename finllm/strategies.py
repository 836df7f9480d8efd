"""Which strategy shares a run among its processes, by the memory that each would need. Imports no torch."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from finllm.choosing import fit
from finllm.errors import RecipeError
from finllm.fitting import Fit, Place, best, setting
from finllm.holding import offloaded_bytes
from finllm.memory import GIB, Estimate
from finllm.recipe import APART, BY_DEEPSPEED, SHARDED, Recipe, Strategy
from finllm.shapes import Shape
from finllm.yamlfile import Spec

PREFERRED: tuple[Strategy, ...] = ("ddp", "zero2", "fsdp")
"""What auto takes the first of that fits: each sends more between the processes than the one before."""
SEVERAL: tuple[Strategy, ...] = ("ddp", "zero2", "fsdp", "zero3")
"""All that several processes can use."""
PlaceOf = Callable[[Strategy, list[str]], Place]
"""The place as it is under a strategy; reasons are added to the list."""


class Considered(Spec):
    """A strategy as it would be."""

    strategy: Strategy
    memory: Estimate | None
    """With the largest micro-batch that fits; None where it cannot be used, or nothing can be told."""
    micro_batch: int = 0
    why_not: str = ""


@dataclass(frozen=True)
class Choice:
    """The strategy of a run, and what follows from it."""

    place: Place
    fit: Fit
    considered: tuple[Considered, ...]


def choose(
    recipe: Recipe, place_of: PlaceOf, *, processes: int, each: int, started: Strategy | None, reasons: list[str]
) -> Choice:
    """The strategy of a run of so many processes; raises RecipeError where none can be used, or not the one asked for.

    `started` is that of processes which something else has started already.
    """
    asked = recipe.distributed.strategy
    if started is not None and asked not in ("auto", started):
        raise RecipeError(
            f"distributed.strategy is {asked}, but the processes were started for {started}; change one of them"
        )
    wanted = started or (asked if asked != "auto" else None)
    if recipe.train is None or (processes == 1 and wanted is None):
        wanted = "single"
    if wanted is not None:
        _refuse(wanted, processes)
    considered = _considered(recipe, place_of, each) if processes > 1 else ()
    strategy = wanted or _first_that_fits(considered)
    why: list[str] = []
    place = place_of(strategy, why)
    chosen = fit(recipe, place, each, why)
    if wanted is None:
        reasons.append(f"strategy {strategy}: {_because(strategy, considered)}")
    reasons += why
    if place.offload and place.shape is not None:
        reasons.append(_offloaded(recipe, place, place.shape, chosen))
    return Choice(place, chosen, considered)


def _offloaded(recipe: Recipe, place: Place, shape: Shape, chosen: Fit) -> str:
    """What goes into main memory, in words; raises RecipeError where that does not hold it."""
    held = place.processes * offloaded_bytes(shape, setting(recipe, place, chosen)) / GIB
    if place.main_gib is not None and held > place.main_gib:
        raise RecipeError(
            f"distributed.offload puts {held:.1f} GiB or more into main memory, which is {place.main_gib:.1f} GiB; use "
            f"more machines, or a larger one{'' if recipe.lora else ', or give lora a rank instead of training all weights'}"
        )
    return f"offload: {held:.1f} GiB or more in main memory, and up to 2.5 times that while a checkpoint is written"


def _refuse(strategy: Strategy, processes: int) -> None:
    if strategy == "single" and processes > 1:
        raise RecipeError(f"distributed.strategy is single, and there are {processes} processes; write auto")
    if strategy == "ddp" and processes == 1:
        raise RecipeError("distributed.strategy is ddp, and there is one process; write auto, or use more GPUs")
    if strategy in BY_DEEPSPEED and not _has_deepspeed():
        raise RecipeError(f"distributed.strategy is {strategy}, which needs DeepSpeed: pip install deepspeed")


def _has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def _considered(recipe: Recipe, place_of: PlaceOf, each: int) -> tuple[Considered, ...]:
    """Every strategy, with the memory that it would need."""
    found = []
    for strategy in SEVERAL:
        why_not = _cannot(recipe, strategy)
        place = None if why_not else place_of(strategy, [])
        if place is None or place.shape is None:
            found.append(
                Considered(strategy=strategy, memory=None, why_not=why_not or "the model's shape is not known")
            )
            continue
        chosen = best(recipe, place, each).chosen
        found.append(Considered(strategy=strategy, memory=chosen.memory, micro_batch=chosen.micro_batch))
    return tuple(found)


def _cannot(recipe: Recipe, strategy: Strategy) -> str:
    """What in the recipe or on this machine excludes a strategy, or nothing."""
    assert recipe.train is not None, "a run without training is not distributed"
    if strategy in SHARDED and recipe.train.optimizer != "adamw":
        return f"train.optimizer is {recipe.train.optimizer}"
    if strategy in SHARDED and recipe.train.hand_written == "on":
        return "train.hand_written is on"
    if strategy in APART and recipe.model.quantization == "int8":
        return "model.quantization is int8"
    if strategy in BY_DEEPSPEED and not _has_deepspeed():
        return "DeepSpeed is not installed here"
    return ""


def _first_that_fits(considered: tuple[Considered, ...]) -> Strategy:
    """By the estimates; ddp where there are none, and what needs least where none fits."""
    known = [one for one in considered if one.memory is not None and one.strategy in PREFERRED]
    for one in known:
        if _fits(one):
            return one.strategy
    return min(known, key=lambda one: one.memory.total if one.memory else 0.0).strategy if known else "ddp"


def _fits(one: Considered) -> bool:
    return one.memory is not None and (one.memory.limit is None or one.memory.total <= one.memory.limit)


def _because(strategy: Strategy, considered: tuple[Considered, ...]) -> str:
    before = PREFERRED[: PREFERRED.index(strategy)]
    if not before:
        return "everything fits into each process"
    by_name = {one.strategy: one for one in considered}
    said = []
    for name in before:
        one = by_name[name]
        said.append(f"{name} would need {one.memory.total:.1f} GiB" if one.memory else f"not {name}, as {one.why_not}")
    return ", ".join(said)
