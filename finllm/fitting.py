"""What fits: micro-batch, checkpointing and the form of 4-bit weights, chosen by the memory they need. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from finllm import choices
from finllm.holding import Setting, loading_bytes
from finllm.lengths import Batch, Lengths, instruction_tokens, largest_batch
from finllm.memory import GIB, HAND_WRITTEN_KINDS, Estimate, estimate, scored_by_hand
from finllm.recipe import APART, FOUR_BIT, Recipe, Strategy
from finllm.shapes import Shape

FILLED_SHARE = 0.9
"""Of the memory, the most that an estimate may fill."""
ENOUGH_ROWS = 8
"""Examples in a micro-batch from which on arithmetic, and not starting it, takes the time; below, the form of weights
that leaves room for more examples is faster than the one that computes less."""
LARGEST_ON_CPU = 16
"""Examples in a micro-batch on a CPU: more make its caches no faster."""
FEWEST_SCORED_TOKENS = 1024
MOST_BY_HAND = 8192
"""Tokens in a scoring pass of the hand-written passes: MOST_TOKENS of finllm.fast.engine, which needs torch."""
MULTIPLE = {"cpu": 1, "cuda": 64}
"""Tokens of a stream are a multiple of this, as in finllm.training.sharing."""


@dataclass(frozen=True)
class Place:
    """Where a run shall fit."""

    device: Literal["cuda", "cpu"]
    name: str
    dtype: Literal["bf16", "fp32"]
    processes: int
    strategy: Strategy
    offload: bool
    memory_gib: float | None
    """Of one GPU, or of the machine; None where it is not known."""
    shape: Shape | None
    texts: Lengths | None
    scored_texts: int | None
    """Texts in the larger of the scored parts; None where they are not counted."""
    hand_written: bool
    main_gib: float | None = None
    """Main memory that all processes share; None where it is not known."""

    @property
    def limit(self) -> float | None:
        """GiB that one process may fill."""
        if self.memory_gib is None:
            return None
        return FILLED_SHARE * self.memory_gib / (1 if self.device == "cuda" else self.processes)


@dataclass(frozen=True)
class Fit:
    """How a run is made to fit."""

    micro_batch: int
    checkpointing: bool
    dequantize: bool
    batch_tokens: int
    """Tokens in a scoring batch."""
    memory: Estimate | None = None

    @property
    def fits(self) -> bool:
        """Whether the estimate is within what may be filled, where both are known."""
        return self.memory is None or self.memory.limit is None or self.memory.total <= self.memory.limit


@dataclass(frozen=True)
class Found:
    """The way that suits a place best, and the others that were considered."""

    chosen: Fit
    ways: tuple[Fit, ...]


def best(recipe: Recipe, place: Place, each: int) -> Found:
    """What a process does best with its `each` examples of a step; the model's shape is known. It need not fit."""
    ways = tuple(_largest_in(recipe, place, each, way) for way in _ways(recipe, place))
    enough = min(ENOUGH_ROWS, each)
    chosen = next((way for way in ways if way.fits and way.micro_batch >= enough), None)
    if chosen is None:  # the first of those that hold the most
        chosen = max(ways, key=lambda way: (way.fits, way.micro_batch))
    if not chosen.fits:
        chosen = min(ways, key=lambda way: way.memory.total if way.memory else 0.0)
    return Found(chosen, ways)


def measured(recipe: Recipe, place: Place, choice: Fit) -> Fit:
    """The choice with its estimate, scoring batches halved until they fit."""
    assert place.shape is not None, "the caller has asked"
    while True:
        batch = None
        if recipe.train is not None:
            shares = place.hand_written or choices.shared_prefix(recipe, choice.micro_batch, [])
            batch = largest_batch(
                recipe.prompt, place.texts, rows=choice.micro_batch * _sequences(recipe, shares=shares), shares=shares, epochs=recipe.train.epochs,
                multiple=MULTIPLE[place.device] if shares else 1, explained=recipe.explanations,
            )  # fmt: skip
        how = setting(recipe, place, choice)
        most = MOST_BY_HAND if scored_by_hand(place.shape, how) else choice.batch_tokens
        scored = _scored(recipe, place, min(choice.batch_tokens, most))
        found = replace(choice, memory=estimate(place.shape, how, batch, scored, place.limit))
        alone = replace(choice, memory=estimate(place.shape, how, None, scored, place.limit))
        if alone.fits or choice.batch_tokens < 2 * FEWEST_SCORED_TOKENS:
            return found
        choice = replace(choice, batch_tokens=choice.batch_tokens // 2)


def _sequences(recipe: Recipe, *, shares: bool) -> int:
    """Rows of a batch to one of the recipe: a pair of answers is two, unless both hang on one prompt."""
    return 1 if shares or recipe.train is None or recipe.train.method == "sft" else 2


def divisors(number: int) -> list[int]:
    """From the number itself down to 1."""
    return [size for size in range(number, 0, -1) if number % size == 0]


def _ways(recipe: Recipe, place: Place) -> Iterator[tuple[bool, bool]]:
    """(dequantise, checkpointing), the fastest first, of what the recipe leaves open."""
    four_bit = recipe.model.quantization in FOUR_BIT
    if recipe.train is None:
        yield from [(True, False), (False, False)] if four_bit else [(False, False)]
        return
    asked = recipe.train.gradient_checkpointing
    if not four_bit:
        ways = [(False, False), (False, True)]
    elif place.device == "cpu":  # a CPU takes longer to unpack weights than to compute activations again
        ways = [(True, False), (True, True), (False, True)]
        if place.strategy in APART:  # bitsandbytes' CPU kernels misread 4-bit weights that can be divided
            ways.pop()
    elif asked is True:  # who asks for little memory does not want its weights in 16 bits
        ways = [(False, True)]
    else:
        ways = [(True, False), (False, False), (False, True)]
    yield from (way for way in ways if asked in ("auto", way[1]))


def _largest_in(recipe: Recipe, place: Place, each: int, way: tuple[bool, bool]) -> Fit:
    """The largest micro-batch that fits in this way; the smallest where none does."""
    dequantize, checkpointing = way
    found = None
    for size in sizes(recipe, place, each):
        found = measured(recipe, place, Fit(size, checkpointing, dequantize, recipe.evaluation.batch_tokens))
        if found.fits:
            return found
    assert found is not None, f"{each} has a divisor"
    return found


def sizes(recipe: Recipe, place: Place, each: int) -> Sequence[int]:
    """Micro-batches that may be tried, the largest first."""
    if recipe.train is None:
        return [1]
    if recipe.train.micro_batch != "auto":
        return [recipe.train.micro_batch]
    return [size for size in divisors(each) if place.device == "cuda" or size <= LARGEST_ON_CPU]


def too_large_to_load(recipe: Recipe, place: Place, choice: Fit) -> bool:
    """Whether a GPU that shall hold a part of the weights has no room for all of them."""
    if place.strategy not in APART or place.shape is None or place.limit is None or place.device == "cpu":
        return False
    return loading_bytes(place.shape, setting(recipe, place, choice)) > place.limit * GIB


def setting(recipe: Recipe, place: Place, choice: Fit) -> Setting:
    """How a process holds and trains the model."""
    by_hand = place.hand_written and place.shape is not None and place.shape.kind in HAND_WRITTEN_KINDS
    return Setting(
        device=place.device,
        dtype=place.dtype,
        quantization=recipe.model.quantization,
        double_quantization=recipe.model.double_quantization,
        dequantize=choice.dequantize,
        trains=recipe.train is not None,
        lora=recipe.lora,
        optimizer=recipe.train.optimizer if recipe.train else "adamw",
        processes=place.processes,
        strategy=place.strategy,
        offload=place.offload,
        accumulates=recipe.train is not None and recipe.train.global_batch > choice.micro_batch * place.processes,
        checkpointing=choice.checkpointing,
        hand_written=by_hand,
    )


def _scored(recipe: Recipe, place: Place, batch_tokens: int) -> Batch:
    """A full scoring batch, or all texts where they are fewer; they are of about equal length, and share the prefix."""
    begin = instruction_tokens(recipe.prompt)
    one = max(1, recipe.prompt.max_tokens - begin) if place.texts is None else round(place.texts.mean) + 1
    rows = max(1, batch_tokens // one)
    if place.scored_texts is not None:
        rows = max(1, min(rows, place.scored_texts))
    return Batch(rows=rows, longest=one, shared=begin, tokens=begin + rows * one)
