"""What tests do to runs on the cluster, and what they see of them."""

import contextlib
import io
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from finllm.journal import history
from finllm.run import Progress, Run, State
from launch import tables
from launch.cli import main
from launch.submission import Submission
from launch.tables import Standing

ONE = "cpus: 1\nmemory: 2G\ntime: 20\nsignal_seconds: 30\n"
LIGHT = ("evaluation.base=false", "evaluation.baselines=[]", "evaluation.bootstrap_draws=100")
LONG = (*LIGHT, "train.epochs=6", "train.global_batch=2", "train.micro_batch=1")
"""156 steps."""
SLOW = 'time.sleep(0 if "SLURM_RESTART_COUNT" in __import__("os").environ else min(state.global_step, 10) / 5)'
"""The tenth step and those after it take 2 s until SLURM has started the job again."""


def profile(text: str, name: str = "cluster.yaml") -> Path:
    Path(name).write_text(text)
    return Path(name)


def launch(recipe: Path, name: str, text: str, *given: str) -> Run:
    said("launch", str(recipe), "--name", name, "--cluster", str(profile(text)), *given)
    return run_called(name)


def slowed(recipe: Path, name: str, text: str, *given: str, nodelist: str = "") -> Run:
    """A long run that takes minutes until SLURM has started it again, so that it does not end before it is disturbed."""
    place = f", nodelist: {nodelist}" if nodelist else ""
    run = launch(recipe, name, f"{text}sbatch: {{hold: true{place}}}\n", *LONG, *given)
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


def said(*command: str) -> str:
    """What `finllm` prints where it succeeds."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(list(command)) == 0
    return printed.getvalue()


def slurm(*command: str) -> str:
    """What one of SLURM's commands prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def standing(run: Run) -> Standing:
    return tables.standings([run])[0]


def submission(run: Run) -> Submission:
    found = Submission.of(run)
    assert found is not None
    return found


def job(run: Run) -> str:
    return submission(run).job


def node(run: Run) -> str:
    """The node on which the run is."""
    return standing(run).where.rpartition(" ")[2]


def queued(*runs: Run) -> bool:
    """Whether a job of these runs waits or runs."""
    return bool(slurm("squeue", "--noheader", f"--jobs={','.join(job(run) for run in runs)}"))


def state_of(run: Run) -> State:
    return State.of(run) or State("created")


def has_ended(run: Run) -> Callable[[], bool]:
    """Whether its jobs have left the queue."""
    return lambda: standing(run).status not in ("waiting", "starting", "running", "created")


def at_step(run: Run, step: int) -> Callable[[], bool]:
    def reached() -> bool:
        now = Progress.of(run)
        return now is not None and now.stage == "training" and now.done >= step

    return reached


def at_attempt(run: Run, number: int) -> Callable[[], bool]:
    return lambda: state_of(run).attempt >= number


def steps(run: Run) -> list[int | None]:
    """Those whose loss was logged, as often as it was."""
    return [row.step for row in history(run) if "train/loss" in row.numbers]


def losses(run: Run) -> list[float]:
    return list({r.step: r.numbers["train/loss"] for r in history(run) if "train/loss" in r.numbers}.values())


def same_result(run: Run, other: Run, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(losses(run), losses(other), rtol=0, atol=tolerance)
    mine, theirs = (load_file(r.adapter / "adapter_model.safetensors") for r in (run, other))
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=tolerance)


def seconds_of(clock: str) -> int:
    """SLURM's HH:MM:SS."""
    hours, minutes, seconds = map(int, clock.split(":"))
    return (hours * 60 + minutes) * 60 + seconds
