"""Runs as jobs of a real SLURM: what they leave, and what they survive."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from submitit.core.utils import DelayedSubmission

from commandline import FINLLM
from finllm.run import Run
from finllm.sweeps import Sweep
from launch import tether
from launch.job import Job
from slurm.acts import (
    LIGHT,
    LONG,
    ONE,
    SLOW,
    at_attempt,
    at_step,
    each_step,
    has_ended,
    job,
    launch,
    losses,
    node,
    profile,
    queued,
    run_called,
    said,
    same_result,
    seconds_of,
    slowed,
    slurm,
    standing,
    state_of,
    steps,
    submission,
)
from slurm.conftest import Cluster, wait_until
from slurm.stage import Playing, Scene, Stage, until

pytestmark = pytest.mark.slow
Train = Callable[..., Run]


@dataclass(frozen=True)
class Given:
    """What a scene begins with."""

    recipe: Path
    undisturbed: Run
    """The long run in this process, from beginning to end."""
    cluster: Cluster
    bare_cluster: Cluster
    """A second one, without accounting."""


def one_node(given: Given) -> Playing:
    """It trains, evaluates and reports; runs the code of its submission; and knows nothing of an enclosing job."""
    text = ONE + "sbatch: {hold: true}\n"
    with pytest.MonkeyPatch.context() as enclosing:
        enclosing.setenv("SLURM_NTASKS", "7")
        enclosing.setenv("SLURM_CPU_BIND", "nonsense")
        asked = ("launch", str(given.recipe), "--name", "one", "--cluster", str(profile(text)), *LIGHT)
        previewed, announced = said(*asked, "--dry-run"), said(*asked)
    run = run_called("one")
    assert f"in the queue as job {job(run)}" in announced
    assert next(run.slurm.glob("*_submission.sh")).read_text().strip() in previewed, "exactly what sbatch got"
    yield from until(lambda: "JobHeldUser" in standing(run).waits_for)
    assert standing(run).status == "waiting"
    following = subprocess.Popen([*FINLLM, "logs", "one", "-f"], stdout=PIPE, stderr=PIPE, text=True)
    assert following.stderr is not None
    assert "waiting (JobHeldUser)" in following.stderr.readline()
    entry = run.code / "finllm" / "train.py"
    entry.write_text(entry.read_text().replace("def main(", "print('as it was submitted')\n\n\ndef main(", 1))
    slurm("scontrol", "release", job(run))
    yield from until(has_ended(run))
    assert (state_of(run).status, state_of(run).attempt) == ("done", 1)
    assert run.report.is_file()
    assert run.scores.is_file()
    log = run.log.read_text()
    assert following.communicate()[0] == log, "it followed from the queue to the end"
    assert "as it was submitted" in log
    assert len(losses(run)) == 14
    assert "#SBATCH --requeue" in next(run.slurm.glob("*_submission.sh")).read_text()
    assert re.search(rf"one +done .*slurm, job {job(run)}", said("status"))
    assert "step 14/14" in said("logs", "one")
    assert "one is done" in said("resume", "one")


def no_accounting(given: Given) -> Playing:
    """Sacct fails there; squeue and scontrol know enough."""
    there = given.bare_cluster.environment
    assert subprocess.run(["sacct"], capture_output=True, check=False, env=there).returncode
    asked = ("launch", str(given.recipe), "--name", "bare", "--cluster", str(profile(ONE)), *LIGHT)
    subprocess.run([*FINLLM, *asked], check=True, capture_output=True, env=there)
    run = run_called("bare")
    yield from until(lambda: state_of(run).status not in ("waiting", "running"))
    shown = subprocess.run([*FINLLM, "status"], check=True, capture_output=True, env=there, text=True).stdout
    assert re.search(rf"bare +done .*slurm, job {job(run)}", shown)
    assert run.report.is_file()


def two_nodes(given: Given) -> Playing:
    """Queued again in the middle by the administrator; both nodes stop at the same step and go on from it.

    It ends as two nodes do that nobody has disturbed, and, to rounding, as one process.
    """
    run = slowed(given.recipe, "two", ONE + "nodes: 2\n")
    at_peace = launch(given.recipe, "at-peace", ONE + "nodes: 2\n", *LONG)
    yield from until(at_step(run, 5))
    slurm("scontrol", "requeue", job(run))
    yield from until(at_attempt(run, 2))
    stopped = int(run.complete_checkpoints()[-1].name.rpartition("-")[2])
    assert stopped >= 5
    yield from until(lambda: has_ended(run)() and has_ended(at_peace)())
    assert (state_of(run).status, state_of(run).attempt) == ("done", 2)
    assert (state_of(at_peace).status, state_of(at_peace).attempt) == ("done", 1)
    assert steps(run) == list(range(1, 157)), "no step was lost, none taken twice"
    same_result(run, at_peace)
    same_result(run, given.undisturbed, 1e-4)
    log = said("logs", "two")
    assert "node1 | " in log
    assert log.index("attempt 1") < log.index(": asked the run to save and stop") < log.index("attempt 2")


def time_limit(given: Given) -> Playing:
    """Saved at the signal, queued again by the job itself, and then as if there had been no limit; one run for W&B.

    The administrator sets the limit when the run trains: a short one from the start might end before torch is loaded.
    SLURM looks every 30 s, and finds the signal due.
    """
    text = ONE.replace("signal_seconds: 30", "signal_seconds: 110")
    run = slowed(given.recipe, "timed", text, "tracking.wandb=offline")
    yield from until(at_step(run, 5))
    limit = (seconds_of(given.cluster.show(int(job(run)))["RunTime"]) + 60) // 60 + 1
    slurm("scontrol", "update", f"JobId={job(run)}", f"TimeLimit={limit}")
    yield from until(lambda: state_of(run).status == "waiting")
    slurm("scontrol", "update", f"JobId={job(run)}", "TimeLimit=20")
    yield from until(has_ended(run))
    assert state_of(run).status == "done"
    assert state_of(run).attempt > 1
    assert "the time limit is near, or the nodes are wanted; queued again (1 of at most 20)" in run.log.read_text()
    assert steps(run) == list(range(1, 157))
    ids = {path.name.rpartition("-")[2] for path in (run.folder / "wandb").glob("offline-run-*")}
    assert len(ids) == 1
    same_result(run, given.undisturbed)


def preemption(given: Given) -> Playing:
    """A job of a better partition takes their nodes: one goes at once, one after a warning; they go on when it ends."""
    places = {"debug": "node5", "graced": "node6"}
    text = ONE + "exclusive: true\npartition: "
    runs = {name: slowed(given.recipe, name, f"{text}{name}\n", nodelist=place) for name, place in places.items()}
    yield from until(lambda: all(at_step(run, 5)() for run in runs.values()))
    assert {name: node(run) for name, run in runs.items()} == places
    take = ("--partition=urgent", "--nodes=2", "--nodelist=node[5-6]", "--exclusive", "--output=/dev/null")
    slurm("sbatch", *take, "--wrap=sleep 5")
    yield from until(lambda: standing(runs["debug"]).status == "waiting")
    yield from until(lambda: state_of(runs["graced"]).status == "waiting")
    yield from until(lambda: all(has_ended(run)() for run in runs.values()))
    for run in runs.values():
        assert (state_of(run).status, state_of(run).attempt) == ("done", 2)
        assert ": asked the run to save and stop" in run.log.read_text()
        same_result(run, given.undisturbed)
    assert "queued again (1 of at most 20)" in runs["graced"].log.read_text(), "there was time to do so itself"


def dead_nodes(given: Given) -> Playing:
    """One with all that ran on it, one whose slurmd only died: what lived on there finds another attempt, and ends."""
    hows = ("power-off", "kill")
    runs = {how: slowed(given.recipe, how, ONE + "exclusive: true\n") for how in hows}
    yield from until(lambda: all(at_step(run, 5)() for run in runs.values()))
    nodes = {how: node(run) for how, run in runs.items()}
    assert len(set(nodes.values())) == 2
    for how, name in nodes.items():
        assert given.cluster.script("node", how, name).returncode == 0
    try:
        yield from until(lambda: all(at_attempt(run, 2)() for run in runs.values()))
        assert not set(nodes.values()) & {node(run) for run in runs.values()}
        yield from until(lambda: all(has_ended(run)() for run in runs.values()))
    finally:
        for name in nodes.values():
            given.cluster.script("node", "start", name)
    for run in runs.values():
        assert (state_of(run).status, state_of(run).attempt) == ("done", 2)
        same_result(run, given.undisturbed)
    left = f"{runs['kill'].folder}@{job(runs['kill'])}.0.0"
    yield from until(lambda: not tether.members(left))


def silent_node(given: Given) -> Playing:
    """Its trainer is gone, and what started it says nothing; SLURM, which often notices after minutes, is told."""
    run = launch(given.recipe, "silent", ONE + "nodes: 2\nsbatch: {hold: true}\n", *LIGHT)
    each_step(run, SLOW)
    patience = run.code / "launch" / "job.py"
    patience.write_text(patience.read_text().replace("PRESENT_SECONDS = 60.0", "PRESENT_SECONDS = 3.0"))
    slurm("scontrol", "release", job(run))
    yield from until(at_step(run, 3))
    second = given.cluster.processes(f"SLURM_JOB_ID={job(run)}", "SLURM_NODEID=1")
    trainers = tether.members(f"{run.folder}@{job(run)}.0.1")
    for pid in sorted(second, key=trainers.__contains__):  # first what would see the trainer end
        os.kill(pid, signal.SIGKILL if pid in trainers else signal.SIGSTOP)
    yield from until(has_ended(run))
    assert (state_of(run).status, state_of(run).attempt) == ("done", 2)
    assert "node 2 of 2 does not answer; queued again (1 of at most 20)" in run.log.read_text()
    assert len(losses(run)) == 14
    assert not list(run.folder.glob("present-*"))


def failure(given: Given) -> Playing:
    """It is not queued again, and the second job does not wait any more.

    The traceback of the process that failed comes first, not of the one that waits for it.
    """
    second = ("--evaluate-on", str(profile(ONE, "second.yaml")))
    run = launch(given.recipe, "failing", ONE + "nodes: 2\nsbatch: {hold: true}\n", *LIGHT, *second)
    found = submission(run)
    each_step(run, 'if not self._is_main: raise ValueError("the second node is broken")')
    slurm("scontrol", "release", found.job)
    yield from until(has_ended(run))
    state = state_of(run)
    assert (state.status, state.attempt) == ("failed", 1)
    assert state.error == "ValueError: the second node is broken"
    shown = said("status", "failing")
    assert shown.startswith("Traceback")
    assert f"failing failed: {state.error}" in shown
    assert said("logs", "failing").startswith("Traceback")
    yield from until(lambda: "CANCELLED" in slurm("scontrol", "show", "job", found.evaluation))
    assert "Restarts=0" in slurm("scontrol", "show", "job", found.job)


def second_job(given: Given) -> Playing:
    """It evaluates, on another profile, when the first has trained."""
    profile("cpus: 1\nmemory: 2G\npartition: short\ntime: 4\nsignal_seconds: 30\n", "second.yaml")
    run = launch(given.recipe, "apart", ONE, *LIGHT, "--evaluate-on", "second.yaml")
    found = submission(run)
    yield from until(has_ended(run))
    assert state_of(run).status == "done"
    assert run.report.is_file()
    yield from until(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", found.evaluation))
    assert "Partition=short" in slurm("scontrol", "show", "job", found.evaluation)
    second = DelayedSubmission.load(run.slurm / f"{found.evaluation}_submitted.pkl").function
    assert isinstance(second, Job)
    assert second.cluster.partition == "short", "it goes by its own limits"


def cancelling(given: Given) -> Playing:
    """It ends it for good, while it runs and while it waits; a checkpoint is kept, and resume goes on from it."""
    run = slowed(given.recipe, "cancelled", ONE)
    yield from until(at_step(run, 5))
    said("cancel", "cancelled")
    assert state_of(run).status == "cancelled"
    assert not queued(run)
    assert run.complete_checkpoints()
    assert not tether.members(f"{run.folder}@{job(run)}.0.0")
    profile(ONE + "sbatch: {hold: true}\n", "longer.yaml")
    said("resume", "cancelled", "--cluster", "longer.yaml")
    assert standing(run).status == "waiting"
    said("cancel", "cancelled")
    assert standing(run).status == "cancelled"
    assert not queued(run)


def scancel(given: Given) -> Playing:
    """Whoever ends the job in SLURM's own way gets a stopped run with a checkpoint, not a new job."""
    run = slowed(given.recipe, "ended", ONE)
    yield from until(at_step(run, 5))
    slurm("scancel", job(run))
    yield from until(has_ended(run))
    assert state_of(run).status == "stopped"
    assert run.complete_checkpoints()
    assert not queued(run)


def requeue_limit(given: Given) -> Playing:
    """A job that comes back more often than the profile allows, here not at all, stays away."""
    run = slowed(given.recipe, "looping", ONE + "requeues: 0\n")
    yield from until(at_step(run, 5))
    slurm("scontrol", "requeue", job(run))
    yield from until(has_ended(run))
    assert state_of(run).status == "stopped"
    assert "`requeues` is 0" in state_of(run).note
    assert "`finllm resume looping` goes on" in said("status", "looping")


def sweep(given: Given) -> Playing:
    """A run folder for each cell, not more at once than the profile says, and a comparison at the end; resumed as one."""
    keys = ("--sweep", "train.learning_rate=1e-2,1e-3,1e-4", "--sweep", "lora.rank=2")
    text = ONE + "parallel: 2\n"
    launch(given.recipe, "grid", text + "sbatch: {hold: true}\n", *keys, *LIGHT)
    cells = Sweep.of(run_called("grid").folder)
    assert len(cells.runs) == 3
    said("cancel", "grid")
    assert not queued(*cells.runs)
    assert [standing(run).status for run in cells.runs] == ["cancelled"] * 3
    first = job(cells.runs[0])
    said("resume", "grid", "--cluster", str(profile(text)))
    array = job(cells.runs[0]).partition("_")[0]
    assert array != first.partition("_")[0]
    most = 0
    while queued(*cells.runs):
        running = slurm("squeue", "--noheader", "--array", f"--jobs={array}", "--states=RUNNING")
        most = max(most, len(running.splitlines()))
        yield
    assert most == 2
    assert [state_of(run).status for run in cells.runs] == ["done"] * 3
    assert {job(run).partition("_")[0] for run in cells.runs} == {array}
    report = (cells.folder / "report.md").read_text()
    assert all(run.name in report for run in cells.runs)
    assert said("status", "grid").count("done") >= 3


# In this order they begin: those that wait longest first, beside those that do not.
SCENES: tuple[Scene, ...] = (
    time_limit, two_nodes, dead_nodes, preemption, sweep, silent_node, one_node, no_accounting, second_job, failure,
    requeue_limit, cancelling, scancel,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def on_cluster(
    cluster: Cluster, bare_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[pytest.MonkeyPatch]:
    """Runs stand in a folder with a hard name, nothing is read from the checkout, and nothing is left at the end."""
    here = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.conf))
        patch.setenv("FINLLM_RUNS", str(here / 'my "quick" runs, it\'s'))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(here)
        yield patch
    left = cluster.clear() | bare_cluster.clear()
    if left:
        pytest.fail(f"these processes outlived their jobs: {left}")


@pytest.fixture(scope="module")
def stage(
    request: pytest.FixtureRequest,
    recipe: Path,
    cluster: Cluster,
    bare_cluster: Cluster,
    train: Train,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stage]:
    """Where those of the scenes are played that were asked for."""
    undisturbed = train(recipe, tmp_path_factory.mktemp("undisturbed"), *LONG)
    asked = [
        scene for scene in SCENES if any(item.name.endswith(f"[{scene.__name__}]") for item in request.session.items)
    ]
    stage = Stage(Given(recipe, undisturbed, cluster, bare_cluster), asked)
    yield stage
    stage.close()


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_on_a_real_cluster(scene: Any, stage: Stage, cluster: Cluster, bare_cluster: Cluster) -> None:
    """Each of the scenes above; and no process outlives its job."""
    stage.see(scene)
    assert wait_until(lambda: not cluster.orphans() | bare_cluster.orphans(), 60), cluster.orphans()
