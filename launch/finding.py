"""Runs by name: one of them, or all cells of a sweep."""

from pathlib import Path

from finllm.errors import RunError
from finllm.run import Run, find
from finllm.sweeps import FILE, Sweep


def runs_of(name: str, runs: Path) -> list[Run]:
    """The run of that name, or the cells of the sweep of that name; raises RunError where there is neither."""
    folder = sweep_folder(name, runs)
    if folder is None:
        return [find(name, runs)]
    return [run for run in Sweep.of(folder).runs if run.plan.is_file()]


def sweep_folder(name: str, runs: Path) -> Path | None:
    """The folder of the sweep of that name; None where it is no sweep."""
    return next((folder for folder in (runs / name, Path(name)) if (folder / FILE).is_file()), None)


def run_of(name: str, runs: Path) -> Run:
    """The one run of that name; raises RunError for a sweep, which stands for many."""
    found = runs_of(name, runs)
    if len(found) != 1:
        raise RunError(f"{name} is a sweep; name one of its cells: {', '.join(run.name for run in found)}")
    return found[0]
