"""A command on a tether: all its processes are found and ended together, also when its starter is gone.

Ends of processes are no simple matter here, all of it measured (accelerate 1.15, torch 2.13):
- `accelerate launch` with one process dies of a signal without passing it on, and its trainer lives on;
- with several, torchrun gives each worker a session of its own, so that no process group holds them all.
So every process of a run carries a mark in its environment, the run's folder, and is found by that. The tether
itself is a small process between supervisor and command: when the supervisor dies, even of SIGKILL, it
asks the trainer to save and to stop, and ends what does not.

It is started by path (`python -I -S tether.py MARK STOP_FILE WAIT_SECONDS COMMAND...`) and imports nothing of ours.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

MARK = "FINLLM_RUN_FOLDER"
"""Environment variable that every process of a run on a machine carries."""
POLL_SECONDS = 0.1
KILL_SECONDS = 10.0
"""Between SIGTERM and SIGKILL."""
GIVE_UP_SECONDS = 30.0
"""After the first SIGKILL: a process that waits for a broken device cannot be killed."""


@dataclass(frozen=True)
class Ending:
    """How the processes of a run came to their end."""

    by: Literal["itself", "SIGTERM", "SIGKILL"]
    left: tuple[int, ...] = ()
    """Processes that cannot be killed."""


def start(
    command: Sequence[str], mark: str, stop: Path, wait: float, log: BinaryIO, env: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a command on a tether, in a session of its own, its output appended to `log`.

    The exit status is the command's, or 128 + N where signal N ended it. Keep the returned object: when its
    `stdin` is closed, or this process dies, the command is asked to stop, by the file `stop`, and ended after `wait`
    seconds.
    """
    program = [sys.executable, "-I", "-S", __file__, mark, str(stop), str(wait), *command]
    return subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env={**env, MARK: mark},
        start_new_session=True,
    )  # fmt: skip


def members(mark: str) -> list[int]:
    """Process ids of those who carry the mark on this machine, without the calling process."""
    entry = f"{MARK}={mark}".encode()
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            environ = (process / "environ").read_bytes()
        except OSError:  # ended meanwhile, or another user's
            continue
        if entry in environ.split(b"\0"):
            found.append(int(process.name))
    return found


def end(mark: str, wait: float, hurry: Callable[[], int] = lambda: 0) -> Ending:
    """Give the run's processes `wait` seconds to end by themselves, then SIGTERM, then SIGKILL; returns when all are gone.

    `hurry` is called ten times a second; 1 from it means SIGTERM now, 2 SIGKILL now.
    """
    deadline = time.monotonic() + wait
    termed = killed = 0.0
    while alive := members(mark):
        haste, now = hurry(), time.monotonic()
        if not termed and (haste or now >= deadline):
            termed = now
            _signal(alive, signal.SIGTERM)
        elif termed and (haste > 1 or now >= termed + KILL_SECONDS):
            killed = killed or now
            _signal(alive, signal.SIGKILL)
        if killed and now > killed + GIVE_UP_SECONDS:
            return Ending("SIGKILL", tuple(alive))
        time.sleep(POLL_SECONDS)
    return Ending("SIGKILL" if killed else "SIGTERM" if termed else "itself")


def _signal(processes: Sequence[int], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def start_ticks(pid: int) -> float:
    """When a process started, in clock ticks since boot; 0 where there is no such process, or only its zombie."""
    try:
        stat = Path("/proc", str(pid), "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0.0
    fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return 0.0 if fields[0] in "ZX" else float(fields[19])  # fields 3 and 22 of proc(5)


def _main(mark: str, stop: Path, wait: float, command: Sequence[str]) -> int:
    asked = False

    def note(*_: object) -> None:
        nonlocal asked
        asked = True

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, note)  # not SIG_IGN, which the command would inherit
    # SLURM may send it to every process of a job: `accelerate launch` would die, where the stop file suffices.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        sys.stderr.write(f"{command[0]} cannot be started: {error}\n")
        return 127
    while child.poll() is None:
        starter_gone = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])  # nothing is ever written: end of file
        if starter_gone:
            with contextlib.suppress(OSError):  # disk full: the signals below still end it
                stop.touch()
            end(mark, wait)
            child.wait()
    # Who signals this process signals all of them, as SLURM does: the launcher has died of it, its trainer is saving.
    end(mark, wait if asked else 0)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]))
