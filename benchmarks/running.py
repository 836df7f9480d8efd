"""Runs of the command for experiments: several share one machine, what is done is kept, and time has an end.

A run that is there is gone on with, and left alone once it is done: a command that was cut can be given again.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from finllm.run import Run

SAID = 3000
"""Characters of a failed command's last words that are kept."""


@dataclass(frozen=True)
class Job:
    """One run: what it is called, its recipe and changes, and the folder that holds it, which is its own."""

    name: str
    recipe: Path
    overrides: tuple[str, ...]
    runs: Path
    evaluated: bool = True

    @property
    def run(self) -> Run:
        """The run, which is named as the recipe."""
        return Run(self.runs / self.recipe.stem)

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.run.adapter.is_dir() and (self.run.scores.is_file() or not self.evaluated)


@dataclass(frozen=True)
class Done:
    """How a job ended; `failed` is empty where it is done, and says why where it is not."""

    job: Job
    seconds: float
    failed: str = ""


class Workers:
    """At most so many jobs at once, and none beyond so many minutes from now: those are stopped, and go on next time."""

    def __init__(self, at_once: int, minutes: float | None = None, threads: int = 2) -> None:
        """`threads` are those of each run on the processor. Each GPU that is visible takes an equal part of the runs."""
        self._pool = ThreadPoolExecutor(at_once)
        self._gpus: Queue[str] = Queue()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        for slot in range(at_once):
            self._gpus.put(visible[slot % len(visible)])
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._threads = threads

    def start(self, job: Job) -> Future[Done]:
        """Begin a job as soon as there is room."""
        return self._pool.submit(self._do, job)

    def all(self, jobs: Sequence[Job]) -> list[Done]:
        """Every job's end, in the order of the jobs."""
        return [future.result() for future in [self.start(job) for job in jobs]]

    def _do(self, job: Job) -> Done:
        began = time.monotonic()
        failed = "" if job.done else self._train(job) or self._evaluate(job)
        return Done(job, round(time.monotonic() - began, 1), failed)

    def _train(self, job: Job) -> str:
        if job.run.adapter.is_dir():
            return ""
        if job.run.plan.is_file():
            return self._command(job, "train", str(job.run.folder))
        shutil.rmtree(job.run.folder, ignore_errors=True)  # stopped before it had a plan
        return self._command(job, "train", str(job.recipe), *job.overrides, "tracking.wandb=disabled")

    def _evaluate(self, job: Job) -> str:
        return self._command(job, "evaluate", str(job.run.folder)) if job.evaluated else ""

    def _command(self, job: Job, module: str, *arguments: str) -> str:
        """Run a module of finllm; returns what it said where it failed, or that time is up."""
        left = None if self._end is None else self._end - time.monotonic()
        if left is not None and left < 1:
            return "no time left; give the command again"
        environment = {**os.environ, "FINLLM_RUNS": str(job.runs), "OMP_NUM_THREADS": str(self._threads)}
        gpu = self._gpus.get()
        environment |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        asked = [sys.executable, "-m", f"finllm.{module}", *arguments]
        try:
            done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False, timeout=left)
        except subprocess.TimeoutExpired:
            return f"{module} was stopped, as time was up; give the command again"
        finally:
            self._gpus.put(gpu)
        return "" if done.returncode == 0 else (done.stdout + done.stderr)[-SAID:]
