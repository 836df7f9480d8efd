"""The supervisor of a local run: starts each stage, shows it, passes requests to stop on, keeps state.json."""

import contextlib
import fcntl
import itertools
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Literal, get_args

from finllm.errors import RunError
from finllm.plan import Plan
from finllm.run import Progress, Run, State, Status, write_json, write_text
from launch import tether
from launch.lowering import ADVICE, lowered
from launch.show import Silent, Tail, View, called

Stage = Literal["train", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)
WAITING = "PASSIVE"
"""For OMP_WAIT_POLICY: threads that spin while they wait take the core that the others wait for, where other programs
run too. Two threads beside another busy process: 2.1 s instead of 12 s for a forward pass of SmolLM2 over 1,024 tokens."""
OTHERS_SECONDS = 15.0
"""In which the processes of a run in which one ran out of memory may end by themselves."""
SAME_KEYPRESS_SECONDS = 0.5
"""Wrappers such as `uv run` pass Ctrl-C on although it has arrived already; two within this time are one."""
ERROR_LINE = r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b"
LAUNCHER_ERRORS = ("subprocess.CalledProcessError", "torch.distributed.elastic")
"""What `accelerate launch` and torchrun say when a trainer failed: true, and not the cause."""


def supervise(run: Run, view: View, stages: Sequence[Stage] = STAGES) -> State:
    """Run those stages of the plan that are not done yet, one after the other; returns the state at the end."""
    with _alone(run), _signals() as received:
        return _Supervisor(run, view, received).attend(stages)


def detached() -> None:
    """Entry of a supervisor that has no terminal: `FOLDER STAGE...` are its arguments."""
    folder, *stages = sys.argv[1:]
    supervise(Run(Path(folder)), Silent(), [stage for stage in STAGES if stage in stages])


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


def now() -> str:
    """The time as state.json has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Supervisor:
    """One attempt at a run."""

    def __init__(self, run: Run, view: View, received: list[tuple[int, float]]) -> None:
        self._run, self._view, self._received = run, view, received
        self._plan = Plan.of(run)
        self._mark = mark(run)
        self._wait = stop_seconds()
        self._log_start = run.log.stat().st_size if run.log.exists() else 0
        self._tail = Tail(run.log, self._log_start)
        self._before = State.of(run) or State("created")
        self._state = self._before
        self._killed_by = ""

    def attend(self, stages: Sequence[Stage]) -> State:
        self._run.stop_request.unlink(missing_ok=True)
        again = self._before.status != "created" and "train" in stages
        self._change(
            status="running", attempt=self._before.attempt + again, backend="local", host=socket.gethostname(),
            pid=os.getpid(), pid_started=tether.start_ticks(os.getpid()), started=now(), ended="", error="",
        )  # fmt: skip
        for stage in self._left(stages):
            end = self._tried(stage)
            if end != "done":
                return self._ended(end)
        return self._ended("done")

    def _left(self, stages: Sequence[Stage]) -> list[Stage]:
        """The stages that are still to be done."""
        left = [stage for stage in stages if stage in self._plan.commands]
        if "train" in left and self._run.adapter.is_dir():  # it gets its name when it is whole
            self._say("the training is complete already; going on after it")
            left.remove("train")
        return left

    def _tried(self, stage: Stage) -> Status:
        """Run one stage, with ever lower plans while memory runs out; returns what it means for the run."""
        while True:
            # 128 + SIGTERM stands for a stage that was not begun because somebody wanted the run to stop
            status = 128 + signal.SIGTERM if self._stop_asked() else self._work(stage)
            end = self._end_of(stage, status)
            if end != "failed" or self._stop_asked() or not self._out_of_memory() or not self._lower(stage):
                return end

    def _lower(self, stage: Stage) -> bool:
        """Put a plan for less memory into the run folder, beside the one before; False where there is none."""
        found = lowered(self._plan, stage)
        if found is None:
            return False
        before = self._state.attempt
        write_text(self._run.folder / f"plan-attempt{before}.json", self._run.plan.read_text(encoding="utf-8"))
        self._plan, changes = found
        write_json(self._run.plan, self._plan.model_dump(mode="json"))
        kept = self._run.complete_checkpoints() if stage == "train" else []
        start = kept[-1].name if kept else "the beginning"
        note = f"attempt {before} ran out of memory; now {changes}"
        self._say(f"{note}; from {start}")
        self._change(attempt=before + 1, note=note)
        return True

    def _out_of_memory(self) -> bool:
        progress = Progress.of(self._run)
        return progress is not None and progress.cause == "out of memory"

    def _work(self, stage: Stage) -> int:
        """Run one stage; returns its exit status, 128 + N where signal N ended it."""
        self._run.progress.unlink(missing_ok=True)  # of the stage before, or of the attempt before
        self._change(stage=stage)
        self._say(f"attempt {self._state.attempt}, {stage}, {now()}")
        with self._run.log.open("ab") as log:
            child = tether.start(self._plan.commands[stage], self._mark, self._wait, log, self._environment(stage))
        assert child.stdin is not None, "the tether's life line is a pipe"
        try:
            self._change(group=child.pid)
            while child.poll() is None:
                if self._stop_asked():
                    self._stop()
                elif self._out_of_memory():  # the others would wait for the process that has gone
                    tether.end(self._mark, OTHERS_SECONDS)
                self._show()
                time.sleep(tether.POLL_SECONDS)
            tether.end(self._mark, 0)  # where somebody has killed the tether
        finally:
            child.stdin.close()  # on an error here, the tether lets the trainer save, and ends it
            status = child.wait()
        self._show()
        status = status if status >= 0 else 128 - status
        if 128 < status <= 128 + signal.SIGRTMAX:
            self._killed_by = signal.Signals(status - 128).name
        return status

    def _environment(self, stage: Stage) -> dict[str, str]:
        own = {
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",  # tokenizers warn of it when a data loader forks
            # torchrun kills its workers 30 s after SIGTERM, which may be in the middle of a checkpoint
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(self._wait + tether.KILL_SECONDS + 60)),
        }
        if self._plan.device == "cpu":  # else accelerate shares out all cores, also those that are not ours
            threads = len(os.sched_getaffinity(0)) // (self._plan.processes if stage == "train" else 1)
            own["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, threads)))
            own["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", WAITING)
        return {**os.environ, **own}

    def _stop_asked(self) -> bool:
        """Whether somebody wants the run to stop; passes a signal on to the trainer."""
        if self._received and not self._run.stop_request.exists():
            name = signal.Signals(self._received[0][0]).name
            self._say(
                f"{'Ctrl-C' if name == 'SIGINT' else name}: asked the run to save and stop; it has {self._wait:.0f} s "
                "(Ctrl-C again: end it now)"
            )
            write_text(self._run.stop_request, "stop\n")
        return self._run.stop_request.exists()

    def _stop(self) -> None:
        """Wait for the end that was asked for, or bring it about."""
        ending = tether.end(self._mark, self._wait, self._haste)
        if ending.by != "itself":
            self._say(f"the run did not end by itself and was ended by {ending.by}")
        if ending.left:
            self._say(f"process(es) {', '.join(map(str, ending.left))} cannot be killed; they wait for a device")

    def _haste(self) -> int:
        """0 to wait, 1 after a second Ctrl-C, 2 after a third."""
        self._show()
        presses = [when for number, when in self._received if number == signal.SIGINT]
        apart = [b for a, b in itertools.pairwise(presses) if b - a > SAME_KEYPRESS_SECONDS]
        return min(2, len(apart))

    def _end_of(self, stage: Stage, status: int) -> Status:
        """What the exit status of a stage means for the run."""
        progress = Progress.of(self._run)
        outcome = "" if progress is None else progress.outcome  # the statuses of workers get lost in launchers
        asked = self._run.stop_request.exists()
        if status == 0 and outcome != "stopped" and (stage == self._last_stage() or not asked):
            return "done"
        if _word(self._run.stop_request) == "cancel":
            return "cancelled"
        return "stopped" if outcome == "stopped" or (asked and outcome != "failed") else "failed"

    def _last_stage(self) -> str:
        return list(self._plan.commands)[-1]

    def _ended(self, status: Status) -> State:
        error = last_error(self._run, self._log_start, self._killed_by) if status == "failed" else ""
        if status == "failed" and self._out_of_memory():
            error = f"{error}; {ADVICE}"
        self._change(status=status, ended=now(), error=error)
        self._say(f"{status}{': ' + error if error else ''}, {now()}")
        self._show()
        self._view.close()
        return self._state

    def _change(self, **changes: object) -> None:
        self._state = self._state.with_(**changes)
        self._state.save(self._run)

    def _say(self, text: str) -> None:
        """A line of our own in the log, and so also before the user."""
        with self._run.log.open("a", encoding="utf-8") as log:
            log.write(f"[finllm] {text}\n")

    def _show(self) -> None:
        for line in self._tail.read():
            self._view.line(line)
        self._view.progress(Progress.of(self._run))


def last_error(run: Run, log_start: int = 0, killed_by: str = "") -> str:
    """The line that says best what went wrong, from what the trainer noted or else from the log."""
    progress = Progress.of(run)
    noted = progress.error.strip().splitlines() if progress else []
    if noted and not noted[0].startswith("Traceback"):
        return noted[0]
    lines = noted or [line for line in Tail(run.log, log_start).read(to_end=True) if not line.startswith("[finllm]")]
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if re.match(ERROR_LINE, line) and not line.startswith(LAUNCHER_ERRORS)]
    if killed_by and not errors:
        return f"ended by {killed_by} from outside{' (out of memory? `dmesg` knows)' if killed_by == 'SIGKILL' else ''}"
    return (errors or said or ["it ended without a word"])[-1]


def _word(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


@contextlib.contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Refuse a second supervisor of the same run; the lock goes with the process, however it ends."""
    with (run.folder / "supervisor.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{run.name} is being run already; see `finllm status {called(run)}`") from error
        yield


@contextlib.contextmanager
def _signals() -> Iterator[list[tuple[int, float]]]:
    """Note the signals that ask for an end, with their time, instead of dying of them."""
    received: list[tuple[int, float]] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append((number, time.monotonic()))

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup: the closing terminal shall not matter
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
