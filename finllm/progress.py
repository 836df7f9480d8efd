"""Progress of long steps: a bar with time left where a person watches, `progress.json` where a run is going on."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from finllm.run import Progress, Run

EVERY_SECONDS = 0.5


class Steps:
    """Counts the steps of one stage."""

    def __init__(self, stage: str, total: int, unit: str, run: Run | None) -> None:
        self._run, self._stage, self._total, self._unit = run, stage, total, unit
        self._done = self._first = 0
        self._loss: float | None = None
        self._began = self._written = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total or None, desc=stage, unit=unit, file=sys.stderr, leave=False)

    def begin_at(self, done: int) -> None:
        """So many steps were done before this stage began, by an earlier attempt: they say nothing about the pace."""
        self.at(done)
        self._first, self._began = done, time.monotonic()

    def add(self, count: int = 1, loss: float | None = None) -> None:
        """So many more steps are done."""
        self.at(self._done + count, loss)

    def at(self, done: int, loss: float | None = None) -> None:
        """So many steps are done in all."""
        if self._bar is not None:
            self._bar.update(done - self._done)
        self._done, self._loss = done, self._loss if loss is None else loss
        if time.monotonic() - self._written > EVERY_SECONDS:
            self.write()

    def write(self) -> None:
        """Put the present state into the run folder."""
        self._written = time.monotonic()
        seconds = round(self._written - self._began, 2)
        if self._run is not None and not _failed(self._run):
            Progress(
                stage=self._stage, done=self._done, first=self._first, total=self._total, unit=self._unit,
                seconds=seconds, loss=self._loss,
            ).save(self._run)  # fmt: skip

    def close(self) -> None:
        """The stage has ended."""
        if self._bar is not None:
            self._bar.close()
        self.write()


def _failed(run: Run) -> bool:
    """Whether another process of this stage has noted why it failed; that must stay."""
    said = Progress.of(run)
    return said is not None and said.outcome == "failed"


@contextmanager
def steps(stage: str, total: int = 0, unit: str = "step", run: Run | None = None) -> Iterator[Steps]:
    """A stage of `total` steps (0: unknown), shown while it lasts."""
    counter = Steps(stage, total, unit, run)
    counter.write()
    try:
        yield counter
    finally:
        counter.close()
