"""`accelerate launch -m finllm.train RUN|RECIPE [key=value ...]`: one process of a training run.

Given a run folder, it does what the plan there says. Given a recipe, the first process plans and makes the folder, and
the others follow it, under any Accelerate configuration.
"""

import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from finllm import data, machine, models
from finllm.errors import DataError, FinllmError, RecipeError, RunError
from finllm.exhaustion import cause_of
from finllm.lengths import lengths_of
from finllm.plan import Plan, Rows, decide
from finllm.recipe import load
from finllm.run import Progress, Run, create

RUNS = Path(os.environ.get("FINLLM_RUNS", "runs"))


def main(arguments: list[str]) -> int:
    """Exit status: 0 done or stopped with a checkpoint, 1 failed, 2 the input is wrong."""
    if not arguments:
        print("usage: accelerate launch -m finllm.train RUN|RECIPE [key=value ...]", file=sys.stderr)
        return 2
    models.quiet_libraries()
    processes = _processes()
    is_main = processes.is_main_process
    run: Run | None = None
    try:
        run, plan = _prepare(Path(arguments[0]), tuple(arguments[1:]), processes)
        stopped_by = _train(run, plan, processes)
    except (RecipeError, DataError) as error:
        return _failed(run, str(error), "", 2, is_main=is_main)
    except FinllmError as error:
        return _failed(run, str(error), "", 1, is_main=is_main)
    except BaseException as error:  # the process boundary: the run folder must say why
        said = f"{type(error).__name__}: {error}"
        _failed(run, said, traceback.format_exc(), 1, is_main=is_main, cause=cause_of(error))
        raise
    if is_main:
        _say_the_end(run, stopped_by)
    return 0


def _processes() -> Any:
    """Accelerate's state of this process and its siblings."""
    import torch
    from accelerate import PartialState

    # Without cpu=True, processes on a machine without a GPU would not know each other, and each train alone.
    return PartialState(cpu=not torch.cuda.is_available())


def _prepare(given: Path, overrides: tuple[str, ...], processes: Any) -> tuple[Run, Plan]:
    """The run and its plan; a recipe becomes a run folder, made by the first process."""
    from accelerate.utils import broadcast_object_list

    if (given / "plan.json").is_file():
        run = Run(given.absolute())
        if processes.is_main_process:
            run.progress.unlink(missing_ok=True)  # of an attempt before
        return run, _checked(Plan.of(run), processes)
    made: list[str | FinllmError | None] = [None]
    if processes.is_main_process:
        try:
            made = [str(_make_run(given, overrides, processes).folder)]
        except FinllmError as error:  # the others must hear of it, or they wait for ever
            made = [error]
    broadcast_object_list(made)
    if isinstance(made[0], FinllmError):
        raise made[0]
    run = Run(Path(str(made[0])))
    return run, Plan.of(run)


def _make_run(given: Path, overrides: tuple[str, ...], processes: Any) -> Run:
    if given.is_dir():
        raise RunError(f"{given} is a folder without plan.json; give a run folder, or a recipe's YAML file")
    recipe = load(given, overrides)
    if recipe.train is None:
        raise RecipeError(f"{given}: has no `train`, so there is nothing to train; `finllm launch` evaluates it")
    parts = data.read_parts(recipe.data)
    run = create(RUNS, given.stem)
    rows = Rows(train=len(parts.train), validation=len(parts.validation), test=len(parts.test))
    plan = decide(
        recipe,
        here=machine.here(),
        rows=rows,
        folder=run.folder,
        source=str(given),
        overrides=overrides,
        processes=processes.num_processes,
        texts=lengths_of(parts.train),
    )
    plan.save(run)
    print(f"run folder: {run.folder}", flush=True)
    return run


def _checked(plan: Plan, processes: Any) -> Plan:
    if plan.processes != processes.num_processes:
        raise RunError(f"the plan is for {plan.processes} process(es), but {processes.num_processes} were started")
    if plan.device == "cuda" and processes.device.type != "cuda":
        raise RunError("the plan is for a GPU, but torch sees none here; check the driver, or plan anew with gpus=0")
    return plan


def _train(run: Run, plan: Plan, processes: Any) -> str | None:
    from finllm.training import train
    from finllm.training.stopping import StopRequests

    stop = StopRequests(run)
    stop.listen()
    rank, local_rank = processes.process_index, processes.local_process_index
    return train(run, plan, stop, rank=rank, local_rank=local_rank)


def _failed(
    run: Run | None, message: str, trace: str, status: int, *, is_main: bool, cause: Literal["", "out of memory"] = ""
) -> int:
    """Note it in the run folder; the process that ran out of memory does so itself, and what others say then is noise."""
    if run is not None and (is_main or cause):
        now = Progress.of(run) or Progress("training")
        if not now.cause:
            replace(now, error=trace or message, outcome="failed", cause=cause).save(run)
    if is_main or trace:
        print(message, file=sys.stderr, flush=True)
    return status


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
