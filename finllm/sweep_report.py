"""The report of a sweep: settings in the order of their validation figures, and the test figures of the chosen ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finllm import calibration, report, seeds
from finllm.assessment import gold_of, groups, predicted_of, probabilities_of, rows_of
from finllm.comparison import DRAWS, SEED, Settings, own_answers, seeds_table
from finllm.errors import RunError
from finllm.report import charts
from finllm.report.document import Block, Bullets, Code, Heading, Picture, Table, Text
from finllm.report.words import percent
from finllm.run import Run, State
from finllm.scores import Interval
from finllm.sweeps import Cell, Sweep

SEED_KEY = "train.seed"
HOW = (
    "Settings are ranked by macro-F1 on the validation part, its mean over seeds and data sets; where that is equal, by "
    "the mean negative log-probability of the gold label (NLL). Test figures are shown of the chosen settings alone, so "
    "that nobody chooses by them. Intervals are those of the validation texts and the seeds; where they overlap, the "
    "order may be chance. The best of many looks better than it is on the texts that it was chosen by."
)


@dataclass(frozen=True)
class Ranked:
    """Settings of a sweep that are done, at least for one seed, and what validation says of them."""

    settings: Settings
    seeds: int
    """Of the sweep, done or not."""
    macro_f1: Interval
    accuracy: float
    nll: float
    """Nats a text."""


def write(sweep: Sweep) -> Path:
    """Write report.md and report.html into the sweep's folder; returns the path of report.md."""
    done = [(cell, run) for cell, run in zip(sweep.cells, sweep.runs, strict=True) if run.scores.is_file()]
    waiting = [(cell, run) for cell, run in zip(sweep.cells, sweep.runs, strict=True) if not run.scores.is_file()]
    why_not: list[Block] = []
    try:
        ranked = rank(sweep, done)
    except RunError as error:  # a run that has ended well must not fail for its sweep's report
        ranked, why_not = [], [Text(f"Not ranked: {error}")]
    missing: list[Block] = [Bullets([_standing(cell, run) for cell, run in waiting])]
    blocks: list[Block] = [
        Heading(sweep.name, 1),
        Text(_verdict(ranked, len(done), len(sweep.cells))),
        *why_not,
        *_ranking(ranked),
        *([Heading("Not done"), *missing] if waiting else []),
        *(_chosen(ranked[0]) if ranked else []),
        Heading("How to read this"),
        Text(HOW),
        Code(f"finllm launch {sweep.source} " + " ".join(f"--sweep {axis}" for axis in _axes(sweep))),
    ]
    report.put(Run(sweep.folder), sweep.name, blocks)
    return Run(sweep.folder).report


def rank(sweep: Sweep, done: Sequence[tuple[Cell, Run]]) -> list[Ranked]:
    """The settings of the cells that are done, best first by validation; cells that differ in their seed are one."""
    together: dict[str, list[Run]] = {}
    for cell, run in done:
        together.setdefault(_name(cell), []).append(run)
    planned = [_name(cell) for cell in sweep.cells]
    found = [_ranked(name, runs, planned.count(name)) for name, runs in together.items()]
    return sorted(found, key=lambda one: (-one.macro_f1.value, one.nll))


def _name(cell: Cell) -> str:
    """The cell's changes but for the seed."""
    return ", ".join(o for o in cell.overrides if not o.startswith(f"{SEED_KEY}=")) or "as the recipe says"


def _ranked(name: str, runs: Sequence[Run], planned: int) -> Ranked:
    settings = Settings(name, tuple(runs), tuple(own_answers(runs)))
    datasets = [dataset for dataset, part in settings.answers[0].parts if part == "validation"]
    if not datasets:
        raise RunError(
            f"{runs[0].name} has no answers to validation texts, by which a sweep is ranked; evaluate it again"
        )
    found, nll = [], []
    for dataset in datasets:
        rows = list(rows_of(settings.answers, dataset, "validation").values())
        gold, twins = gold_of(rows[0]), groups(rows[0])
        found.append(seeds.over_seeds(gold, [predicted_of(row) for row in rows], twins, DRAWS, SEED))
        nll += [float(calibration.nll(probabilities_of(row), gold).mean()) for row in rows]
    means = [one["macro_f1"].mean for one in found]
    return Ranked(
        settings=settings,
        seeds=planned,
        macro_f1=Interval(
            value=float(np.mean([m.value for m in means])),
            low=float(np.mean([m.low for m in means])),
            high=float(np.mean([m.high for m in means])),
        ),
        accuracy=float(np.mean([one["accuracy"].mean.value for one in found])),
        nll=float(np.mean(nll)),
    )


def _verdict(ranked: Sequence[Ranked], done: int, cells: int) -> str:
    if not ranked:
        return f"{done or 'None'} of the {cells} cells {'are' if done > 1 else 'is'} done."
    best, *others = ranked
    said = f"**{best.settings.name}: {percent(best.macro_f1.value)} macro-F1 on validation, the best of {len(ranked)} settings**"
    gap = f", {100 * (best.macro_f1.value - others[0].macro_f1.value):.1f} points above the next" if others else ""
    return f"{said}{gap}. " + (f"{done} of {cells} cells are done." if done < cells else f"All {cells} cells are done.")


def _ranking(ranked: Sequence[Ranked]) -> list[Block]:
    if not ranked:
        return []
    rows = [
        (
            str(place),
            one.settings.name,
            f"{len(one.settings.runs)} of {one.seeds}",
            f"{percent(one.macro_f1.value)} [{percent(one.macro_f1.low)}, {percent(one.macro_f1.high)}]",
            percent(one.accuracy),
            f"{one.nll:.4f}",
            ", ".join(run.name for run in one.settings.runs),
        )
        for place, one in enumerate(ranked, 1)
    ]
    head = ("rank", "settings", "seeds done", "validation macro-F1", "accuracy", "NLL", "runs")
    chart = charts.ranking([(one.settings.name, one.macro_f1) for one in ranked])
    return [Heading("Validation"), Table(head, rows), Picture(chart.name, chart.svg, chart.caption)]


def _chosen(best: Ranked) -> list[Block]:
    """Test figures of the chosen settings, over their seeds."""
    blocks: list[Block] = [Heading("Test figures of the chosen settings")]
    for dataset, part in best.settings.answers[0].parts:
        if part == "test":
            blocks += [Text(f"{dataset}:"), seeds_table([best.settings], dataset, "test")]
    reports = ", ".join(f"[{run.name}](../{run.name}/report.html)" for run in best.settings.runs)
    return [*blocks, Text(f"With base and baselines: {reports}.")]


def _standing(cell: Cell, run: Run) -> str:
    state = State.of(run) if run.folder.is_dir() else None
    return f"{run.name} ({', '.join(cell.overrides)}): {state.status if state else 'not begun'}"


def _axes(sweep: Sweep) -> list[str]:
    """The sweep's `key=a,b`, from its cells."""
    values: dict[str, list[str]] = {key: [] for key in sweep.keys}
    for cell in sweep.cells:
        for override in cell.overrides:
            key, _, value = override.partition("=")
            if value not in values.setdefault(key, []):
                values[key].append(value)
    return [f"{key}={','.join(found)}" for key, found in values.items() if found]
