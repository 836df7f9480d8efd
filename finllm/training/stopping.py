"""Being asked to stop: by a signal, by a file in the run folder, or by the death of the launcher."""

import ctypes
import signal
import sys
from types import FrameType

from finllm.run import Run

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopRequests:
    """Remembers that this process, or the run, was asked to stop; the trainer looks after each step."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._signal: str | None = None

    def listen(self) -> None:
        """Take SIGTERM, SIGINT and SIGUSR2 as requests, and the parent's death as SIGTERM."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        if sys.platform == "linux":  # accelerate's launcher dies of a signal without passing it on
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    @property
    def reason(self) -> str | None:
        """What asked for the stop, or None."""
        if self._signal is not None:
            return self._signal
        return "the launcher" if self._run.stop_request.exists() else None
