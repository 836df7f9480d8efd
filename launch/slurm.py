"""The SLURM backend: runs are jobs of a cluster's queue, and need neither this terminal nor this machine."""

import time
from collections.abc import Sequence
from pathlib import Path

from finllm.errors import RunError
from finllm.files import write_text
from finllm.run import ALIVE, Run, State
from finllm.sweeps import Sweep
from launch import cluster, scheduler, snapshot, submission
from launch.job import Job
from launch.place import STAGES, Seen, Stage
from launch.scheduler import Job as Queued
from launch.show import Tail, called
from launch.submission import Submission
from launch.supervisor import now

EVALUATION = "evaluation-cluster.json"
"""Profile of the job that evaluates, where that is another."""
FRESH_SECONDS = 2.0
"""What SLURM said of a job is not asked for again within this time."""
GONE_SECONDS = 120.0
"""In which a cancelled job leaves its nodes; SLURM's KillWait is 30 s by default."""


def start(run: Run, *, detach: bool, stages: Sequence[Stage] = STAGES) -> State:  # noqa: ARG001  # a job is detached
    """Put what is left of these stages into the queue; returns the waiting state. Raises RunError where it is refused."""
    before = State.of(run)
    if before is not None and alive(run, before):
        raise RunError(
            f"{run.name} is in the queue already; `finllm status {called(run)}` shows it, "
            f"`finllm cancel {called(run)}` ends it"
        )
    profile, elsewhere = cluster.of(run), _evaluated_on(run)
    snapshot.take(run.code)
    run.stop_request.unlink(missing_ok=True)
    splits = elsewhere is not None and "train" in stages and "evaluate" in stages and not run.adapter.is_dir()
    last = Submission.of(run)
    sweep = last.sweep if last else ""
    where = profile if splits or elsewhere is None else elsewhere
    mine = Job(str(run.folder), ("train",) if splits else tuple(stages), where, evaluated_elsewhere=splits, sweep=sweep)
    waiting = (before or State("created")).with_(
        status="waiting", stage=mine.stages[0], backend="slurm", host="", note="", error="", ended=""
    )
    waiting.save(run)
    jobs: list[str] = []
    try:
        jobs += submission.submit(run.folder, run.name, [mine], where)
        if splits and elsewhere is not None:
            jobs += _submit_evaluation(run, elsewhere, jobs[0])
    except BaseException:
        _take_back(jobs)
        if before is not None:
            before.save(run)
        raise
    Submission(jobs[0], "".join(jobs[1:]), str(run.slurm), sweep).save(run)
    return waiting


def _submit_evaluation(run: Run, profile: cluster.Cluster, after: str) -> list[str]:
    job = Job(str(run.folder), ("evaluate",), profile)
    try:
        return submission.submit(run.folder, run.name, [job], profile, f"afterok:{after}")
    except RunError as error:
        raise RunError(f"the evaluation, with the profile of --evaluate-on: {error}") from error


def _take_back(jobs: Sequence[str]) -> None:
    """End jobs that may have begun, so that nothing writes into their folder any more."""
    for job in jobs:
        scheduler.cancel(job)
    _wait_until_gone(jobs)


def _wait_until_gone(jobs: Sequence[str]) -> None:
    until = time.monotonic() + GONE_SECONDS
    while any(job.waits or job.runs for job in scheduler.look(jobs).values()):
        if time.monotonic() > until:
            raise RunError(f"SLURM has not ended job {' and '.join(jobs)} in {GONE_SECONDS:.0f} s; see squeue")
        time.sleep(0.5)


def start_sweep(sweep: Sweep, runs: Sequence[Run]) -> None:
    """Put cells of a sweep, of which none is in the queue, there as one job array. Raises RunError where it is refused."""
    profile = cluster.of(runs[0])
    home = Run(sweep.folder)
    snapshot.take(home.code)
    before = {run: State.of(run) or State("created") for run in runs}
    for run, state in before.items():
        run.stop_request.unlink(missing_ok=True)
        state.with_(status="waiting", backend="slurm", host="", note="", error="", ended="").save(run)
    jobs = [Job(str(run.folder), STAGES, profile, sweep=str(sweep.folder)) for run in runs]
    try:
        ids = submission.submit(home.folder, sweep.name, jobs, profile)
    except BaseException:
        for run, state in before.items():
            state.save(run)
        raise
    for run, number in zip(runs, ids, strict=True):
        Submission(number, folder=str(home.slurm), sweep=str(sweep.folder)).save(run)


def seen(items: Sequence[tuple[Run, State]]) -> list[Seen]:
    """How runs stand, from their state and, where they may not have ended, from the queue."""
    known = [Submission.of(run) for run, _ in items]
    asked = [
        found.jobs if found and not _has_ended(state, found) else []
        for (_, state), found in zip(items, known, strict=True)
    ]
    try:
        jobs = _look([job for mine in asked for job in mine])
    except RunError as error:
        jobs, unknown = {}, str(error)
    else:
        unknown = ""
    return [
        Seen(state.status, _where(state, found), unknown)
        if unknown and mine
        else _seen(state, found, [jobs[job] for job in mine])
        for (_, state), found, mine in zip(items, known, asked, strict=True)
    ]


def _has_ended(state: State, found: Submission) -> bool:
    """Whether nothing more is to come; the queue need not be asked about old runs."""
    trained_only = state.status == "done" and state.stage == "train" and bool(found.evaluation)
    return state.status in ("done", "cancelled", "failed") and not trained_only


def _seen(state: State, found: Submission | None, jobs: Sequence[Queued]) -> Seen:
    if found is None or not jobs:
        return Seen(state.status, _where(state, found), error=state.error)
    present = next((job for job in jobs if job.waits or job.runs), jobs[-1])
    where = _where(state, found, present)
    if present.waits:
        return Seen("waiting", where, present.reason)
    if present.runs:
        return Seen("running" if state.status == "running" else "starting", where)
    if state.status == "stopped":
        return Seen("stopped", where)
    dead = next((job for job in jobs if job.state != "COMPLETED"), present)
    return Seen("lost", where, error=_why_lost(found, dead))


def _why_lost(found: Submission, job: Queued) -> str:
    """SLURM's word, and the last that was said before the run could say anything itself."""
    word = f"SLURM says {job.state} of job {job.id}" if job.is_known else f"SLURM does not know job {job.id} any more"
    files = sorted(Path(found.folder).glob(f"{job.id}_*_log.err"))
    lines = [line for file in files for line in Tail(file).read(to_end=True) if line.strip()]
    said = [line for line in lines if not line.startswith(("submitit ", "srun: ", "slurmstepd: "))] or lines
    return f"{word}: {said[-1].strip()}" if said else word


def _where(state: State, found: Submission | None, job: Queued | None = None) -> str:
    number = job.id if job else found.jobs[-1] if found else ""
    place = (job.nodes if job else "") or ("" if job and job.waits else state.host)
    return ", ".join(part for part in ("slurm", f"job {number}" if number else "", place) if part)


def alive(run: Run, state: State) -> bool:
    """Whether any job of the run waits or runs."""
    found = Submission.of(run)
    if found is None or state.backend != "slurm":
        return False
    return any(job.waits or job.runs for job in _look(found.jobs).values())


def cancel(run: Run, state: State, wait: float) -> State:
    """End the run for good: `wait` seconds to save, then by SLURM; returns its last state."""
    found = Submission.of(run)
    write_text(run.stop_request, "cancel\n")
    jobs = found.jobs if found else []
    until = time.monotonic() + wait
    while time.monotonic() < until and any(job.runs for job in scheduler.look(jobs).values()):
        time.sleep(0.5)
    _take_back(jobs)
    latest = State.of(run) or state
    if latest.status in ALIVE or latest.status == "stopped":
        latest = latest.with_(status="cancelled", ended=now())
        latest.save(run)
    return latest


def hint(run: Run, state: State) -> str:  # noqa: ARG001  # the other backend needs it
    """What to say of a run that goes on without the terminal."""
    found = Submission.of(run)
    assert found is not None, "it has just been submitted"
    return f"{run.name} is in the queue as job {found.job}" + (
        f", and job {found.evaluation} evaluates it" if found.evaluation else ""
    )


def _evaluated_on(run: Run) -> cluster.Cluster | None:
    path = run.folder / EVALUATION
    return cluster.Cluster.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def keep_evaluation(run: Run, profile: cluster.Cluster) -> None:
    """Let the run be evaluated by a second job."""
    write_text(run.folder / EVALUATION, profile.model_dump_json(indent=1))


_answers: dict[tuple[str, ...], tuple[float, dict[str, Queued]]] = {}


def _look(jobs: Sequence[str]) -> dict[str, Queued]:
    """What SLURM says, not more often than every few seconds: its controller serves everybody."""
    key = tuple(jobs)
    when, answer = _answers.get(key, (float("-inf"), {}))
    if time.monotonic() > when + FRESH_SECONDS:
        answer = scheduler.look(jobs)
        _answers[key] = time.monotonic(), answer
    return answer
