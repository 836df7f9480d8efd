"""Decide and start: the command, and the places where a run can go."""

from collections.abc import Sequence
from typing import Protocol

from finllm.run import Run, State
from launch import local
from launch.supervisor import STAGES, Stage


class Backend(Protocol):
    """A place to run: a module with these functions."""

    def start(self, run: Run, *, detach: bool, stages: Sequence[Stage] = STAGES) -> State:
        """Run what is left of these stages; returns the state at the end, or the running one when detached."""

    def alive(self, run: Run, state: State) -> bool:
        """Whether anything of the run lives."""

    def lost(self, state: State) -> bool:
        """Whether the run ended without anybody noting it."""

    def cancel(self, run: Run, state: State, wait: float) -> State:
        """End the run, after `wait` seconds by force; returns its last state."""


BACKENDS: dict[str, Backend] = {"local": local}
"""By the name that state.json keeps; a new place is a module beside this file and a line here."""
