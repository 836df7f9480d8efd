"""What a person sees of a run that is going on: its log as it grows, and how far it is."""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from finllm.run import Progress, Run

PLAIN_EVERY_SECONDS = 30.0
"""Between two lines of progress where the output is no terminal."""


class View(Protocol):
    """Shows a run."""

    def line(self, text: str) -> None:
        """One line of the log."""

    def progress(self, progress: Progress | None) -> None:
        """How far the run is; None before its first step."""

    def close(self) -> None:
        """Nothing more will come."""


def view() -> View:
    """The view for the standard output as it is: a bar below the log, or plain lines."""
    return Guarded(Terminal() if sys.stdout.isatty() else Plain())


class Tail:
    """A file of lines that another process writes."""

    def __init__(self, path: Path, start: int = 0) -> None:
        self._path, self._at, self._rest = path, start, b""

    def read(self, *, to_end: bool = False) -> list[str]:
        """The lines that have become complete since the last call; with `to_end` also one without a line end."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._at)
                new = file.read()
                self._at += len(new)
                self._rest += new
        *lines, self._rest = self._rest.split(b"\n")
        if to_end and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        return [_last_writing(line) for line in lines]


def _last_writing(line: bytes) -> str:
    """What a line shows in the end: a progress bar writes over itself with carriage returns."""
    return line.decode("utf-8", errors="replace").rstrip("\r").rsplit("\r", 1)[-1]


class Silent:
    """Shows nothing, for a supervisor without a terminal: the log has it all."""

    def line(self, text: str) -> None:
        """Keep it to itself."""

    def progress(self, progress: Progress | None) -> None:
        """Keep it to itself."""

    def close(self) -> None:
        """Nothing to do."""


class Plain:
    """Lines only, for files, pipes and other programs."""

    def __init__(self) -> None:
        self._shown_at = time.monotonic()
        self._shown = ""

    def line(self, text: str) -> None:
        """Print it."""
        print(text, flush=True)

    def progress(self, progress: Progress | None) -> None:
        """Print a line now and then, where something has changed."""
        if progress is None or time.monotonic() < self._shown_at + PLAIN_EVERY_SECONDS:
            return
        text = described(progress)
        if text != self._shown:
            print(f"[finllm] {text}", flush=True)
        self._shown_at, self._shown = time.monotonic(), text

    def close(self) -> None:
        """Leave nothing in the buffer."""
        sys.stdout.flush()


class Terminal:
    """The log, and below it a bar with the time left."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or _Console(highlight=False)
        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[rest]}", markup=False),
        )  # fmt: skip
        # No thread draws it: a thread beside signal handlers and forks is a source of trouble.
        self._bars = Bars(*columns, console=self._console, auto_refresh=False, transient=True)
        self._task = self._bars.add_task("starting", total=None, rest="")
        self._bars.start()

    def line(self, text: str) -> None:
        """Print it above the bar."""
        self._console.out(text, highlight=False)

    def progress(self, progress: Progress | None) -> None:
        """Draw the bar anew."""
        if progress is not None:
            rest = " · ".join(filter(None, [_count(progress), *_rest(progress)]))
            self._bars.update(
                self._task, description=progress.stage, completed=progress.done, total=progress.total or None, rest=rest
            )
        self._bars.refresh()

    def close(self) -> None:
        """Take the bar away."""
        self._bars.stop()


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich would end the process, and with it the supervision of the run."""
        raise BrokenPipeError


class Guarded:
    """Another view, given up when its terminal or pipe has gone: the run does not depend on being seen."""

    def __init__(self, inner: View) -> None:
        self._inner = inner

    def line(self, text: str) -> None:
        """Pass it on."""
        with self._giving_up():
            self._inner.line(text)

    def progress(self, progress: Progress | None) -> None:
        """Pass it on."""
        with self._giving_up():
            self._inner.progress(progress)

    def close(self) -> None:
        """Pass it on."""
        with self._giving_up():
            self._inner.close()

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._inner = Silent()
            forget_output()


def forget_output() -> None:
    """Send what is still to be written to standard output nowhere, so that flushing at exit does not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def described(progress: Progress) -> str:
    """Progress in one line: `training 40/120 step · loss 1.234 · 2:10 left`."""
    return " · ".join([f"{progress.stage} {_count(progress)}".rstrip(), *_rest(progress)])


def _count(progress: Progress) -> str:
    return count(progress.done, progress.total, progress.unit)


def count(done: int | None, total: int | None, unit: str) -> str:
    """What has been done of what there is, `40/120 step`; nothing where there is nothing to count."""
    return f"{done or 0}/{total or '?'} {unit}" if done or total else ""


def _rest(progress: Progress) -> list[str]:
    loss = [] if progress.loss is None else [f"loss {progress.loss:.4g}"]
    left = progress.seconds_left
    return [*loss, *([] if left is None else [f"{clock(left)} left"])]


def clock(seconds: float) -> str:
    """Seconds as `m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def called(run: Run) -> str:
    """What to call a run on the command line: its name, or its folder where it is not among the usual runs."""
    return run.name if run.folder.parent == usual_runs().absolute() else shlex.quote(str(run.folder))


def usual_runs() -> Path:
    """Where runs are unless somebody says otherwise: $FINLLM_RUNS, or `runs`."""
    return Path(os.environ.get("FINLLM_RUNS", "runs"))
