"""The local backend: runs on this machine, in front of the user or without a terminal."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from finllm.errors import RunError
from finllm.files import write_text
from finllm.run import ALIVE, Run, State
from launch import tether
from launch.place import STAGES, Seen, Stage, mark, stop_seconds
from launch.show import called, view
from launch.supervisor import now, supervise

START_SECONDS = 30.0
"""In which a supervisor without a terminal must have begun; it takes half a second."""
ACKNOWLEDGE_SECONDS = 5.0
"""In which a supervisor notes that its processes have gone."""


def start(run: Run, *, detach: bool, stages: Sequence[Stage] = STAGES) -> State:
    """Run what is left of these stages; returns the state at the end, or the running one when detached.

    Raises RunError where the run, or a process left over from it, is alive.
    """
    stop_seconds()  # refuses a bad value here, and not where nobody sees it
    before = State.of(run)
    if before is not None and alive(run, before):
        where = f"on {before.host}, process {before.pid}" if before.pid else "as processes without a supervisor"
        raise RunError(
            f"{run.name} is alive ({where}); `finllm logs {called(run)} -f` shows it, "
            f"`finllm cancel {called(run)}` ends it"
        )
    return _detach(run, stages) if detach else supervise(run, view(), stages)


def alive(run: Run, state: State) -> bool:
    """Whether anything of the run lives; on another machine, whether nothing says that it has ended."""
    if state.host not in ("", socket.gethostname()):
        return state.status == "running"
    return supervised(state) or bool(tether.members(mark(run)))


def supervised(state: State) -> bool:
    """Whether the process that started the run lives and is the same one still."""
    return state.pid > 0 and state.pid_started > 0 and tether.start_ticks(state.pid) == state.pid_started


def seen(items: Sequence[tuple[Run, State]]) -> list[Seen]:
    """How runs stand: as state.json says, but `lost` where the supervisor was killed, or the machine restarted."""
    here = socket.gethostname()

    def one(state: State) -> Seen:
        where = f"local, {state.host}"
        if state.status == "running" and state.host == here and not supervised(state):
            return Seen("lost", where, error="its supervisor was killed, or the machine restarted")
        return Seen(state.status, where, error=state.error)

    return [one(state) for _, state in items]


def hint(run: Run, state: State) -> str:
    """What to say of a run that goes on without the terminal."""
    return f"{run.name} runs without this terminal (process {state.pid})"


def cancel(run: Run, state: State, wait: float) -> State:
    """End the run, after `wait` seconds by force; returns its last state. Raises RunError where it lives elsewhere."""
    write_text(run.stop_request, "cancel\n")
    if state.host not in ("", socket.gethostname()):
        raise RunError(
            f"{run.name} runs on {state.host}, this is {socket.gethostname()}: it has been asked to save and stop; "
            f"to end it by force, use `finllm cancel {called(run)}` there"
        )
    began = time.monotonic()
    while True:
        ending = tether.end(mark(run), max(0.0, began + wait - time.monotonic()))
        if ending.left:
            raise RunError(f"process(es) {', '.join(map(str, ending.left))} cannot be killed; they wait for a device")
        latest = State.of(run) or state
        if latest.status not in ALIVE:
            return latest
        if not supervised(latest) or time.monotonic() > began + wait + ACKNOWLEDGE_SECONDS:
            latest = latest.with_(status="cancelled", ended=now())  # nobody else will write it
            latest.save(run)
            return latest
        time.sleep(tether.POLL_SECONDS)


def _detach(run: Run, stages: Sequence[Stage]) -> State:
    """Start a supervisor that outlives this terminal; returns once it has begun."""
    program = "from launch.supervisor import detached; detached()"
    with run.log.open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", program, str(run.folder), *stages], stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True, env=dict(os.environ),
        )  # fmt: skip
    deadline = time.monotonic() + START_SECONDS
    while child.poll() is None and time.monotonic() < deadline:
        state = State.of(run)
        if state is not None and state.pid == child.pid:
            return state
        time.sleep(0.02)
    state = State.of(run)
    if state is not None and state.pid == child.pid:
        return state
    raise RunError(f"the supervisor did not start (exit status {child.poll()}); {run.log} says why")
