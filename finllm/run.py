"""The run folder: the only thing that the parts of one execution share."""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from finllm.errors import RunError
from finllm.files import read_json, write_json

COMPLETE = "COMPLETE"
"""Marker file of a checkpoint that was written whole; one without it does not count."""


@dataclass(frozen=True)
class Run:
    """Where everything of one run stands."""

    folder: Path

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.folder.name

    @property
    def recipe(self) -> Path:
        """What was asked for, resolved: YAML that repeats the run."""
        return self.folder / "recipe.yaml"

    @property
    def plan(self) -> Path:
        """What was decided before the run began."""
        return self.folder / "plan.json"

    @property
    def accelerate(self) -> Path:
        """Accelerate's configuration file."""
        return self.folder / "accelerate.yaml"

    @property
    def accelerate_evaluation(self) -> Path:
        """Accelerate's configuration file of an evaluation by several processes."""
        return self.folder / "accelerate-evaluate.yaml"

    @property
    def deepspeed(self) -> Path:
        """DeepSpeed's configuration file, where it trains."""
        return self.folder / "deepspeed.json"

    @property
    def state(self) -> Path:
        """Written by whoever started the run."""
        return self.folder / "state.json"

    @property
    def progress(self) -> Path:
        """Written by the process that works."""
        return self.folder / "progress.json"

    @property
    def stop_request(self) -> Path:
        """Exists when the trainer shall save a checkpoint and end."""
        return self.folder / "STOP"

    @property
    def log(self) -> Path:
        """What all processes have said, over all attempts."""
        return self.folder / "log.txt"

    def log_of(self, node: int) -> Path:
        """What the processes of one node have said; those of the first are in `log`."""
        return self.log if node == 0 else self.folder / f"log-node{node}.txt"

    @property
    def logs(self) -> list[Path]:
        """The log of each node, the first node's first."""
        others = sorted(self.folder.glob("log-node*.txt"), key=lambda path: int(path.stem.removeprefix("log-node")))
        return [self.log, *others]

    @property
    def cluster(self) -> Path:
        """The cluster profile that the run was submitted with."""
        return self.folder / "cluster.json"

    @property
    def code(self) -> Path:
        """Our own code as it was when the run was submitted."""
        return self.folder / "code"

    @property
    def slurm(self) -> Path:
        """What was submitted, and what SLURM and the start of the job have said."""
        return self.folder / "slurm"

    @property
    def submission(self) -> Path:
        """The jobs of the run in the queue of the cluster."""
        return self.folder / "submission.json"

    @property
    def turn(self) -> Path:
        """What the nodes of a job shall start next; written by the first."""
        return self.folder / "turn.json"

    @property
    def metrics(self) -> Path:
        """Every figure that W&B gets, one JSON object a line."""
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Where the trainer saves; see `complete_checkpoints`."""
        return self.folder / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained weights, in PEFT's format (or the whole model where all weights were trained)."""
        return self.folder / "adapter"

    @property
    def predictions(self) -> Path:
        """One file for each data set."""
        return self.folder / "predictions"

    @property
    def scores(self) -> Path:
        """What the report is made from."""
        return self.folder / "scores.json"

    @property
    def report(self) -> Path:
        """The comparison, in Markdown."""
        return self.folder / "report.md"

    @property
    def page(self) -> Path:
        """The same as one HTML page."""
        return self.report.with_suffix(".html")

    def complete_checkpoints(self) -> list[Path]:
        """Checkpoints that were written whole, oldest first."""
        found = [(int(match[1]), path) for path in self.checkpoints.glob("checkpoint-*") if (match := _step(path))]
        return [path for _, path in sorted(found) if (path / COMPLETE).is_file()]


def _step(checkpoint: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)


def create(runs: Path, name: str) -> Run:
    """A new, empty run folder `runs/name`, or `runs/name-2` and so on where that is taken."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RunError(f"{name!r} is no name for a run; use letters, digits, '.', '_' and '-', such as demo-lr2e-4")
    runs.mkdir(parents=True, exist_ok=True)
    for number in range(1, 10_000):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()  # fails where it exists, so that two launches never share a folder
        except FileExistsError:
            continue
        return Run(folder.absolute())
    raise RunError(f"{runs}: has 9,999 runs called {name}; choose another --name")


def find(name: str, runs: Path) -> Run:
    """The run of that name in `runs`, or in the folder that `name` is a path of."""
    for folder in (runs / name, Path(name)):
        if (folder / "plan.json").is_file():
            return Run(folder.absolute())
    known = sorted(path.parent.name for path in runs.glob("*/plan.json"))
    listed = f"there are: {', '.join(known[-8:])}" if known else "there are none yet; `finllm launch RECIPE` makes one"
    raise RunError(f"no run {name!r} in {runs.absolute()} and no run folder of that path; {listed}")


Status = Literal["created", "waiting", "running", "stopped", "cancelled", "failed", "done"]
ALIVE: tuple[Status, ...] = ("created", "waiting", "running")
"""States that are not an end."""


@dataclass(frozen=True)
class State:
    """How a run stands, as its launcher sees it."""

    status: Status
    stage: Literal["train", "evaluate", "report"] = "train"
    """Where it is, or where it ended."""
    attempt: int = 1
    backend: str = "local"
    host: str = ""
    pid: int = 0
    """The launcher."""
    pid_started: float = 0.0
    """When that process started, in clock ticks since boot: a PID alone may have been given to another."""
    group: int = 0
    """Process group of the trainer or evaluator, to be signalled as one."""
    started: str = ""
    ended: str = ""
    error: str = ""
    """Last line of what went wrong."""
    note: str = ""
    """What happened on the way: why the run was queued again, what changed in the plan because memory ran out."""
    holder: str = ""
    """Which attempt may write here: one that lost its node, and lives on, finds another's name and ends."""

    def with_(self, **changes: Any) -> Self:
        """The state after these changes."""
        return replace(self, **changes)

    def save(self, run: Run) -> None:
        """Write it into the run folder, whole or not at all."""
        write_json(run.state, asdict(self))

    @classmethod
    def of(cls, run: Run) -> "State | None":
        """The state of a run; None where it was started without the launcher."""
        return cls(**read_json(run.state)) if run.state.is_file() else None


@dataclass(frozen=True)
class Progress:
    """How far the work is, as the working process sees it."""

    stage: str
    """What is being done, in words: `training`, `scoring sample with the base model`."""
    done: int = 0
    total: int = 0
    """0 where the end is not known."""
    unit: str = "step"
    seconds: float = 0.0
    """Since this stage began."""
    loss: float | None = None
    first: int = 0
    """Steps that an earlier attempt has done; `seconds` does not count them."""
    error: str = ""
    """What went wrong, with its traceback, where the work failed."""
    outcome: Literal["", "done", "stopped", "failed"] = ""
    """How the stage ended; `accelerate launch` does not pass a worker's exit status on."""
    cause: Literal["", "out of memory"] = ""
    """Why it failed, where something can be done about that without a person."""

    @property
    def seconds_left(self) -> float | None:
        """By the pace so far; None before there is one."""
        if self.done <= self.first or not self.total:
            return None
        return self.seconds / (self.done - self.first) * max(self.total - self.done, 0)

    def save(self, run: Run) -> None:
        """Write it into the run folder, whole or not at all."""
        write_json(run.progress, asdict(self))

    @classmethod
    def of(cls, run: Run) -> "Progress | None":
        """The progress of a run; None before its first step."""
        return cls(**read_json(run.progress)) if run.progress.is_file() else None
