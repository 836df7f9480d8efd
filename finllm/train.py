"""`accelerate launch -m finllm.train RUN|RECIPE [key=value ...]`: one process of a training run.

Given a run folder, it does what the plan there says. Given a recipe, the first process plans and makes the folder, and
the others follow it, under any Accelerate configuration.
"""

import contextlib
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from finllm import checkpoints, data, distributed, library, machine, models
from finllm.errors import DataError, FinllmError, RecipeError, RunError
from finllm.exhaustion import cause_of
from finllm.learnt import counted
from finllm.plan import Plan, decide
from finllm.recipe import Recipe, load
from finllm.run import Progress, Run, create

RUNS = Path(os.environ.get("FINLLM_RUNS", "runs"))


def main(arguments: list[str]) -> int:
    """Exit status: 0 done or stopped with a checkpoint, 1 failed, 2 the input is wrong."""
    if not arguments:
        print("usage: accelerate launch -m finllm.train RUN|RECIPE [key=value ...]", file=sys.stderr)
        return 2
    models.quiet_libraries()
    with models.importing():
        processes = distributed.processes()
    is_main = processes.is_main_process
    run: Run | None = None
    try:
        run, plan = _prepare(Path(arguments[0]), tuple(arguments[1:]), processes, None, RUNS)
        stopped_by = _train(run, plan, processes)
    except (RecipeError, DataError) as error:
        return _failed(run, str(error), "", 2, is_main=is_main)
    except FinllmError as error:
        return _failed(run, str(error), "", 1, is_main=is_main)
    except BaseException as error:  # the process boundary: the run folder must say why
        if run is not None and (full := checkpoints.full_disk(run, error)):
            return _failed(run, full, "", 1, is_main=is_main)
        said = f"{type(error).__name__}: {error}"
        _failed(run, said, traceback.format_exc(), 1, is_main=is_main, cause=cause_of(error))
        raise
    if is_main:
        _say_the_end(run, stopped_by)
    return 0


def train(
    given: Recipe | str | Path, overrides: tuple[str, ...] = (), name: str | None = None, runs: str | Path | None = None
) -> Run:
    """The run of a recipe, or of a run folder that ended early, trained to its end in this process on one device.

    Raises FinllmError where it cannot be; whatever ends it, Ctrl-C too, is noted in the run folder, which goes on from
    its last checkpoint when it is given again.
    """
    models.quiet_libraries()
    processes = distributed.processes()
    run: Run | None = None
    try:
        source = given if isinstance(given, Recipe) else Path(given)
        run, plan = _prepare(source, overrides, processes, name, Path(runs or RUNS))
        stopped_by = _train(run, plan, processes, listens=False)
    except BaseException as error:  # the caller gets it; the run folder must say why, too
        if run is not None:
            _note(run, str(error) if isinstance(error, FinllmError) else traceback.format_exc(), cause_of(error))
        raise
    _say_the_end(run, stopped_by)
    return run


def _prepare(
    given: Path | Recipe, overrides: tuple[str, ...], processes: Any, name: str | None, runs: Path
) -> tuple[Run, Plan]:
    """The run and its plan; a recipe becomes a run folder, made by the first process."""
    from accelerate.utils import broadcast_object_list

    if isinstance(given, Path) and (given / "plan.json").is_file():
        run = Run(given.absolute())
        if processes.is_main_process:
            run.progress.unlink(missing_ok=True)  # of an attempt before
        return run, _checked(Plan.of(run), processes)
    made: list[str | FinllmError | None] = [None]
    if processes.is_main_process:
        try:
            made = [str(_make_run(given, overrides, processes, name, runs).folder)]
        except FinllmError as error:  # the others must hear of it, or they wait for ever
            made = [error]
    broadcast_object_list(made)
    if isinstance(made[0], FinllmError):
        raise made[0]
    run = Run(Path(str(made[0])))
    return run, Plan.of(run)


def _make_run(given: Path | Recipe, overrides: tuple[str, ...], processes: Any, name: str | None, runs: Path) -> Run:
    recipe = _recipe(given, overrides)
    if recipe.train is None:
        raise RecipeError(f"{given}: has no `train`, so there is nothing to train; `finllm launch` evaluates it")
    parts = data.read_parts(recipe.data)
    rows, texts = counted(recipe, parts)
    run = create(runs, name or ("run" if isinstance(given, Recipe) else given.stem))
    plan = decide(
        recipe,
        here=machine.here(),
        rows=rows,
        folder=run.folder,
        source=str(run.recipe if isinstance(given, Recipe) else given),
        overrides=overrides,
        processes=processes.num_processes,
        started=distributed.started(processes.num_processes),
        texts=texts,
    )
    plan.save(run)
    print(f"run folder: {run.folder}", flush=True)
    return run


def _recipe(given: Path | Recipe, overrides: tuple[str, ...]) -> Recipe:
    if isinstance(given, Recipe):
        if overrides:
            raise RecipeError(f"{', '.join(overrides)}: only a file can be overridden; change the Recipe itself")
        return given
    if given.is_dir():
        raise RunError(f"{given} is a folder without plan.json; give a run folder, or a recipe's YAML file")
    return load(given, overrides)


def _checked(plan: Plan, processes: Any) -> Plan:
    if plan.processes != processes.num_processes:
        raise RunError(f"the plan is for {plan.processes} process(es), but {processes.num_processes} were started")
    if plan.device == "cuda" and processes.device.type != "cuda":
        raise RunError("the plan is for a GPU, but torch sees none here; check the driver, or plan anew with gpus=0")
    return plan


def _train(run: Run, plan: Plan, processes: Any, *, listens: bool = True) -> str | None:
    with models.importing():
        from finllm.training import train
        from finllm.training.stopping import StopRequests

    stop = StopRequests(run)
    if listens:
        stop.listen()
    rank, local_rank = processes.process_index, processes.local_process_index
    return train(run, plan, stop, rank=rank, local_rank=local_rank)


def _failed(
    run: Run | None, message: str, trace: str, status: int, *, is_main: bool, cause: Literal["", "out of memory"] = ""
) -> int:
    """Note it in the run folder, and say it, where it is the cause: what other processes say then is what came of it."""
    noted = is_main if run is None else _note(run, trace or message, cause)
    if noted or trace:
        print(message, file=sys.stderr, flush=True)
    return status


def _note(run: Run, why: str, cause: Literal["", "out of memory"]) -> bool:
    """Write down why the run failed, unless a process has said so before; returns whether that was done."""
    now = Progress.of(run) or Progress("training")
    if now.outcome == "failed" and (now.cause or not cause):
        return False
    with contextlib.suppress(OSError):  # a full disk: what is printed must do
        replace(now, error=why, outcome="failed", cause=cause).save(run)
    return True


def _say_the_end(run: Run, stopped_by: str | None) -> None:
    now = Progress.of(run) or Progress("training")
    if stopped_by is None:
        replace(now, outcome="done").save(run)
        print(f"adapter: {run.adapter}", flush=True)
        return
    replace(now, outcome="stopped").save(run)
    kept = run.complete_checkpoints()
    where = kept[-1] if kept else "before the first step"
    print(f"stopped by {stopped_by}; kept {where}\ncontinue: finllm resume {run.folder}", flush=True)


sys.modules[__name__].__class__ = library.Train

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
