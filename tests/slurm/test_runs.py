"""Runs as jobs of a real SLURM: what they leave, and what they survive."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from submitit.core.utils import DelayedSubmission

from finllm.journal import history
from finllm.run import Progress, Run, State
from finllm.sweeps import Sweep
from launch import tables, tether
from launch.cli import main
from launch.job import Job
from launch.submission import Submission
from launch.tables import Standing

pytestmark = pytest.mark.slow
Train = Callable[..., Run]
ONE = "cpus: 1\nmemory: 2G\ntime: 20\nsignal_seconds: 30\n"
LIGHT = ("evaluation.base=false", "evaluation.baselines=[]", "evaluation.bootstrap_draws=100")
FINLLM = (sys.executable, "-m", "launch.cli")
LONG = (*LIGHT, "train.epochs=6", "train.global_batch=2", "train.micro_batch=1")
"""156 steps."""
SLOW = 'time.sleep(0 if "SLURM_RESTART_COUNT" in __import__("os").environ else 0.6)'


@pytest.fixture(autouse=True)
def _here(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001 -- is up
    """Runs stand in a folder with a hard name, and nothing is read from the checkout."""
    monkeypatch.setenv("FINLLM_RUNS", str(tmp_path / 'my "quick" runs, it\'s'))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(train: Train, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The long run in this process, from beginning to end."""
    return train(recipe, tmp_path_factory.mktemp("undisturbed"), *LONG)


def profile(text: str, name: str = "cluster.yaml") -> Path:
    Path(name).write_text(text)
    return Path(name)


def launch(recipe: Path, name: str, text: str, *given: str) -> Run:
    launch_of(recipe, name, text, *given)
    return run_called(name)


def launch_of(recipe: Path, name: str, text: str, *given: str) -> None:
    assert main(["launch", str(recipe), "--name", name, "--cluster", str(profile(text)), *given]) == 0


def slowed(recipe: Path, name: str, text: str, *given: str) -> Run:
    """A run that takes minutes until SLURM has started it again, so that it does not end before it is disturbed."""
    run = launch(recipe, name, text + "sbatch: {hold: true}\n", *given)
    each_step(run, SLOW)
    slurm("scontrol", "release", job(run))
    return run


def each_step(run: Run, statement: str) -> None:
    """Let the trainer of a run that has not begun do this too."""
    watcher = run.code / "finllm" / "training" / "watching.py"
    line = '        rate = more["optimizer"]'
    assert line in watcher.read_text()
    watcher.write_text(watcher.read_text().replace(line, f"        {statement}\n{line}"))


def run_called(name: str) -> Run:
    return Run((Path(os.environ["FINLLM_RUNS"]) / name).absolute())


def until(condition: Callable[[], object], seconds: float = 300) -> None:
    """Wait; the limit is for cores that ten other processes want too."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has taken too long"
        time.sleep(0.2)


def ended(run: Run) -> State:
    """The last state of a run, when its jobs have left the queue."""
    until(lambda: standing(run).status not in ("waiting", "starting", "running", "created"), 900)
    state = State.of(run)
    assert state is not None
    return state


def standing(run: Run) -> Standing:
    return tables.standings([run])[0]


def job(run: Run) -> str:
    found = Submission.of(run)
    assert found is not None
    return found.job


def seconds_of(clock: str) -> int:
    """SLURM's HH:MM:SS."""
    hours, minutes, seconds = map(int, clock.split(":"))
    return (hours * 60 + minutes) * 60 + seconds


def at_step(run: Run, step: int) -> Callable[[], bool]:
    def reached() -> bool:
        now = Progress.of(run)
        return now is not None and now.stage == "training" and now.done >= step

    return reached


def at_attempt(run: Run, number: int) -> Callable[[], bool]:
    def reached() -> bool:
        state = State.of(run)
        return state is not None and state.attempt >= number

    return reached


def losses(run: Run) -> list[float]:
    return list({r.step: r.numbers["train/loss"] for r in history(run) if "train/loss" in r.numbers}.values())


def same_result(run: Run, other: Run, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(losses(run), losses(other), rtol=0, atol=tolerance)
    mine, theirs = (load_file(r.adapter / "adapter_model.safetensors") for r in (run, other))
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=tolerance)


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_run_on_one_node(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It trains, evaluates and reports; runs the code of its submission; and knows nothing of an enclosing job."""
    monkeypatch.setenv("SLURM_NTASKS", "7")
    monkeypatch.setenv("SLURM_CPU_BIND", "nonsense")
    text = ONE + "sbatch: {hold: true}\n"
    launch_of(recipe, "one", text, *LIGHT, "--dry-run")
    previewed = capsys.readouterr().out
    run = launch(recipe, "one", text, *LIGHT)
    assert f"in the queue as job {job(run)}" in capsys.readouterr().out
    assert next(run.slurm.glob("*_submission.sh")).read_text().strip() in previewed, "exactly what sbatch got"
    until(lambda: "JobHeldUser" in standing(run).waits_for)
    assert standing(run).status == "waiting"
    following = subprocess.Popen([*FINLLM, "logs", "one", "-f"], stdout=PIPE, stderr=PIPE, text=True)
    assert following.stderr is not None
    assert "waiting (JobHeldUser)" in following.stderr.readline()
    entry = run.code / "finllm" / "train.py"
    entry.write_text(entry.read_text().replace("def main(", "print('as it was submitted')\n\n\ndef main(", 1))
    slurm("scontrol", "release", job(run))
    state = ended(run)
    assert (state.status, state.attempt) == ("done", 1)
    assert run.report.is_file()
    assert run.scores.is_file()
    log = run.log.read_text()
    assert following.communicate()[0] == log, "it followed from the queue to the end"
    assert "as it was submitted" in log
    assert len(losses(run)) == 14
    assert "#SBATCH --requeue" in next(run.slurm.glob("*_submission.sh")).read_text()
    assert main(["status"]) == 0
    assert re.search(rf"one +done .*slurm, job {job(run)}", capsys.readouterr().out)
    assert main(["logs", "one"]) == 0
    assert "step 14/14" in capsys.readouterr().out
    assert main(["resume", "one"]) == 0
    assert "one is done" in capsys.readouterr().out


def test_two_nodes_train_what_one_process_trains(
    undisturbed: Run, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Queued again in the middle by the administrator; both nodes stop at the same step and go on from it.

    It ends as two nodes do that nobody has disturbed, and, to rounding, as one process.
    """
    run = slowed(recipe, "two", ONE + "nodes: 2\n", *LONG)
    at_peace = launch(recipe, "at-peace", ONE + "nodes: 2\n", *LONG)
    until(at_step(run, 5))
    slurm("scontrol", "requeue", job(run))
    until(at_attempt(run, 2))
    stopped = int(run.complete_checkpoints()[-1].name.rpartition("-")[2])
    assert stopped >= 5
    state = ended(run)
    assert (state.status, state.attempt) == ("done", 2)
    steps = [row.step for row in history(run) if "train/loss" in row.numbers]
    assert steps == list(range(1, 157)), "no step was lost, none taken twice"
    assert ended(at_peace).attempt == 1
    same_result(run, at_peace)
    same_result(run, undisturbed, 1e-4)
    assert main(["logs", "two"]) == 0
    said = capsys.readouterr().out
    assert "node1 | " in said
    assert said.index("attempt 1") < said.index(": asked the run to save and stop") < said.index("attempt 2")


def test_the_time_limit_is_survived_in_one_wandb_run(undisturbed: Run, recipe: Path, cluster: Any) -> None:
    """Saved at the signal, queued again by the job itself, and then as if there had been no limit.

    The administrator sets the limit when the run trains: a short one from the start might end before torch is loaded.
    """
    run = slowed(recipe, "timed", ONE, *LONG, "tracking.wandb=offline")
    until(at_step(run, 5))
    limit = (seconds_of(cluster.show(int(job(run)))["RunTime"]) + 50) // 60 + 1
    slurm("scontrol", "update", f"JobId={job(run)}", f"TimeLimit={limit}")
    until(lambda: (State.of(run) or State("created")).status == "waiting")
    slurm("scontrol", "update", f"JobId={job(run)}", "TimeLimit=20")
    state = ended(run)
    assert state.status == "done"
    assert state.attempt > 1
    assert "the time limit is near, or the nodes are wanted; queued again (1 of at most 20)" in run.log.read_text()
    steps = [row.step for row in history(run) if "train/loss" in row.numbers]
    assert steps == list(range(1, 157))
    ids = {path.name.rpartition("-")[2] for path in (run.folder / "wandb").glob("offline-run-*")}
    assert len(ids) == 1
    same_result(run, undisturbed)


def test_preemption_is_survived(undisturbed: Run, recipe: Path) -> None:
    """A job of a better partition takes all nodes; the run waits, and goes on when they are free."""
    run = slowed(recipe, "preempted", ONE + "partition: debug\n", *LONG)
    until(at_step(run, 5))
    slurm("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    until(lambda: standing(run).status == "waiting")
    state = ended(run)
    assert (state.status, state.attempt) == ("done", 2)
    assert ": asked the run to save and stop" in run.log.read_text()
    same_result(run, undisturbed)


def test_preemption_with_a_warning_is_survived(undisturbed: Run, recipe: Path) -> None:
    """The partition gives time after the signal: the job queues itself again, once."""
    run = slowed(recipe, "warned", ONE + "partition: graced\n", *LONG)
    until(at_step(run, 5))
    slurm("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    until(lambda: (State.of(run) or State("created")).status == "waiting")
    state = ended(run)
    assert (state.status, state.attempt) == ("done", 2)
    same_result(run, undisturbed)


def test_dead_nodes_are_survived(undisturbed: Run, recipe: Path, cluster: Any) -> None:
    """One with all that ran on it, one whose slurmd only died: what lived on there finds another attempt, and ends."""
    hows = ("power-off", "kill")
    runs = {how: slowed(recipe, how, ONE + "exclusive: true\n", *LONG) for how in hows}
    until(lambda: all(at_step(run, 5)() for run in runs.values()))
    nodes = {how: standing(run).where.rpartition(" ")[2] for how, run in runs.items()}
    assert len(set(nodes.values())) == 2
    for how, node in nodes.items():
        assert cluster.script("node", how, node).returncode == 0
    try:
        for how, run in runs.items():
            until(at_attempt(run, 2))
            assert standing(run).where.rpartition(" ")[2] != nodes[how]
        states = [ended(run) for run in runs.values()]
    finally:
        for node in nodes.values():
            cluster.script("node", "start", node)
    for run, state in zip(runs.values(), states, strict=True):
        assert (state.status, state.attempt) == ("done", 2)
        same_result(run, undisturbed)
    left = f"{runs['kill'].folder}@{job(runs['kill'])}.0.0"
    until(lambda: not tether.members(left))


def test_a_node_that_falls_silent_is_no_failure_of_the_run(recipe: Path, cluster: Any) -> None:
    """Its trainer is gone, and what started it says nothing; SLURM, which often notices after minutes, is told."""
    run = launch(recipe, "silent", ONE + "nodes: 2\nsbatch: {hold: true}\n", *LIGHT)
    each_step(run, SLOW)
    patience = run.code / "launch" / "job.py"
    patience.write_text(patience.read_text().replace("PRESENT_SECONDS = 60.0", "PRESENT_SECONDS = 3.0"))
    slurm("scontrol", "release", job(run))
    until(at_step(run, 3))
    second = [pid for pid in cluster.processes() if b"SLURM_NODEID=1" in Path(f"/proc/{pid}/environ").read_bytes()]
    trainers = tether.members(f"{run.folder}@{job(run)}.0.1")
    for pid in sorted(second, key=trainers.__contains__):  # first what would see the trainer end
        os.kill(pid, signal.SIGKILL if pid in trainers else signal.SIGSTOP)
    state = ended(run)
    assert (state.status, state.attempt) == ("done", 2)
    assert "node 2 of 2 does not answer; queued again (1 of at most 20)" in run.log.read_text()
    assert len(losses(run)) == 14
    assert not list(run.folder.glob("present-*"))


def test_a_run_that_fails_is_not_queued_again(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The traceback of the process that failed comes first, not of the one that waits for it; no job waits any more."""
    second = ("--evaluate-on", str(profile(ONE, "second.yaml")))
    run = launch(recipe, "failing", ONE + "nodes: 2\nsbatch: {hold: true}\n", *LIGHT, *second)
    found = Submission.of(run)
    assert found is not None
    each_step(run, 'if not self._is_main: raise ValueError("the second node is broken")')
    slurm("scontrol", "release", found.job)
    state = ended(run)
    assert (state.status, state.attempt) == ("failed", 1)
    assert state.error == "ValueError: the second node is broken"
    capsys.readouterr()
    assert main(["status", "failing"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Traceback")
    assert f"failing failed: {state.error}" in said
    assert main(["logs", "failing"]) == 0
    assert capsys.readouterr().out.startswith("Traceback")
    until(lambda: "CANCELLED" in slurm("scontrol", "show", "job", found.evaluation))
    assert "Restarts=0" in slurm("scontrol", "show", "job", found.job)


def test_a_second_job_evaluates(recipe: Path) -> None:
    """On another profile, when the first has trained."""
    profile("cpus: 1\nmemory: 2G\npartition: short\ntime: 4\nsignal_seconds: 30\n", "second.yaml")
    run = launch(recipe, "apart", ONE, *LIGHT, "--evaluate-on", "second.yaml")
    found = Submission.of(run)
    assert found is not None
    state = ended(run)
    assert state.status == "done"
    assert run.report.is_file()
    until(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", found.evaluation))
    assert "Partition=short" in slurm("scontrol", "show", "job", found.evaluation)
    second = DelayedSubmission.load(run.slurm / f"{found.evaluation}_submitted.pkl").function
    assert isinstance(second, Job)
    assert second.cluster.partition == "short", "it goes by its own limits"


def test_cancelling_ends_it_for_good(recipe: Path) -> None:
    """While it runs, and while it waits; a checkpoint is kept, and resume goes on from it."""
    run = slowed(recipe, "cancelled", ONE, *LONG)
    until(at_step(run, 5))
    assert main(["cancel", "cancelled"]) == 0
    state = State.of(run)
    assert state is not None
    assert state.status == "cancelled"
    assert not slurm("squeue", "--noheader")
    assert run.complete_checkpoints()
    assert not tether.members(f"{run.folder}@{job(run)}.0.0")
    profile(ONE + "sbatch: {hold: true}\n", "longer.yaml")
    assert main(["resume", "cancelled", "--cluster", "longer.yaml"]) == 0
    assert standing(run).status == "waiting"
    assert main(["cancel", "cancelled"]) == 0
    assert standing(run).status == "cancelled"
    assert not slurm("squeue", "--noheader")


def test_scancel_is_no_reason_to_come_back(recipe: Path) -> None:
    """Whoever ends the job in SLURM's own way gets a stopped run with a checkpoint, not a new job."""
    run = slowed(recipe, "ended", ONE, *LONG)
    until(at_step(run, 5))
    slurm("scancel", job(run))
    state = ended(run)
    assert state.status == "stopped"
    assert run.complete_checkpoints()
    assert not slurm("squeue", "--noheader")


def test_a_job_that_comes_back_too_often_stays_away(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The profile's limit of one."""
    run = slowed(recipe, "looping", ONE + "requeues: 0\n", *LONG)
    until(at_step(run, 5))
    slurm("scontrol", "requeue", job(run))
    state = ended(run)
    assert state.status == "stopped"
    assert "`requeues` is 0" in state.note
    assert main(["status", "looping"]) == 0
    assert "`finllm resume looping` goes on" in capsys.readouterr().out


def test_a_sweep_is_one_array_with_one_report(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run folder for each cell, not more at once than the profile says, and a comparison at the end; resumed as one."""
    keys = ("--sweep", "train.learning_rate=1e-2,1e-3,1e-4", "--sweep", "lora.rank=2")
    text = ONE + "parallel: 2\n"
    launch_of(recipe, "grid", text + "sbatch: {hold: true}\n", *keys, *LIGHT)
    sweep = Sweep.of(run_called("grid").folder)
    assert len(sweep.runs) == 3
    assert main(["cancel", "grid"]) == 0
    assert not slurm("squeue", "--noheader")
    assert [standing(run).status for run in sweep.runs] == ["cancelled"] * 3
    first = job(sweep.runs[0])
    assert main(["resume", "grid", "--cluster", str(profile(text))]) == 0
    assert job(sweep.runs[0]).partition("_")[0] != first.partition("_")[0]
    most = 0
    while len(slurm("squeue", "--noheader", "--array")):
        most = max(most, len(slurm("squeue", "--noheader", "--array", "--states=RUNNING").splitlines()))
        time.sleep(0.3)
    assert most == 2
    assert [ended(run).status for run in sweep.runs] == ["done"] * 3
    assert {job(run).partition("_")[0] for run in sweep.runs} == {job(sweep.runs[0]).partition("_")[0]}
    report = (sweep.folder / "report.md").read_text()
    assert all(run.name in report for run in sweep.runs)
    assert main(["status", "grid"]) == 0
    assert capsys.readouterr().out.count("done") >= 3


REFUSED = {
    "partition: nowhere": "change partition",
    "account: nobody": "change account",
    "qos: best": "change qos",
    "gpus_per_node: 7\ngpu: a100-80gb": "gpus_per_node, gpu_type, cpus, memory or nodes",
    "partition: short": "change time",
    "constraint: quantum": "change constraint",
    "nodes: 99": "change nodes",
    "sbatch: {nonsense: 3}": "change sbatch",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_refused_profile_is_answered_in_slurms_words(
    recipe: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And with the key to change; nothing is left behind."""
    given = ["launch", str(recipe), "--name", "refused", "--cluster", str(profile(ONE + line + "\n")), *LIGHT]
    given += ["train.global_batch=693", "train.micro_batch=auto"]  # for 7 and for 99 processes
    assert main(given) == 2
    said = capsys.readouterr().err
    assert "SLURM refused the job" in said
    assert "sbatch: " in said or "error: " in said
    assert REFUSED[line] in said
    assert not list(Path(os.environ["FINLLM_RUNS"]).iterdir())
    assert not slurm("squeue", "--noheader")


def test_a_refused_evaluation_takes_the_training_out_of_the_queue(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have begun already; the answer names the profile."""
    second = profile("partition: nowhere\ntime: 4\nsignal_seconds: 30\n", "second.yaml")
    given = ["launch", str(recipe), "--name", "refused", "--cluster", str(profile(ONE)), "--evaluate-on", str(second)]
    assert main([*given, *LIGHT]) == 2
    assert "--evaluate-on: SLURM refused the job: " in capsys.readouterr().err
    assert not slurm("squeue", "--noheader")
    assert not list(Path(os.environ["FINLLM_RUNS"]).iterdir())


def test_a_cluster_without_accounting_does_as_well(recipe: Path, bare_cluster: Any) -> None:  # noqa: ARG001
    """Sacct fails there; squeue and scontrol know enough."""
    assert subprocess.run(["sacct"], capture_output=True, check=False).returncode
    run = launch(recipe, "bare", ONE, *LIGHT)
    assert ended(run).status == "done"
    assert run.report.is_file()


def test_a_job_that_dies_before_it_begins_is_lost_and_says_why(recipe: Path) -> None:
    """Here the interpreter of the profile is not on the node."""
    run = launch(recipe, "unborn", ONE + "python: /no/such/python\n", *LIGHT)
    until(lambda: standing(run).status == "lost")
    assert "FAILED" in standing(run).error
    assert "/no/such/python" in standing(run).error
