"""The supervisor of a run: starts each stage, shows it, passes requests to stop on, keeps state.json."""

import contextlib
import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from finllm.errors import RunError
from finllm.files import write_json, write_text
from finllm.plan import Plan
from finllm.run import Progress, Run, State, Status
from launch import tether
from launch.lowering import ADVICE, lowered
from launch.place import STAGES, Here, Stage, environment_of
from launch.show import Silent, Tail, View

OTHERS_SECONDS = 15.0
"""In which the processes of a run in which one ran out of memory may end by themselves."""
SAME_KEYPRESS_SECONDS = 0.5
"""Wrappers such as `uv run` pass Ctrl-C on although it has arrived already; two within this time are one."""
ERROR_LINE = r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b"
LAUNCHER_ERRORS = ("subprocess.CalledProcessError", "torch.distributed.elastic")
"""What `accelerate launch` and torchrun say when a trainer failed: true, and not the cause."""


def supervise(run: Run, view: View, stages: Sequence[Stage] = STAGES, place: Here | None = None) -> State:
    """Run those stages of the plan that are not done yet, one after the other; returns the state at the end."""
    place = place or Here(run)
    with place.alone(), _noting(place):
        return _Supervisor(run, view, place).attend(stages)


def detached() -> None:
    """Entry of a supervisor that has no terminal: `FOLDER STAGE...` are its arguments."""
    folder, *stages = sys.argv[1:]
    supervise(Run(Path(folder)), Silent(), [stage for stage in STAGES if stage in stages])


class SupersededError(RunError):
    """Another attempt has the run: this one lost its node and did not know."""


def now() -> str:
    """The time as state.json has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Supervisor:
    """One attempt at a run."""

    def __init__(self, run: Run, view: View, place: Here) -> None:
        self._run, self._view, self._place = run, view, place
        self._received = place.received
        self._plan = Plan.of(run)
        self._mark = place.mark
        self._wait = place.wait
        self._log_start = run.log.stat().st_size if run.log.exists() else 0
        self._tail = Tail(run.log, self._log_start)
        self._before = State.of(run) or State("created")
        self._state = self._before
        self._killed_by = ""

    def attend(self, stages: Sequence[Stage]) -> State:
        self._run.stop_request.unlink(missing_ok=True)
        again = bool(self._before.started) and "train" in stages
        self._state = self._before.with_(
            status="running", attempt=self._before.attempt + again, backend=self._place.backend, pid=os.getpid(),
            pid_started=tether.start_ticks(os.getpid()), started=now(), ended="", error="", **self._place.named(),
        )  # fmt: skip
        self._state.save(self._run)
        for stage in self._left(stages):
            end = self._tried(stage)
            if end == "failed" and (lost := self._place.lost()):
                self._change(note=lost)
                return self._ended("stopped")
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
        self._say(f"attempt {self._state.attempt}, {stage}, {now()}, on {self._state.host}")
        command = self._place.command(stage, self._plan.commands[stage])
        stop, environment = self._run.stop_request, environment_of(self._plan, stage, self._place)
        with self._run.log.open("ab") as log:
            child = tether.start(command, self._mark, stop, self._wait, log, environment)
        assert child.stdin is not None, "the tether's life line is a pipe"
        try:
            self._change(group=child.pid)
            while child.poll() is None:
                if self._stop_asked():
                    self._stop()
                elif self._one_failed():  # the others would wait for the process that has gone
                    tether.end(self._mark, OTHERS_SECONDS)
                self._check()
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

    def _one_failed(self) -> bool:
        """Whether a process has failed that does not end by itself, or that others wait for."""
        progress = Progress.of(self._run)
        return (
            progress is not None
            and progress.outcome == "failed"
            and bool(progress.cause or max(self._plan.processes, self._plan.evaluators) > 1)
        )

    def _check(self) -> None:
        """End everything here, and write nothing, where another attempt has taken the run over."""
        if not self._place.holds(self._state):
            tether.end(self._mark, 0)
            raise SupersededError(f"{self._run.name}: another attempt goes on with it; this one ends here")

    def _stop_asked(self) -> bool:
        """Whether somebody wants the run to stop; passes a signal on to the trainer."""
        if self._received and not self._run.stop_request.exists():
            name = signal.Signals(self._received[0][0]).name
            self._say(
                f"{'Ctrl-C' if name == 'SIGINT' else name}: asked the run to save and stop; it has {self._wait:.0f} s "
                f"{self._place.grace}".rstrip()
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
        self._check()
        self._state = self._state.with_(**changes)
        self._state.save(self._run)

    def _say(self, text: str) -> None:
        """A line of our own in the log, and so also before the user."""
        with (
            contextlib.suppress(OSError),
            self._run.log.open("a", encoding="utf-8") as log,
        ):  # a full disk: state.json says it
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
def _noting(place: Here) -> Iterator[None]:
    """Note the signals that ask for an end instead of dying of them."""

    def note(number: int, _: FrameType | None) -> None:
        place.received.append((number, time.monotonic()))

    before = {number: signal.signal(number, note) for number in place.signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
