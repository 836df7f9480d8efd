"""The report of a sweep: cells in the order of their validation figures."""

from pathlib import Path

from finllm.run import write_text
from finllm.sweeps import Sweep


def write(sweep: Sweep) -> Path:
    """Write report.md into the sweep's folder; returns its path."""
    lines = [
        f"- {cell.run} ({', '.join(cell.overrides)}): {'done' if run.scores.is_file() else 'not done'}"
        for cell, run in zip(sweep.cells, sweep.runs, strict=True)
    ]
    path = sweep.folder / "report.md"
    write_text(path, "\n".join([f"# {sweep.name}", "", *lines, ""]))
    return path
