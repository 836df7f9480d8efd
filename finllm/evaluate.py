"""`python -m finllm.evaluate RUN`: score every system of a run on the same rows, and write the report."""

import contextlib
import math
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from finllm import boards, checkpoints, data, distributed, library, models, predictions, report, tracking
from finllm.assessment import score
from finllm.data import Parts
from finllm.errors import DataError, FinllmError, RecipeError, RunError
from finllm.example import SPLITS, Example
from finllm.exhaustion import cause_of
from finllm.journal import Row, history
from finllm.plan import Plan, Rows
from finllm.predictions import Answers
from finllm.progress import steps
from finllm.report import Facts
from finllm.run import Progress, Run
from finllm.scores import Scores

if TYPE_CHECKING:
    from finllm import systems

BOOTSTRAP_SEED = 0
CURVES = {"train/loss", "validation/loss", "validation/accuracy", "validation/macro_f1"}


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 1 failed, 2 the input is wrong."""
    if len(arguments) != 1:
        print("usage: python -m finllm.evaluate RUN", file=sys.stderr)
        return 2
    models.quiet_libraries()
    run = Run(Path(arguments[0]).absolute())
    try:
        with _together() as rank:
            if rank == 0:
                run.progress.unlink(missing_ok=True)  # of the stage or the attempt before
                evaluate(run)
            else:
                take_part(run)
    except FinllmError as error:
        _failed(run, str(error))
        print(error, file=sys.stderr, flush=True)
        return 2 if isinstance(error, RecipeError | DataError) else 1
    except BaseException as error:  # the process boundary: the run folder must say why
        if full := checkpoints.full_disk(run, error):
            _failed(run, full)
            print(full, file=sys.stderr, flush=True)
            return 1
        _failed(run, traceback.format_exc(), cause_of(error))
        raise
    return 0


@contextlib.contextmanager
def _together() -> Iterator[int]:
    """The rank of this process among those that `accelerate launch` has started, connected while this is open."""
    if "LOCAL_RANK" not in os.environ:
        yield 0
        return
    processes = distributed.processes()
    try:
        yield processes.process_index
    finally:
        processes.destroy_process_group()


def evaluate(run: Run) -> Scores:
    """Scores of every system that the run's recipe names; leaves predictions, scores and report in the run folder."""
    plan, parts, examples, notes = _asked(run)
    tracker = tracking.start(run, plan, "evaluate")
    found = _answered(run, plan, parts, examples, notes)
    for one in found.answers:
        predictions.write(run, one)
    with steps("drawing intervals", run=run):
        scores = score(
            found.answers,
            plan.recipe.evaluation.bootstrap_draws,
            BOOTSTRAP_SEED,
            parts=plan.recipe.evaluation.parts,
            missing=found.missing,
            checks=found.checks,
        )
    scores.save(run)
    facts = _facts(run, plan, parts, notes)
    facts.save(run)
    with steps("writing the report", run=run):
        report.write(run, scores, plan, facts)
    Console(width=100).print(report.table(scores))
    _track(tracker, scores, found.answers, facts)
    _done(run)
    return scores


def take_part(run: Run) -> None:
    """What a further process does of an evaluation: its share of the answers of the language models."""
    _answered(run, *_asked(run))


def _answered(
    run: Run, plan: Plan, parts: Parts, examples: Sequence[Example], notes: Sequence[str]
) -> "systems.Answered":
    """The answers of every system; torch and Transformers are imported only now, since a faulty run needs neither."""
    with models.importing():
        from finllm import systems
    return systems.answered(run, plan, parts, examples, notes)


def _asked(run: Run) -> tuple[Plan, Parts, list[Example], tuple[str, ...]]:
    """What is to be answered; the same in every process."""
    plan = Plan.of(run)
    recipe = plan.recipe
    parts, notes = data.training_parts(recipe.data)
    rows = {"validation": parts.validation, "test": parts.test}
    if not any(rows[part] for part in recipe.evaluation.parts):
        wanted = " and ".join(recipe.evaluation.parts)
        raise RunError(f"{', '.join(s.title for s in recipe.data)}: no rows in {wanted}; `parts` must name it")
    # Validation is answered in any case: temperatures are fitted on it, and sweeps choose by it.
    examples = [e for part in rows if part in (*recipe.evaluation.parts, "validation") for e in rows[part]]
    return plan, parts, examples, tuple(notes)


def _track(tracker: tracking.Tracker, scores: Scores, answers: Sequence[Answers], facts: Facts) -> None:
    """The report's figures, tables and pictures into the run that training began."""
    tracker.summary(**_figures(scores))
    tracker.tables(boards.tables(scores, answers))
    tracker.pictures({chart.name: chart.png for chart in report.charts_of(scores, facts)})
    tracker.finish()


def _facts(run: Run, plan: Plan, parts: Parts, notes: Sequence[str]) -> Facts:
    """What the report says of data and training."""
    rows = {
        spec.title: Rows(
            **{split: sum(e.split == split and e.dataset == spec.title for e in parts.rows) for split in SPLITS}
        )
        for spec in plan.recipe.data
    }
    lines = [row for row in history(run) if row.stage == "train"]
    numbers = {name: value for row in lines for name, value in row.numbers.items()}
    told = {
        "steps": f"{max((row.step or 0 for row in lines), default=0):,}",
        "time": f"{numbers.get('train/seconds', 0):,.0f} s, evaluation during training included",
        "peak memory": f"{numbers.get('train/memory_gib', 0):.1f} GiB",
    }
    if "validation/best_loss" in numbers:
        told["best validation loss"] = f"{numbers['validation/best_loss']:.4f} nats a label"
    return Facts(rows=rows, training=told if lines else {}, notes=tuple(notes), curves=_curves(lines))


def _curves(lines: Sequence[Row]) -> dict[str, tuple[tuple[int, float], ...]]:
    """Losses and validation figures over the steps; a step that was repeated after a rollback counts as it ended."""
    found: dict[str, dict[int, float]] = {}
    for row in lines:
        for name in CURVES & row.numbers.keys():
            if row.step is not None and math.isfinite(row.numbers[name]):
                found.setdefault(name, {})[row.step] = row.numbers[name]
    return {name: tuple(sorted(found[name].items())) for name in sorted(found)}


def _figures(scores: Scores) -> dict[str, float]:
    """Every figure of every system, by a path: `test/fiqa/tuned/accuracy`."""
    return {
        f"{part.part}/{part.dataset}/{key}/{name}": figure.value
        for part in scores.parts
        for key, system in part.systems.items()
        for name, figure in (("accuracy", system.accuracy), ("macro_f1", system.macro_f1))
    }


def _failed(run: Run, why: str, cause: Literal["", "out of memory"] = "") -> None:
    if run.folder.is_dir():
        with contextlib.suppress(OSError):  # a full disk: what is printed must do
            replace(Progress.of(run) or Progress("evaluating"), error=why, outcome="failed", cause=cause).save(run)


def _done(run: Run) -> None:
    replace(Progress.of(run) or Progress("evaluating"), outcome="done").save(run)


sys.modules[__name__].__class__ = library.Evaluate

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
