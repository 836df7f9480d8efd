"""How fast a run will be, worked out from its arithmetic and from what its GPUs send each other. Imports no torch.

docs/scaling.md says where the figures come from, and which of them were measured.
"""

from dataclasses import dataclass
from typing import Literal

from finllm.figures import duration, three
from finllm.fitting import Fit, Place, setting
from finllm.holding import Setting, gathered_bytes, lora_parameters
from finllm.lengths import ANSWER, instruction_tokens
from finllm.recipe import Recipe
from finllm.shapes import Shape
from finllm.yamlfile import Spec

BY_HAND = 0.50
"""Of a GPU's peak, what the hand-written passes reach: 465 examples/s of a 7B shape on an H200 (h200_sft.json)."""
BY_MODEL = 0.23
"""Of a GPU's peak, what a model's own passes reach on streams: 215 examples/s there, with a prototype of them."""
STARTING = {"zero2": 0.0076, "fsdp": 0.0111, "zero3": 0.0201}
"""Seconds for a decoder layer and pass, forward and back, that no smaller model or batch undercuts, as the processor takes
them to start the kernels and collectives: measured on two H200s with a 7B shape (h200x2.json)."""
AGAIN = 1.75
"""Times that, where layers are computed again: under zero3, of 4-bit weights (h200x2.json)."""
UNPACKING = 0.0244
"""Seconds for a layer and pass that a model's own passes through 4-bit weights do not undercut, computed again: the same under
zero2 and fsdp (h200x2.json), so presumably in bitsandbytes' layers."""
WIRE_SHARE = 0.8
"""Of a wire's peak, what collectives reach: assumed."""


@dataclass(frozen=True)
class Chip:
    """Figures of a kind of GPU by its vendor's datasheet."""

    tflops: float
    """Dense bf16, 10^12 operations a second."""
    link: float
    """GB/s to the other GPUs of its machine, in one direction: NVLink, or PCIe 4.0 with 16 lanes."""


CHIPS = {
    "A100": Chip(312, 300), "H100": Chip(989, 450), "H200": Chip(989, 450), "L4": Chip(121, 32), "A10": Chip(125, 32),
    "4090": Chip(165, 32),
}  # fmt: skip
"""By a part of the name that the driver gives them."""
Bound = Literal["arithmetic", "starting kernels", "links between GPUs", "network between nodes"]


class Pace(Spec):
    """A step of training as it is expected, without validation and checkpoints."""

    examples_per_s: float
    """Of all processes."""
    step_seconds: float
    arithmetic_seconds: float
    traffic_gb: float
    """What one process receives from the others in a step, 10^9 bytes."""
    traffic_seconds: float
    bound: Bound
    """What takes the most time."""


@dataclass(frozen=True)
class Work:
    """What one process does in a step."""

    passes: int
    rows: int
    """Examples in a pass."""
    begin: float
    """Tokens of the instruction."""
    own: float
    """Tokens of an example behind it, on average, with its answer."""
    shares: bool
    """The instruction is computed once for a pass."""

    @property
    def tokens(self) -> float:
        """Of the step."""
        return self.passes * (self.begin * (1 if self.shares else self.rows) + self.rows * self.own)


def of(
    recipe: Recipe, place: Place, chosen: Fit, each: int, *, shares: bool, nodes: int, network_gbit: float | None
) -> Pace | None:
    """How fast labels are learnt, where the texts are at hand; pairs and explanations are not reckoned."""
    if recipe.train is None or recipe.train.method != "sft" or recipe.explanations or not (place.shape and place.texts):
        return None
    own = min(place.texts.mean, recipe.prompt.max_tokens) + ANSWER - shares  # the end is no input of a stream
    work = Work(each // chosen.micro_batch, chosen.micro_batch, instruction_tokens(recipe.prompt), own, shares)
    how = setting(recipe, place, chosen)
    return expected(place.shape, how, work, gpu=place.name, nodes=nodes, network_gbit=network_gbit)


def expected(
    shape: Shape, how: Setting, work: Work, *, gpu: str, nodes: int, network_gbit: float | None
) -> Pace | None:
    """The pace on `gpu`; None where its kind is not known, or how fast the nodes' network is (10^9 bits a second).

    Nor is one expected of steps that the host takes, `offload`: its memory and processors decide.
    """
    chip = next((chip for part, chip in CHIPS.items() if part in gpu), None)
    if chip is None or how.dtype != "bf16" or how.offload or (nodes > 1 and network_gbit is None):
        return None
    arithmetic = operations(shape, how, work) / (chip.tflops * 1e12 * (BY_HAND if how.hand_written else BY_MODEL))
    received = traffic(shape, how, work.passes)
    local, across = how.processes // nodes, nodes
    starting = (AGAIN if how.checkpointing else 1.0) * STARTING.get(how.strategy, 0.0)
    if how.four_bit and not how.hand_written:
        starting = max(starting, UNPACKING)
    times: dict[Bound, float] = {
        "arithmetic": arithmetic,
        "starting kernels": starting * shape.layers * work.passes,
        "links between GPUs": received * (local - 1) / local / (chip.link * 1e9 * WIRE_SHARE),
        "network between nodes": received * (across - 1) / across / ((network_gbit or 1) * 1e9 / 8 * WIRE_SHARE),
    }
    wires = max(times["links between GPUs"], times["network between nodes"])
    # The hand-written passes add their gradients up when they are done; autograd and FSDP while they compute.
    seconds = arithmetic + wires if how.hand_written else max(times.values())
    return Pace(
        examples_per_s=how.processes * work.passes * work.rows / seconds,
        step_seconds=seconds,
        arithmetic_seconds=arithmetic,
        traffic_gb=received * (how.processes - 1) / how.processes / 1e9,
        traffic_seconds=wires,
        bound=max(times, key=lambda name: times[name]),
    )


def operations(shape: Shape, how: Setting, work: Work) -> float:
    """Floating-point operations of a process in a step: 2 for a weight and token forward, as many for each gradient."""
    adapters = 0 if how.lora is None else lora_parameters(shape, how.lora)
    times = (4 if how.lora else 6) + (2 if how.checkpointing else 0)
    head = shape.hidden * shape.vocabulary * work.passes * work.rows * ANSWER
    return work.tokens * (times * shape.linear_parameters + 6 * adapters) + (4 if how.lora else 6) * head


def traffic(shape: Shape, how: Setting, passes: int) -> float:
    """Bytes that a ring of very many processes brings to each in a step; of n processes, (n - 1) / n of them."""
    if how.processes == 1:
        return 0.0
    trained = shape.parameters if how.lora is None else lora_parameters(shape, how.lora)
    if how.strategy == "ddp":  # an all-reduce of fp32 gradients passes them on twice
        return 2 * 4.0 * trained
    if how.strategy == "zero2":  # gradients of each pass to their owners, and the new weights back
        return float(how.size * trained * (passes + 1))
    return passes * (2 * gathered_bytes(shape, how) + how.size * trained)  # weights for both directions


def described(pace: Pace, steps: int | None) -> str:
    """The pace in one line: `about 877 examples/s: 73 ms a step, 0.168 GB from other GPUs in 0.47 ms; bound by arithmetic`."""
    whole = "" if steps is None else f"; {duration(steps * pace.step_seconds)} for all steps"
    wires = (
        f", {three(pace.traffic_gb)} GB from other GPUs in {duration(pace.traffic_seconds)}" if pace.traffic_gb else ""
    )
    return (
        f"about {three(pace.examples_per_s)} examples/s: {duration(pace.step_seconds)} a step{wires}; "
        f"bound by {pace.bound}{whole}"
    )
