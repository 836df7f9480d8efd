"""A sweep: runs that differ in a few keys of one recipe, and the report that chooses among them.

The folder of a sweep holds `sweep.json` and its report; its runs stand beside it.
"""

from dataclasses import dataclass
from pathlib import Path

from finllm.errors import RunError
from finllm.files import read_json, write_json
from finllm.run import Run

FILE = "sweep.json"


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    run: str
    """Name of its folder, beside the sweep's."""
    overrides: tuple[str, ...]
    """What it changes in the recipe, one `key=value` for each key of the sweep."""


@dataclass(frozen=True)
class Sweep:
    """Runs of one recipe that differ in some of its keys."""

    folder: Path
    """`runs/NAME`, which holds sweep.json."""
    source: str
    """Path of the recipe as it was given."""
    keys: tuple[str, ...]
    """What differs between the cells, such as `lora.rank`."""
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        """What the sweep is called."""
        return self.folder.name

    @property
    def runs(self) -> list[Run]:
        """The run of each cell; its folder may not exist yet."""
        return [Run(self.folder.absolute().parent / cell.run) for cell in self.cells]

    def save(self) -> None:
        """Write sweep.json, and its folder where it is missing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        cells = [{"run": cell.run, "overrides": list(cell.overrides)} for cell in self.cells]
        write_json(self.folder / FILE, {"source": self.source, "keys": list(self.keys), "cells": cells})

    @classmethod
    def of(cls, folder: Path) -> "Sweep":
        """The sweep in a folder; raises RunError where there is none, or its file is damaged."""
        path = folder / FILE
        values = read_json(path)
        try:
            cells = tuple(Cell(str(cell["run"]), tuple(map(str, cell["overrides"]))) for cell in values["cells"])
            return cls(folder.absolute(), str(values["source"]), tuple(map(str, values["keys"])), cells)
        except (KeyError, TypeError) as error:
            raise RunError(f"{path} is no sweep ({error!r}); start the sweep anew") from error


def holding(run: Run) -> str | None:
    """The name of the sweep that a run belongs to; None where it belongs to none."""
    for path in sorted(run.folder.absolute().parent.glob(f"*/{FILE}")):
        try:
            sweep = Sweep.of(path.parent)
        except RunError:  # another's damaged file is no reason to stop this run
            continue
        if run.name in {cell.run for cell in sweep.cells}:
            return sweep.name
    return None


def write_report(sweep: Sweep) -> Path:
    """Write the comparison of the cells that are done, and say which are not; returns the path of report.md.

    Every cell may call it when it ends: each file is written whole or not at all, and the last call sees all cells.
    """
    from finllm.sweep_report import write

    return write(sweep)
