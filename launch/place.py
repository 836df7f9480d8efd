"""Where a run is supervised: what a supervisor does here, and differently on a node of a cluster."""

import contextlib
import fcntl
import os
import re
import signal
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from finllm.errors import RunError
from finllm.plan import Plan
from finllm.run import Run, State
from launch import tether
from launch.show import called

Stage = Literal["train", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)
WAITING = "PASSIVE"
"""For OMP_WAIT_POLICY: threads that spin while they wait take the core that the others wait for, where other programs
run too. Two threads beside another busy process: 2.1 s instead of 12 s for a forward pass of SmolLM2 over 1,024 tokens."""


@dataclass(frozen=True)
class Seen:
    """How a run stands, as its backend sees it."""

    status: str
    """As in state.json, or `lost`; on a cluster also `starting`."""
    where: str
    waits_for: str = ""
    """Why it has not started yet, in SLURM's word."""
    error: str = ""


class Here:
    """One machine, as the place where a run is supervised; a node of a cluster differs in some of it."""

    backend = "local"
    grace = "(Ctrl-C again: end it now)"
    """What more there is to say to somebody who has asked the run to stop."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.mark = mark(run)
        self.processes = Plan.of(run).processes
        """On this machine."""
        self.received: list[tuple[int, float]] = []
        """Signals that asked for an end, with their time (monotonic seconds)."""

    @property
    def signals(self) -> list[signal.Signals]:
        """Those that ask for an end."""
        closing = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN  # nohup: the closing terminal shall not matter
        return [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if closing else [])]

    @property
    def wait(self) -> float:
        """Seconds that a trainer may take to save its checkpoint and end."""
        return stop_seconds()

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Refuses a second supervisor of the same run."""
        return _alone(self.run)

    def named(self) -> dict[str, str]:
        """What state.json says of this place."""
        return {"host": socket.gethostname()}

    def holds(self, _state: State) -> bool:
        """Whether the run is still this supervisor's."""
        return True

    def lost(self) -> str:
        """What of the place has gone, so that a stage failed; it is no failure of the run then."""
        return ""

    def command(self, _stage: Stage, command: Sequence[str]) -> Sequence[str]:
        """What is started here for a stage of which the plan says `command`."""
        return command


def mark(run: Run) -> str:
    """What every process of the run carries in its environment."""
    return str(run.folder.resolve())


def stop_seconds() -> float:
    """How long a trainer may take to save its checkpoint and end, before it is ended: $FINLLM_STOP_SECONDS, or 120."""
    text = os.environ.get("FINLLM_STOP_SECONDS", "120")
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise RunError(
            f"FINLLM_STOP_SECONDS is {text!r} in the environment; it must be a number of seconds, such as 300"
        )
    return float(text)


def environment_of(plan: Plan, stage: Stage, place: Here) -> dict[str, str]:
    """The environment in which a stage runs."""
    own = {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",  # tokenizers warn of it when a data loader forks
        # torchrun kills its workers 30 s after SIGTERM, which may be in the middle of a checkpoint
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(place.wait + tether.KILL_SECONDS + 60)),
    }
    if plan.device == "cpu":  # else accelerate shares out all cores, also those that are not ours
        threads = len(os.sched_getaffinity(0)) // (place.processes if stage == "train" else plan.evaluators)
        own["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, threads)))
        own["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", WAITING)
        own["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed, which Accelerate imports where it is installed, warns of it
    return {**os.environ, **own}


@contextlib.contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Refuse a second supervisor of the same run; the lock goes with the process, however it ends."""
    with (run.folder / "supervisor.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{run.name} is being run already; see `finllm status {called(run)}`") from error
        yield
