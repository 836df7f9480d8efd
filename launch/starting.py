"""`finllm launch`, `resume` and `evaluate`: from a recipe to a run that goes on, here or on a cluster."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from finllm.errors import RecipeError, RunError
from finllm.plan import Plan
from finllm.run import Run, State
from finllm.sweeps import Sweep, write_report
from launch import BACKENDS, cluster, finding, planning, replanning, slurm, submission, sweeping, tables
from launch.cluster import Cluster
from launch.endings import DONE, FAILED, INTERRUPTED, say_the_end
from launch.job import with_rank
from launch.place import STAGES, Stage
from launch.show import called


def launch(
    *, recipe: str, overrides: list[str], name: str | None, runs: Path, dry_run: bool, detach: bool,
    cluster_profile: Path | None, evaluate_on: Path | None, sweep: list[str],
) -> int:  # fmt: skip
    """Start a run of a recipe, or a sweep of runs, or show what it would be."""
    profile = None if cluster_profile is None else cluster.load(cluster_profile)
    evaluation = None if evaluate_on is None else cluster.load(evaluate_on)
    _refuse(profile, evaluation, sweeps=bool(sweep), detach=detach)
    runs = (profile.runs if profile and profile.runs else runs).absolute()
    if sweep:
        cells = sweeping.described(recipe, overrides, sweep, name, runs)
        return _preview_sweep(cells, overrides, profile) if dry_run else _sweep(cells, recipe, overrides, profile)
    if dry_run:
        return _preview(recipe, tuple(overrides), name, runs, profile, evaluation)
    run = planning.prepare(recipe, tuple(overrides), name, runs, profile)
    if evaluation is not None:
        slurm.keep_evaluation(run, evaluation)
    print(*tables.plan_lines(Plan.of(run), run.folder), "", sep="\n", flush=True)
    try:
        return _start(run, detach=detach)
    except RunError:
        if profile is not None:  # refused by SLURM: nothing has happened that would be worth keeping
            shutil.rmtree(run.folder)
        raise


def resume(*, run: str, overrides: list[str], runs: Path, detach: bool, cluster_profile: Path | None) -> int:
    """Go on with a run, or with the cells of a sweep, that ended early."""
    found = finding.runs_of(run, runs)
    profile = None if cluster_profile is None else cluster.load(cluster_profile)
    ended = [one for one in found if not _is_done(one)]
    left = [one for one in ended if len(found) == 1 or not _is_alive(one)]
    for one in left:
        _prepare_again(one, profile, overrides)
    home = finding.sweep_folder(run, runs)
    if home is not None and len(left) > 1 and _backend(left[0]) == "slurm" and left == ended:
        sweep = Sweep.of(home)
        slurm.start_sweep(sweep, left)
        return _say_queued(sweep, cluster.of(left[0]))
    statuses = [DONE]
    for one in left:
        statuses.append(_start(one, detach=detach))
        if statuses[-1] == INTERRUPTED:
            break
    return max(statuses)


def _prepare_again(run: Run, profile: Cluster | None, overrides: Sequence[str]) -> None:
    """Let a run go on elsewhere, or in another way."""
    if profile is not None:
        _move(run, profile)
    if overrides:
        replanning.replan(run, overrides)
        print(*tables.plan_lines(Plan.of(run), run.folder), "", sep="\n", flush=True)
    elif _backend(run) == "local":
        replanning.suit_gpus(run)


def _is_done(run: Run) -> bool:
    state = State.of(run)
    if state is None or state.status != "done":
        return False
    print(f"{run.name} is done; its report is {run.report}")
    return True


def _is_alive(run: Run) -> bool:
    state = State.of(run)
    if state is None or not BACKENDS[state.backend].alive(run, state):
        return False
    print(f"{run.name} goes on already")
    return True


def _backend(run: Run) -> str:
    state = State.of(run)
    return state.backend if state else "local"


def evaluate(*, run: str, runs: Path) -> int:
    """Score a trained run (again)."""
    found = finding.run_of(run, runs)
    if "train" in Plan.of(found).commands and not found.adapter.is_dir():
        raise RunError(
            f"{found.name} has no trained weights yet; `finllm resume {called(found)}` trains and evaluates it"
        )
    replanning.fit_evaluation(found)
    return _start(found, detach=False, stages=["evaluate"])


def _refuse(profile: Cluster | None, evaluation: Cluster | None, *, sweeps: bool, detach: bool) -> None:
    if evaluation is not None and profile is None:
        raise RecipeError(
            "--evaluate-on needs --cluster: it names a second cluster profile; on this machine leave it out"
        )
    if evaluation is not None and evaluation.nodes > 1:
        raise RecipeError(f"--evaluate-on: nodes is {evaluation.nodes}; evaluation runs on one node, write 1")
    if evaluation is not None and sweeps:
        raise RecipeError("--evaluate-on and --sweep are both given; each cell of a sweep is evaluated where it trains")
    if sweeps and profile is None and detach:
        raise RecipeError(
            "--detach: a sweep on this machine needs somebody to start its cells; use nohup, or --cluster"
        )


def _start(run: Run, *, detach: bool, stages: Sequence[Stage] = STAGES) -> int:
    backend = BACKENDS[_backend(run)]
    state = backend.start(run, detach=detach, stages=stages)
    if state.status in ("running", "waiting"):
        print(backend.hint(run, state))
        print(
            f"  follow   finllm logs {called(run)} -f\n  look     finllm status {called(run)}\n"
            f"  end      finllm cancel {called(run)}"
        )
        return DONE
    return say_the_end(run, state)


def _move(run: Run, profile: Cluster) -> None:
    """Let a run of a cluster go on with another profile, such as one with more time."""
    state, plan = State.of(run), Plan.of(run)
    if state is None or state.backend != "slurm":
        raise RunError(f"{run.name} did not run on a cluster; leave --cluster out, or launch it there anew")
    here = profile.machine()
    has = profile.nodes * (len(here.gpus) or plan.processes // plan.nodes)
    if (profile.nodes, has) != (plan.nodes, plan.processes):
        raise RunError(
            f"{run.name} was planned for {plan.processes} process(es) on {plan.nodes} node(s), and the profile has {has} "
            f"on {profile.nodes}; give one of the same size, or launch anew"
        )
    if plan.gpu and here.gpus and here.gpus[0].name != plan.gpu:
        raise RunError(f"{run.name} was planned for {plan.gpu}, and the profile has {here.gpus[0].name}; launch anew")
    cluster.save(run, profile)


def _preview(
    recipe: str, overrides: tuple[str, ...], name: str | None, runs: Path, profile: Cluster | None,
    evaluation: Cluster | None,
) -> int:  # fmt: skip
    plan = planning.preview(recipe, overrides, name, runs, profile)
    folder = runs / plan.name
    print(*tables.plan_lines(plan, folder), "", *_commands(plan), sep="\n")
    if profile is not None:
        splits = evaluation is not None and "train" in plan.commands
        print("", *_script(folder, plan.name, "train" if splits else "", profile), sep="\n")
        if splits and evaluation is not None:
            print("", *_script(folder, plan.name, "evaluate", evaluation, "afterok:JOB-ABOVE"), sep="\n")
    return DONE


def _commands(plan: Plan) -> list[str]:
    """The plan's commands; for several nodes, that of each."""
    if plan.nodes == 1:
        return tables.command_lines(plan)
    lines = [f"{'train' if rank == 0 else '':8} node {rank}: {_ranked(plan, rank)}" for rank in range(plan.nodes)]
    return [*lines, f"evaluate node 0: {shlex.join(plan.commands['evaluate'])}"]


def _ranked(plan: Plan, rank: int) -> str:
    """The training command of a node; where the nodes meet is known when the job has them."""
    text = shlex.join(with_rank(plan.commands["train"], "$HEAD", "$PORT", rank))
    return text.replace("'$HEAD'", "$HEAD").replace("'$PORT'", "$PORT")


def _script(folder: Path, name: str, stage: str, profile: Cluster, dependency: str | None = None) -> list[str]:
    return [f"sbatch {stage}".rstrip(), submission.script(folder, name, profile, dependency=dependency)]


def _preview_sweep(sweep: Sweep, overrides: Sequence[str], profile: Cluster | None) -> int:
    first = sweep.cells[0]
    plan = planning.preview(sweep.source, (*overrides, *first.overrides), first.run, sweep.folder.parent, profile)
    print(*tables.plan_lines(plan, sweep.runs[0].folder), "", *_commands(plan), "", sep="\n")
    print(
        f"and so on: {len(sweep.cells)} cells", *(f"  {c.run}: {' '.join(c.overrides)}" for c in sweep.cells), sep="\n"
    )
    if profile is not None:
        print("\nsbatch", submission.script(sweep.folder, sweep.name, profile, cells=len(sweep.cells)), sep="\n")
    return DONE


def _sweep(described: Sweep, recipe: str, overrides: Sequence[str], profile: Cluster | None) -> int:
    sweep = sweeping.prepare(described, recipe, overrides, profile)
    print(f"sweep    {sweep.folder}: {len(sweep.cells)} cells", *(f"  {cell.run}" for cell in sweep.cells), sep="\n")
    if profile is None:
        return _one_after_the_other(sweep)
    try:
        slurm.start_sweep(sweep, sweep.runs)
    except RunError:
        for folder in (sweep.folder, *(run.folder for run in sweep.runs)):
            shutil.rmtree(folder)
        raise
    return _say_queued(sweep, profile)


def _say_queued(sweep: Sweep, profile: Cluster) -> int:
    print(
        f"{sweep.name} is in the queue, {profile.parallel} at once\n  look     finllm status {sweep.name}\n"
        f"  compare  finllm report --sweep {sweep.name}\n  end      finllm cancel {sweep.name}"
    )
    return DONE


def _one_after_the_other(sweep: Sweep) -> int:
    """Run the cells here; one that fails does not keep the others from running."""
    worst = DONE
    for number, run in enumerate(sweep.runs, 1):
        print(f"\ncell {number} of {len(sweep.cells)}: {run.name}", flush=True)
        status = _start(run, detach=False)
        worst = max(worst, FAILED if status == FAILED else DONE)
        if status == INTERRUPTED:
            print(f"the rest of the sweep has not begun; `finllm resume {sweep.name}` goes on", file=sys.stderr)
            return INTERRUPTED
        report = write_report(sweep)
    print(f"\ncompare  {report}")
    return worst
