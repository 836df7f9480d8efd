"""Tables on standard output: plans, runs, recipes, data."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from finllm import pace
from finllm.data import Parts
from finllm.errors import FinllmError
from finllm.example import LABELS, SPLITS
from finllm.memory import described
from finllm.plan import Plan
from finllm.recipe import Recipe, load
from finllm.run import Progress, Run, State
from finllm.strategies import Considered
from launch import BACKENDS, shipped
from launch.place import Seen
from launch.show import called, clock, count

WIDEST = 10_000
"""Columns of a table that goes to a file or a pipe."""


def show(table: Table) -> None:
    """Print a table, as wide as the terminal, or as wide as it is where there is none."""
    console = Console()
    if console.is_terminal:
        console.print(table)
        return
    wide = Console(width=Console(width=WIDEST).measure(table).maximum)
    with wide.capture() as printed:
        wide.print(table)
    print(*(line.rstrip() for line in printed.get().splitlines()), sep="\n")


def _table(*columns: str) -> Table:
    """An empty table; where the terminal is narrow, all columns but the first fold."""
    table = Table(box=None, pad_edge=False, header_style="bold", highlight=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == columns[0])
    return table


def plan_lines(plan: Plan, folder: Path) -> list[str]:
    """The plan in words, one line for each decision."""
    recipe, rows = plan.recipe, plan.rows
    facts = {
        "run": str(folder),
        "recipe": " ".join([plan.source, *plan.overrides]),
        "model": f"{recipe.model.name}{'' if recipe.model.quantization == 'none' else f', {recipe.model.quantization}'}",
        "data": ", ".join(spec.title for spec in recipe.data) + "; " + _counted(rows.model_dump() if rows else None),
        "device": f"{plan.gpu or plan.device}, {_processes(plan)}, {plan.dtype}",
    }
    if recipe.train is not None:
        facts["method"] = _method(recipe)
        facts["batch"] = (
            f"{recipe.train.global_batch} = {plan.processes} process(es) x micro-batch {plan.micro_batch} x "
            f"{plan.accumulation} accumulated; gradient checkpointing {'on' if plan.gradient_checkpointing else 'off'}"
        )
        facts["memory"] = "not estimated" if plan.memory is None else described(plan.memory, plan.device)
        if plan.pace is not None:
            facts["pace"] = pace.described(plan.pace, plan.steps)
        facts["steps"] = "known once the data is counted" if plan.steps is None else str(plan.steps)
    facts["because"] = "; ".join(plan.reasons)
    lines = [f"{name:8} {text}" for name, text in facts.items() if text]
    return [
        *lines,
        *(f"{'' if number else 'choices':8} {_considered(one)}" for number, one in enumerate(plan.considered)),
    ]


def _processes(plan: Plan) -> str:
    nodes = f" on {plan.nodes} nodes" if plan.nodes > 1 else ""
    return f"{plan.processes} process(es){nodes}{'' if plan.strategy == 'single' else f' ({plan.strategy})'}"


def _considered(one: Considered) -> str:
    """A strategy with the memory of one process under it."""
    if one.memory is None:
        return f"{one.strategy:6} {one.why_not}"
    memory, limit = one.memory, one.memory.limit
    verdict = "" if limit is None else f" of {limit:.1f}{'' if memory.total <= limit else ': too much'}"
    return (
        f"{one.strategy:6} {memory.total:.1f} GiB{verdict} at micro-batch {one.micro_batch}: weights {memory.weights:.1f}, "
        f"trained {memory.trained:.1f}, activations {memory.activations:.1f}, other {memory.other:.1f}"
    )


def command_lines(plan: Plan) -> list[str]:
    """The plan's commands, as one would type them."""
    return [f"{stage:8} {shlex.join(command)}" for stage, command in plan.commands.items()]


def _counted(rows: dict[str, int] | None) -> str:
    return "rows not counted" if rows is None else ", ".join(f"{count} {part}" for part, count in rows.items())


def _method(recipe: Recipe) -> str:
    if recipe.train is None:
        return "zero-shot"
    if recipe.lora is None:
        return f"{recipe.train.method}, all weights"
    kind = "LoRA" if recipe.model.quantization == "none" else "QLoRA"
    return f"{recipe.train.method}, {kind} rank {recipe.lora.rank}"


def recipes(folder: Path) -> Table:
    """Every recipe below a folder; a faulty one says so."""
    table = _table("name", "model", "method", "data", "purpose")
    for name in shipped.names(folder):
        try:
            recipe = load(folder / f"{name}.yaml")
        except FinllmError:
            table.add_row(name, "", "", "", f"faulty: see `finllm check {folder / name}.yaml`")
            continue
        data = ", ".join(spec.title for spec in recipe.data)
        table.add_row(name, recipe.model.name, _method(recipe), data, recipe.purpose)
    return table


def data_counts(parts: Parts) -> Table:
    """Examples of each data set, part and label."""
    table = _table("data set", "part", *LABELS, "all")
    counts = Counter((example.dataset, example.split, example.label) for example in parts.rows)
    for dataset in dict.fromkeys(example.dataset for example in parts.rows):
        for split in SPLITS:
            each = [counts[dataset, split, label] for label in LABELS]
            if any(each):
                table.add_row(dataset, split, *map(str, each), str(sum(each)))
    return table


@dataclass(frozen=True)
class Standing:
    """How a run stands; the fields of `finllm status --json`."""

    name: str
    folder: str
    status: str
    """As in state.json, or `lost`, or `unknown` where the launcher did not start it."""
    stage: str
    doing: str
    done: int | None
    total: int | None
    """0 where the end is not known."""
    unit: str
    loss: float | None
    attempt: int | None
    elapsed_seconds: float | None
    seconds_left: float | None
    where: str
    waits_for: str
    """Why a job has not started yet, in SLURM's word."""
    note: str
    error: str


def standings(runs: Sequence[Run]) -> list[Standing]:
    """How runs stand, from what their launchers and workers have written, and from the queue of the cluster."""
    states = {run: State.of(run) for run in runs}
    seen: dict[Run, Seen] = {}
    for name, backend in BACKENDS.items():
        items = [(run, state) for run, state in states.items() if state is not None and state.backend == name]
        seen |= zip((run for run, _ in items), backend.seen(items), strict=True)
    elsewhere = Seen("unknown", "started without `finllm launch`")
    return [_standing(run, states[run], seen.get(run, elsewhere)) for run in runs]


def _standing(run: Run, state: State | None, seen: Seen) -> Standing:
    progress = Progress.of(run)
    going_on = seen.status in ("running", "unknown")
    return Standing(
        name=run.name,
        folder=str(run.folder),
        status=seen.status,
        stage=state.stage if state else "",
        doing=progress.stage if progress and going_on else "",
        done=progress.done if progress else None,
        total=progress.total if progress else None,
        unit=progress.unit if progress else "",
        loss=progress.loss if progress else None,
        attempt=state.attempt if state else None,
        elapsed_seconds=None if state is None or seen.status in ("lost", "waiting") else _elapsed(state),
        seconds_left=progress.seconds_left if progress and going_on else None,
        where=seen.where,
        waits_for=seen.waits_for,
        note=state.note if state else "",
        error=seen.error,
    )


def _elapsed(state: State) -> float | None:
    """Seconds of the present attempt, or of the last one; None before the first."""
    if not state.started:
        return None
    end = datetime.fromisoformat(state.ended) if state.ended else datetime.now(UTC)
    return (end - datetime.fromisoformat(state.started)).total_seconds()


def runs(standings: Sequence[Standing]) -> Table:
    """One line for each run."""
    table = _table("run", "state", "stage", "progress", "loss", "attempt", "elapsed", "left", "where")
    for run in standings:
        table.add_row(
            run.name,
            f"{run.status} ({run.waits_for})" if run.waits_for else run.status,
            run.doing or run.stage,
            count(run.done, run.total, run.unit),
            "" if run.loss is None else f"{run.loss:.4g}",
            "" if run.attempt is None else str(run.attempt),
            "" if run.elapsed_seconds is None else clock(run.elapsed_seconds),
            "" if run.seconds_left is None else clock(run.seconds_left),
            run.where,
        )
    return table


def remarks(standings: Sequence[Standing]) -> list[str]:
    """What to know, and to do, about runs that have not ended well."""
    say = {
        "failed": "{name} failed: {error}\n  `finllm logs {call}` says more; `finllm resume {call}` tries again",
        "lost": "{name} is lost: {error}\n  `finllm resume {call}` goes on",
        "stopped": "{name} is stopped; `finllm resume {call}` goes on",
    }
    lines = []
    for run in standings:
        call = called(Run(Path(run.folder)))
        if run.note:
            lines.append(f"{run.name}: {run.note}")
        if run.status in say:
            lines.append(say[run.status].format(name=run.name, error=run.error, call=call))
    return lines
