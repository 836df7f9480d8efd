"""What a SLURM job runs: on each node one of these, which starts `accelerate launch` there, and survives for it.

submitit takes it to the nodes. What submitit does on a signal is replaced: it would queue the job again while
`accelerate launch` and its trainers, which it does not know of, live on (measured with submitit 1.5.4). Here the first
node supervises as on a workstation: a signal makes it ask the trainer to save, wait for all processes to end, and queue
the job again. The others start what it announces in turn.json and say how that ended.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finllm.errors import RunError
from finllm.files import read_json, write_json
from finllm.plan import Plan
from finllm.run import Progress, Run, State
from finllm.sweeps import Sweep, write_report
from launch import scheduler, tether
from launch.cluster import Cluster
from launch.place import Here, Stage, environment_of
from launch.show import Silent
from launch.supervisor import SupersededError, supervise

FENCE_SECONDS = 2.0
"""Between two looks at who has the run."""
POLL_SECONDS = 0.5
"""Between two looks for what to start next."""
REQUEUE_SECONDS = 120.0
"""In which SLURM ends a job that it has put back into the queue."""
PRESENT_SECONDS = 60.0
"""In which a node that lives says so, over a shared file system that is slow to show what is new."""
PORTS = range(20_000, 60_000)
WORDS = {"SIGUSR2": "the time limit is near, or the nodes are wanted", "SIGTERM": "SLURM wants the nodes back"}


@dataclass(frozen=True)
class Job:
    """A callable for submitit: stages of one run, in one job."""

    folder: str
    stages: tuple[Stage, ...]
    cluster: Cluster
    """The profile that it was submitted with."""
    evaluated_elsewhere: bool = False
    """Another job waits to evaluate what this one trains."""
    sweep: str = ""
    """Folder of the sweep of which this run is a cell."""

    def __call__(self) -> str:
        """Do this node's part; raises RunError where the run did not come to its end and is not queued again."""
        node = Node(Run(Path(self.folder)), self.cluster)
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):
            signal.signal(number, node.note)  # submitit has set its own
        return node.follow() if node.index else self._lead(node)

    def _lead(self, node: "Node") -> str:
        run = node.run
        node.refuse_loop()
        try:
            state = supervise(run, Silent(), self.stages, node)
        except SupersededError as error:
            return str(error)
        finally:
            node.dismiss()
        if state.status == "stopped" and node.reason:
            state = node.requeue(state, node.reason)
        if self.sweep and state.status in ("done", "failed"):
            write_report(Sweep.of(Path(self.sweep)))
        if state.status == "done":
            if self.evaluated_elsewhere:
                state.with_(status="waiting", stage="evaluate", ended="").save(run)
            return "done"
        raise RunError(f"{run.name}: {state.status} {state.error}".rstrip())


class Node(Here):
    """One node of a job."""

    backend = "slurm"
    grace = ""

    def __init__(self, run: Run, cluster: Cluster) -> None:
        super().__init__(run)
        plan = Plan.of(run)
        self._plan = plan
        self._cluster = cluster
        self.index = int(os.environ["SLURM_NODEID"])
        self.processes = plan.processes // plan.nodes
        self.name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.job = _job_id()
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.mark = f"{run.folder.resolve()}@{self._identity}.{self.index}"
        self._turn = 0
        self._lost = ""
        self._ended_by_slurm = False
        self._looked = 0.0

    def note(self, number: int, _: object) -> None:
        """What this process does on a signal before and after it supervises: it may come before the first stage."""
        if number != signal.SIGCONT:
            self.received.append((number, time.monotonic()))
        self._ended_by_slurm |= number == signal.SIGTERM

    @property
    def _identity(self) -> str:
        """Names one attempt of the job, on all its nodes alike."""
        return f"{self.job}.{self.restarts}"

    @property
    def signals(self) -> list[signal.Signals]:
        """Those that SLURM sends before a time limit, and when it takes the nodes."""
        return [signal.SIGTERM, signal.SIGUSR2]

    @property
    def wait(self) -> float:
        """Seconds that a trainer may take to save its checkpoint and end."""
        return self._cluster.wait

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """No lock: that of a node that has gone might stay. `holds` takes its place."""
        return contextlib.nullcontext()

    def named(self) -> dict[str, str]:
        """What state.json says of this place."""
        return {"host": os.environ.get("SLURM_JOB_NODELIST", self.name), "holder": self._identity}

    def holds(self, state: State) -> bool:
        """Whether no later attempt has taken the run: SLURM starts one when it has lost touch with this node."""
        if time.monotonic() < self._looked + FENCE_SECONDS:
            return True
        self._looked = time.monotonic()
        now = State.of(self.run)
        return now is None or now.holder == state.holder

    def command(self, stage: Stage, command: Sequence[str]) -> Sequence[str]:
        """The plan's command; for training on several nodes with where they meet, which the others are told too."""
        if stage != "train" or self._plan.nodes == 1:
            return command
        self._turn += 1
        port = _free_port(self.job, self.restarts + self._turn)
        self._announce({"number": self._turn, "host": self.name, "port": port})
        return with_rank(command, self.name, port, self.index)

    def refuse_loop(self) -> None:
        """Raise RunError where the job has started too often."""
        limit = self._cluster.requeues
        if self.restarts <= limit:
            return
        said = f"the job has started again {self.restarts} times, and `requeues` is {limit}"
        state = State.of(self.run) or State("waiting")
        state.with_(status="stopped", note=said).save(self.run)
        raise RunError(f"{self.run.name}: {said}; `finllm resume` goes on from the last checkpoint")

    @property
    def reason(self) -> str:
        """Why the job is to be queued again; empty where there is no reason."""
        return self._lost or (WORDS[signal.Signals(self.received[0][0]).name] if self.received else "")

    def requeue(self, state: State, why: str) -> State:
        """Put the job back into the queue, unless SLURM has done so or has ended it; returns only where it cannot."""
        state = state.with_(note=why)
        if scheduler.look([self.job])[self.job].state != "RUNNING":
            self._say(f"{why}: SLURM itself has ended the job, or queued it again")
            state.save(self.run)
        else:
            self._queue_again(state, why)
        return State.of(self.run) or state

    def _queue_again(self, state: State, why: str) -> None:
        limit = self._cluster.requeues
        if self.restarts >= limit:
            note = f"{why}; not queued again, since that has been done {self.restarts} times and `requeues` is {limit}"
            state.with_(note=note).save(self.run)
            self._say(note)
            return
        note = f"{why}; queued again ({self.restarts + 1} of at most {limit})"
        state.with_(status="waiting", note=note, ended="").save(self.run)
        self._say(note)
        refused = scheduler.requeue(self.job)
        if refused:
            note = f"{why}; the job could not be queued again: {refused}"
            state.with_(note=note).save(self.run)
            self._say(note)
            return
        until = time.monotonic() + REQUEUE_SECONDS
        while not self._ended_by_slurm and time.monotonic() < until:
            time.sleep(tether.POLL_SECONDS)

    def follow(self) -> str:
        """Start what the first node announces, one after the other, until it says that all is over."""
        done = 0
        while not (turn := self._told()).get("over"):
            number = turn.get("number", 0)
            if number > done:
                done = number
                self._take_part(turn)
            time.sleep(POLL_SECONDS)
        return f"{self.name}: {done} turn(s)"

    def lost(self) -> str:
        """Which nodes say nothing any more: what has failed here then came of it, and SLURM may not know yet."""
        indices = range(1, self._plan.nodes) if self._turn else ()
        for index in indices:
            self._presence(index).unlink(missing_ok=True)
        if self._turn:  # what is on several nodes has begun
            self._announce({"number": self._turn, "roll": True})
        until = time.monotonic() + PRESENT_SECONDS
        while missing := [str(index + 1) for index in indices if not self._presence(index).exists()]:
            if self._ended_by_slurm or time.monotonic() > until:
                self._lost = f"node {' and '.join(missing)} of {self._plan.nodes} does not answer"
                break
            time.sleep(POLL_SECONDS)
        return self._lost

    def _presence(self, index: int) -> Path:
        return self.run.folder / f"present-{self._identity}-{index}"

    def dismiss(self) -> None:
        """Tell the other nodes that all is over."""
        if self._plan.nodes > 1:
            self._announce({"over": True})
        for presence in self.run.folder.glob("present-*"):
            presence.unlink(missing_ok=True)

    def _take_part(self, turn: dict[str, Any]) -> None:
        """Run this node's processes of a turn; where they fail without a word, say so for them."""
        plan = Plan.of(self.run)  # it may have been lowered meanwhile
        command = with_rank(plan.commands["train"], turn["host"], turn["port"], self.index)
        with self.run.log_of(self.index).open("ab") as log:
            log.write(f"[finllm] {self.name}: turn {turn['number']} of job {self._identity}\n".encode())
            log.flush()
            environment = environment_of(plan, "train", self)
            child = tether.start(command, self.mark, self.run.stop_request, self.wait, log, environment)
            assert child.stdin is not None, "the tether's life line is a pipe"
            status = self._attend(child, turn["number"])
            child.stdin.close()
        progress = Progress.of(self.run) or Progress("training")
        if status and not progress.outcome and not self.run.stop_request.exists():
            said = (
                f"{self.name}: its processes ended with exit status {status}; {self.run.log_of(self.index)} may say why"
            )
            replace(progress, outcome="failed", error=said).save(self.run)

    def _attend(self, child: "subprocess.Popen[bytes]", number: int) -> int:
        """Wait for the processes of this node, and end them where the first node has gone on without them."""
        while child.poll() is None:
            turn = self._told()
            if turn.get("over") or turn.get("number", number) > number:
                tether.end(self.mark, tether.KILL_SECONDS)
            time.sleep(POLL_SECONDS)
        tether.end(self.mark, 0)
        return child.wait()

    def _told(self) -> dict[str, Any]:
        """What the first node of this attempt has announced last; where it calls the roll, this one answers."""
        turn = read_json(self.run.turn) if self.run.turn.is_file() else {}
        if turn.get("attempt") != self._identity:
            return {}
        if turn.get("roll"):
            self._presence(self.index).touch()
        return turn

    def _announce(self, turn: dict[str, object]) -> None:
        write_json(self.run.turn, {"attempt": self._identity, **turn})

    def _say(self, text: str) -> None:
        with self.run.log.open("a", encoding="utf-8") as log:
            log.write(f"[finllm] {text}\n")


def with_rank(command: Sequence[str], host: str, port: int | str, rank: int | str) -> tuple[str, ...]:
    """A command of `accelerate launch` as one of several nodes starts it."""
    at = list(command).index("-m", list(command).index("--config_file"))
    meeting = ("--main_process_ip", host, "--main_process_port", str(port), "--machine_rank", str(rank))
    return (*command[:at], *meeting, *command[at:])


def _job_id() -> str:
    array, number = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{number}" if array else os.environ["SLURM_JOB_ID"]


def _free_port(job: str, turn: int) -> int:
    """A port that follows from the job, so that jobs on one node do not meet, or the next that is free."""
    start = int(job.replace("_", "")) * 31 + turn
    for number in range(len(PORTS)):
        port = PORTS[(start + number) % len(PORTS)]
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise RunError(f"no port from {PORTS.start} to {PORTS.stop} is free on {socket.gethostname()}")
