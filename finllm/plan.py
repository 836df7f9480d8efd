"""The plan: what will happen, decided from recipe and machine before anything starts. Imports no torch."""

import math
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from finllm import choices, machine, pace, strategies
from finllm.distributed import ACCELERATE, accelerate_yaml, deepspeed_config
from finllm.errors import RecipeError
from finllm.files import read_model, write_json, write_text
from finllm.fitting import Place, too_large_to_load
from finllm.lengths import Lengths
from finllm.machine import Machine
from finllm.memory import Estimate
from finllm.methods import Training
from finllm.pace import Pace
from finllm.provenance import commit, versions
from finllm.recipe import BY_DEEPSPEED, Recipe, Strategy, recipe_yaml
from finllm.run import Run
from finllm.shapes import shape_of
from finllm.strategies import Choice, Considered
from finllm.yamlfile import Spec


class Rows(Spec):
    """Number of examples in each part."""

    train: int
    validation: int
    test: int


class Plan(Spec):
    """Everything that the worker needs to know; the worker reads nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    recipe: Recipe
    source: str
    """Path of the recipe as it was given."""
    overrides: tuple[str, ...]
    device: Literal["cuda", "cpu"]
    gpu: str
    """Kind of GPU, or empty."""
    nodes: int = 1
    """Machines that train together."""
    processes: int
    """Over all nodes; one for each GPU."""
    strategy: Strategy
    """How they share what is held and trained."""
    evaluators: int = 1
    """Processes that share the evaluation, on one machine; each holds the whole model."""
    dtype: Literal["bf16", "fp32"]
    micro_batch: int
    """Examples in one forward pass of one process."""
    accumulation: int
    """Forward passes to one optimizer step."""
    gradient_checkpointing: bool
    dequantize: bool
    """Hold 4-bit weights in `dtype`: the same values, dequantised once instead of in every pass."""
    shared_prefix: bool
    """Compute what all prompts begin with once for a micro-batch, where the model can."""
    hand_written: bool
    """Use our own forward and backward passes (finllm.fast), where they know the model's layers."""
    batch_tokens: int
    """Tokens in one scoring batch: the recipe's, or fewer where those would not fit."""
    loads_on_host: bool = False
    """Weights are read into the host's memory before they are shared out, since no GPU holds them whole."""
    ran_out: bool = False
    """It was made after one before it had run out of memory."""
    memory: Estimate | None
    """None where the model's shape is not known before it is loaded."""
    layer_parameters: int | None
    """Weights of the linear layers of one block; None where the model's shape is not known."""
    considered: tuple[Considered, ...] = ()
    """Every strategy that several processes could use, with the memory that it would need."""
    pace: Pace | None = None
    """None where the kind of GPU is not known, or what connects the nodes."""
    texts: Lengths | None
    """Of the training texts; None where they are not at hand."""
    rows: Rows | None
    """None where counting the rows would need a download."""
    steps: int | None
    """Optimizer steps of the whole run."""
    reasons: tuple[str, ...]
    """Why, for each choice that the recipe left open."""
    commands: dict[str, tuple[str, ...]]
    created: str
    commit: str
    """Git commit of the code, with `+changes` where the checkout differs from it."""
    versions: dict[str, str] = Field(default_factory=dict)

    def save(self, run: Run) -> None:
        """Fill a new run folder: the plan, the resolved recipe, Accelerate's configuration."""
        write_text(run.recipe, recipe_yaml(self.recipe))
        write_text(run.accelerate, accelerate_yaml(self, run))
        if self.strategy in BY_DEEPSPEED:
            write_json(run.deepspeed, deepspeed_config(self))
        if self.evaluators > 1:
            write_text(run.accelerate_evaluation, accelerate_yaml(self._of_evaluation, run))
        write_json(run.plan, self.model_dump(mode="json"))

    def evaluated_by(self, processes: int, run: Run) -> "Plan":
        """The plan with so many processes for the evaluation."""
        commands = _commands(self.recipe, run.folder, self.commands["evaluate"][0], processes)
        return self.model_copy(update={"evaluators": processes, "commands": commands})

    @property
    def _of_evaluation(self) -> "Plan":
        """The plan as Accelerate starts the evaluation."""
        return self.model_copy(update={"strategy": "ddp", "processes": self.evaluators, "nodes": 1})

    @classmethod
    def of(cls, run: Run) -> "Plan":
        """The plan of a run folder."""
        return read_model(run.plan, cls)


def decide(
    recipe: Recipe,
    *,
    here: Machine,
    rows: Rows | None,
    folder: Path,
    source: str,
    overrides: tuple[str, ...] = (),
    processes: int | None = None,
    started: Strategy | None = None,
    texts: Lengths | None = None,
    nodes: int = 1,
    network_gbit: float | None = None,
    python: str = sys.executable,
) -> Plan:
    """What will happen when `recipe` runs on `here`, or on `nodes` machines like it; raises RecipeError where it cannot.

    The main memory of `here` is that of all nodes, `python` the interpreter there. `processes` and `started`, their
    strategy, are given where something else has already started them, `texts` where the training texts are at hand.
    """
    here, gpus = _machine(recipe, here)
    count, evaluators = _count(recipe, gpus, nodes, processes), _evaluators(recipe, gpus, processes)
    nodes = nodes if count > 1 else 1
    reasons: list[str] = []
    dtype = _dtype(recipe, here, gpus, reasons)
    _refuse(recipe, gpus)
    each = _each(recipe, count)

    def place_of(strategy: Strategy, why: list[str]) -> Place:
        """What the run must fit into; of several GPUs, the smallest counts."""
        return Place(
            device="cuda" if gpus else "cpu",
            name=here.gpus[0].name if gpus else "",
            dtype=dtype,
            processes=count,
            strategy=strategy,
            offload=recipe.distributed.offload,
            memory_gib=min(gpu.memory_gib for gpu in here.gpus[:gpus]) if gpus else here.memory_gib,
            shape=shape_of(recipe.model),
            texts=texts,
            main_gib=here.memory_gib if processes is None else None,  # of processes on other machines, not theirs
            scored_texts=max(rows.validation, rows.test) if rows else None,
            hand_written=choices.hand_written(recipe, here, gpus, strategy, dtype, why),
        )

    choice = strategies.choose(recipe, place_of, processes=count, each=each, started=started, reasons=reasons)
    given = {"recipe": recipe, "source": source, "overrides": overrides, "texts": texts, "rows": rows}
    return Plan(
        name=folder.name,
        **given,
        **_computed(recipe, choice, each, nodes, network_gbit, reasons),
        nodes=nodes,
        evaluators=evaluators,
        steps=steps_of(recipe.train, rows.train) if recipe.train and rows else None,
        reasons=tuple(reasons),
        commands=_commands(recipe, folder, python, evaluators),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        versions=versions(),
    )


def _machine(recipe: Recipe, here: Machine) -> tuple[Machine, int]:
    """The machine to plan for, and how many of its GPUs are used."""
    asked = recipe.resources
    here = here if asked.gpu is None else machine.imagined(asked.gpu, 1 if asked.gpus == "auto" else asked.gpus)
    gpus = len(here.gpus) if asked.gpus == "auto" else asked.gpus
    if gpus > len(here.gpus):
        raise RecipeError(f"resources.gpus is {gpus}, but {len(here.gpus)} can be seen here; write auto, or fewer")
    return here, gpus


def _computed(
    recipe: Recipe, choice: Choice, each: int, nodes: int, network_gbit: float | None, reasons: list[str]
) -> dict[str, Any]:
    """How a process computes its `each` examples of a step."""
    place, chosen = choice.place, choice.fit
    shares = choices.shared_prefix(recipe, chosen.micro_batch, reasons)
    return {
        "device": place.device,
        "gpu": place.name,
        "processes": place.processes,
        "strategy": place.strategy,
        "dtype": place.dtype,
        "micro_batch": chosen.micro_batch,
        "accumulation": each // chosen.micro_batch,
        "gradient_checkpointing": chosen.checkpointing,
        "dequantize": chosen.dequantize,
        "shared_prefix": shares,
        "hand_written": place.hand_written,
        "batch_tokens": chosen.batch_tokens,
        "memory": chosen.memory,
        "layer_parameters": place.shape.linear_parameters // place.shape.layers if place.shape else None,
        "loads_on_host": too_large_to_load(recipe, place, chosen),
        "considered": choice.considered,
        "pace": pace.of(recipe, place, chosen, each, shares=shares, nodes=nodes, network_gbit=network_gbit),
    }


def _count(recipe: Recipe, gpus: int, nodes: int, started: int | None) -> int:
    """Processes of the run, over all nodes."""
    if started is not None:
        return started
    if recipe.train is None or recipe.distributed.strategy == "single":
        return 1
    return nodes * (gpus or recipe.resources.cpu_processes)


def _evaluators(recipe: Recipe, gpus: int, started: int | None) -> int:
    """Processes of the evaluation: one for each GPU of a machine; on CPUs one has all cores."""
    return 1 if started is not None or recipe.distributed.strategy == "single" else max(1, gpus)


def _dtype(recipe: Recipe, here: Machine, gpus: int, reasons: list[str]) -> Literal["bf16", "fp32"]:
    wanted = recipe.model.dtype
    has_bf16 = bool(gpus) and all(gpu.has_bf16 for gpu in here.gpus[:gpus])
    if wanted == "auto":
        reasons.append("dtype bf16: the GPU has it" if has_bf16 else "dtype fp32: no GPU with bf16 arithmetic")
        return "bf16" if has_bf16 else "fp32"
    if wanted == "bf16" and gpus and not has_bf16:
        raise RecipeError(f"model.dtype is bf16, which {here.gpus[0].name} does not have; write auto or fp32")
    return wanted


def _refuse(recipe: Recipe, gpus: int) -> None:
    """Choices that this machine cannot carry out."""
    if not gpus and recipe.train is not None and recipe.train.optimizer != "adamw":
        raise RecipeError(f"train.optimizer is {recipe.train.optimizer}, which needs a GPU; write adamw")
    if not gpus and recipe.model.quantization == "int8":
        raise RecipeError("model.quantization is int8, which needs a GPU; write nf4 or none")
    if not gpus and recipe.model.attention == "flash_attention_2":
        raise RecipeError("model.attention is flash_attention_2, which needs a GPU; write sdpa")


def _each(recipe: Recipe, processes: int) -> int:
    """Examples of one process in an optimizer step."""
    if recipe.train is None:
        return 1
    whole, asked = recipe.train.global_batch, recipe.train.micro_batch
    if whole % processes:
        raise RecipeError(
            f"train.global_batch is {whole}, which {processes} processes do not divide; "
            f"try {whole // processes * processes or processes}"
        )
    each = whole // processes
    if asked != "auto" and each % asked:
        raise RecipeError(
            f"train.global_batch is {whole}, which {processes} process(es) x micro_batch {asked} = "
            f"{processes * asked} does not divide; try {-(-whole // (processes * asked)) * processes * asked}"
        )
    return each


def steps_of(train: Training, rows: int) -> int:
    """Optimizer steps of a run over `rows` examples; an incomplete last batch of an epoch counts as one."""
    whole = max(1, math.ceil(steps_per_epoch(train, rows) * train.epochs))
    return whole if train.max_steps is None else min(whole, train.max_steps)


def steps_per_epoch(train: Training, rows: int) -> int:
    """Optimizer steps of one pass over `rows` examples."""
    return -(-rows // train.global_batch)


def _commands(recipe: Recipe, folder: Path, python: str, evaluators: int) -> dict[str, tuple[str, ...]]:
    """The command of each stage; every backend starts these and no others (of several nodes, each with its rank)."""
    run = Run(folder)

    def by_accelerate(configuration: Path) -> tuple[str, ...]:
        return (python, "-m", ACCELERATE, "--config_file", str(configuration))

    start = by_accelerate(run.accelerate_evaluation) if evaluators > 1 else (python,)
    evaluate = (*start, "-m", "finllm.evaluate", str(folder))
    if recipe.train is None:
        return {"evaluate": evaluate}
    return {"train": (*by_accelerate(run.accelerate), "-m", "finllm.train", str(folder)), "evaluate": evaluate}
