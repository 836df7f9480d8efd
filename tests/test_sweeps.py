"""Sweeps: what their folder holds, and how their report chooses."""

from pathlib import Path

import pytest

from finllm.errors import RunError
from finllm.sweeps import Cell, Sweep, write_report


def sweep_of(folder: Path) -> Sweep:
    cells = tuple(Cell(f"ranks-{rank}", (f"lora.rank={rank}",)) for rank in (4, 8))
    return Sweep(folder, "demo.yaml", ("lora.rank",), cells)


def test_a_sweep_is_read_as_it_was_saved(tmp_path: Path) -> None:
    """Cells with their overrides; the runs stand beside the sweep's folder."""
    sweep = sweep_of(tmp_path / "ranks")
    sweep.save()
    assert Sweep.of(tmp_path / "ranks") == sweep
    assert [run.folder for run in sweep.runs] == [tmp_path / "ranks-4", tmp_path / "ranks-8"]


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    """Missing and damaged files are named."""
    with pytest.raises(RunError, match=r"sweep\.json is missing"):
        Sweep.of(tmp_path)
    (tmp_path / "sweep.json").write_text('{"source": "demo.yaml"}')
    with pytest.raises(RunError, match="is no sweep"):
        Sweep.of(tmp_path)


def test_a_report_can_be_written_before_any_cell_is_done(tmp_path: Path) -> None:
    """It says which cells are not done."""
    sweep = sweep_of(tmp_path / "ranks")
    sweep.save()
    assert "ranks-8" in write_report(sweep).read_text()
