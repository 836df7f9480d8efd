"""Any runs side by side: their own systems on the same rows, and runs that differ in their seed taken together."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from finllm import predictions, report, seeds
from finllm.assessment import gold_of, groups, predicted_of, rows_of, score
from finllm.errors import RunError
from finllm.example import Split
from finllm.metrics import Indices
from finllm.plan import Plan
from finllm.predictions import Answers
from finllm.report.document import Block, Heading, Lead, Table, Text
from finllm.report.parts import part as part_blocks
from finllm.report.verdict import verdicts
from finllm.report.words import percent, points
from finllm.run import Run
from finllm.scores import Scores

DRAWS, SEED = 2000, 0
FIGURES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "weighted_f1": "weighted F1"}
ASIDE = {"purpose", "tracking", "resources", "evaluation"}
"""Parts of a recipe that change no weights."""


@dataclass(frozen=True)
class Settings:
    """Runs of one recipe, which differ in their seed alone."""

    name: str
    runs: tuple[Run, ...]
    answers: tuple[Answers, ...]
    """Of each run's own system."""


def write(runs: Sequence[Run], folder: Path) -> tuple[Path, Scores]:
    """Write the comparison as report.md and report.html into a folder; returns report.md's path, and the scores.

    Raises RunError where the runs did not answer the same rows.
    """
    answers = own_answers(runs)
    parts: list[Split] = ["test"] if any(p.part == "test" for p in answers[0].predictions) else ["validation"]
    scores = score(answers, DRAWS, SEED, parts=parts)
    folder.mkdir(parents=True, exist_ok=True)
    title = " against ".join(run.name for run in runs[:3]) + (" and others" if len(runs) > 3 else "")
    report.put(Run(folder), title, _blocks(title, scores, runs, together(runs, answers)))
    return folder / Run(folder).report.name, scores


def own_answers(runs: Sequence[Run]) -> list[Answers]:
    """What the own system of each run answered, named after the run; rows that only some have for validation are out.

    Raises RunError where their test rows differ, and names them.
    """
    named = [run.name for run in runs]
    twice = {name for name in named if named.count(name) > 1}
    found = [
        replace(
            predictions.of_run(run),
            key=f"{run.folder.parent.name}/{run.name}" if run.name in twice else run.name,
            name=_model(run),
        )
        for run in runs
    ]
    validation = [{(p.id, p.gold) for p in one.predictions if p.part == "validation"} for one in found]
    if any(one != other for one, other in pairwise(validation)) and any(
        p.part == "test" for one in found for p in one.predictions
    ):
        found = [replace(one, predictions=[p for p in one.predictions if p.part != "validation"]) for one in found]
    return found


def _model(run: Run) -> str:
    recipe = Plan.of(run).recipe
    return f"{recipe.model.name}, {'zero-shot' if recipe.train is None else 'tuned'}"


def together(runs: Sequence[Run], answers: Sequence[Answers]) -> list[Settings]:
    """Runs whose recipes differ in nothing but the seed, in the order of the first of each."""
    found: dict[str, list[tuple[Run, Answers]]] = {}
    for run, one in zip(runs, answers, strict=True):
        found.setdefault(_without_seed(run), []).append((run, one))
    return [
        Settings(
            name=f"{members[0][0].name}, {len(members)} seeds" if len(members) > 1 else members[0][0].name,
            runs=tuple(run for run, _ in members),
            answers=tuple(one for _, one in members),
        )
        for members in found.values()
    ]


def _without_seed(run: Run) -> str:
    recipe = Plan.of(run).recipe.model_dump(mode="json", exclude=ASIDE)
    if recipe["train"] is not None:
        recipe["train"].pop("seed")
    return json.dumps(recipe, sort_keys=True)


def _blocks(title: str, scores: Scores, runs: Sequence[Run], settings: Sequence[Settings]) -> list[Block]:
    parts: list[Block] = [block for one in scores.parts for block in part_blocks(one, scores)]
    where = [(run.name, Plan.of(run).source, " ".join(Plan.of(run).overrides), Plan.of(run).commit) for run in runs]
    return [
        Heading(title, 1),
        Lead(verdicts(scores)),
        *over_seeds(settings, [(one.dataset, one.part) for one in scores.parts]),
        Heading("Results"),
        Text("Per cent, with 95 % intervals in brackets ([how to read them](#how-to-read-the-figures))."),
        *parts,
        Heading("Speed"),
        report.speed(scores),
        Heading("Runs"),
        Table(("run", "recipe", "changes", "commit"), where),
        *report.how_to_read(scores),
    ]


def over_seeds(settings: Sequence[Settings], parts: Sequence[tuple[str, Split]]) -> list[Block]:
    """Mean, deviation and interval of each settings' runs, and the differences of the first to the others."""
    if all(len(one.runs) == 1 for one in settings):
        return []
    blocks: list[Block] = [
        Heading("Over seeds"),
        Text("Mean ± sample standard deviation over the seeds, in brackets the 95 % interval over seeds and texts."),
    ]
    for dataset, part in parts:
        blocks += [Heading(f"{dataset}, {part}", 3), seeds_table(settings, dataset, part)]
        if len(settings) > 1:
            blocks.append(_differences(settings, dataset, part))
    return blocks


def seeds_table(settings: Sequence[Settings], dataset: str, part: Split) -> Table:
    """Each settings' figures on one part, over its seeds."""
    rows = []
    for one in settings:
        found = seeds.over_seeds(*_material(one, dataset, part), DRAWS, SEED)
        cells = (_with_deviation(found[name]) for name in FIGURES)
        rows.append((one.name, str(len(one.runs)), *cells))
    return Table(("settings", "seeds", *FIGURES.values()), rows)


def _with_deviation(found: seeds.OverSeeds) -> str:
    spread = f" ± {percent(found.deviation)}" if found.seeds > 1 else ""
    return f"{percent(found.mean.value)}{spread} [{percent(found.mean.low)}, {percent(found.mean.high)}]"


def _material(one: Settings, dataset: str, part: Split) -> tuple[Indices, list[Indices], list[str | None]]:
    """Gold labels, the answers of each seed, and the groups of the rows."""
    rows = list(rows_of(one.answers, dataset, part).values())
    return gold_of(rows[0]), [predicted_of(row) for row in rows], groups(rows[0])


def _differences(settings: Sequence[Settings], dataset: str, part: Split) -> Table:
    first, *others = settings
    gold, mine, twins = _material(first, dataset, part)
    rows = []
    for other in others:
        found = seeds.difference(gold, mine, _material(other, dataset, part)[1], twins, DRAWS, SEED)
        decided = "not decided" if not found["accuracy"].decided else ""
        better = decided or ("better" if found["accuracy"].value > 0 else "worse")
        rows.append((other.name, points(found["accuracy"]), better, points(found["macro_f1"])))
    return Table((f"{first.name} minus ...", "accuracy, points", "verdict", "macro-F1, points"), rows)


def default_folder(runs: Sequence[Run]) -> Path:
    """Where a comparison goes unless somebody says otherwise: beside the first run."""
    return runs[0].folder.parent / "-and-".join(run.name for run in runs[:3])


def again(run: Run) -> Path:
    """Make the report of an evaluated run again, from its scores; returns the path of report.md."""
    scores = Scores.of(run)
    facts = report.Facts.of(run)
    report.write(run, scores, Plan.of(run), facts)
    return run.report


def refuse_unevaluated(runs: Sequence[Run]) -> None:
    """Raise RunError that names the runs which have no scores yet."""
    missing = [run.name for run in runs if not run.scores.is_file()]
    if missing:
        raise RunError(f"{', '.join(missing)}: not evaluated yet; `finllm evaluate {missing[0]}` does it")
