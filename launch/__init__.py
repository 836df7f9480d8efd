"""Decide and start: the command, and the places where a run can go."""

from collections.abc import Sequence
from typing import Protocol

from finllm.run import Run, State
from launch import local, slurm
from launch.place import STAGES, Seen, Stage


class Backend(Protocol):
    """A place to run: a module with these functions."""

    def start(self, run: Run, *, detach: bool, stages: Sequence[Stage] = STAGES) -> State:
        """Run what is left of these stages; returns the state at the end, or the running one when detached."""

    def alive(self, run: Run, state: State) -> bool:
        """Whether anything of the run lives."""

    def seen(self, items: Sequence[tuple[Run, State]]) -> list[Seen]:
        """How runs stand."""

    def hint(self, run: Run, state: State) -> str:
        """What to say of a run that goes on without the terminal."""

    def cancel(self, run: Run, state: State, wait: float) -> State:
        """End the run, after `wait` seconds by force; returns its last state."""


BACKENDS: dict[str, Backend] = {"local": local, "slurm": slurm}
"""By the name that state.json keeps; a new place is a module beside this file and a line here."""
