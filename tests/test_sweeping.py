"""Sweeps: the cells that values make, and a sweep on this machine from end to end."""

from pathlib import Path

import pytest

from finllm.errors import FinllmError, RecipeError
from finllm.plan import Plan
from finllm.run import State
from finllm.sweeps import Sweep
from launch import finding, sweeping
from launch.cli import main

LIGHT = ("evaluation.base=false", "evaluation.baselines=[]", "evaluation.bootstrap_draws=100", "train.epochs=1")


def test_cells_are_the_product_of_the_values(tmp_path: Path) -> None:
    """Named by what differs; a comma in brackets belongs to a value."""
    asked = ["train.learning_rate=1e-4,2e-4", "lora.targets=[q_proj, v_proj],all-linear"]
    sweep = sweeping.described("demo", [], asked, None, tmp_path)
    assert sweep.folder == tmp_path / "demo-sweep"
    assert sweep.keys == ("train.learning_rate", "lora.targets")
    assert [cell.overrides for cell in sweep.cells] == [
        ("train.learning_rate=1e-4", "lora.targets=[q_proj, v_proj]"),
        ("train.learning_rate=1e-4", "lora.targets=all-linear"),
        ("train.learning_rate=2e-4", "lora.targets=[q_proj, v_proj]"),
        ("train.learning_rate=2e-4", "lora.targets=all-linear"),
    ]
    assert sweep.cells[0].run == "demo-sweep-learning_rate1e-4-targetsq_projv_proj"
    assert not sweep.folder.exists(), "describing makes nothing"


def test_names_that_would_be_the_same_are_numbered(tmp_path: Path) -> None:
    """Signs that a folder's name cannot hold are left out, which may leave nothing to tell cells by."""
    sweep = sweeping.described(
        "demo", [], ["prompt.instruction=negative neutral positive?,negative neutral positive!"], "s", tmp_path
    )
    assert [cell.run for cell in sweep.cells] == ["s-1", "s-2"]


def test_one_faulty_cell_refuses_the_sweep(tmp_path: Path) -> None:
    """Before the first has run for hours."""
    with pytest.raises(RecipeError, match="learning_rate"):
        sweeping.described("demo", [], ["train.learning_rate=1e-4,fast"], None, tmp_path)
    asked = ["train.global_batch=16,17"]
    sweep = sweeping.described("demo", [], asked, None, tmp_path / "runs")
    with pytest.raises(RecipeError, match="17"):
        sweeping.prepare(sweep, "demo", ["resources.cpu_processes=2"], None)
    assert not list((tmp_path / "runs").iterdir())


def test_a_preview_lists_the_cells(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The plan of the first, the overrides of all, and for a cluster the array's script."""
    given = ["launch", "demo", "--sweep", "lora.rank=2,4,8", "--dry-run", "--runs", str(tmp_path / "runs")]
    assert main(given) == 0
    assert "3 cells" in (said := capsys.readouterr().out)
    assert "lora.rank=8" in said
    (tmp_path / "c.yaml").write_text("time: 30\nparallel: 2\n")
    assert main([*given, "--cluster", str(tmp_path / "c.yaml")]) == 0
    assert "#SBATCH --array=0-2%2" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_sweep_runs_its_cells_and_compares_them(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sweep's name stands for all its cells in status and resume."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    given = ["launch", str(recipe), "--name", "grid", "--runs", "runs", "--sweep", "train.learning_rate=1e-3,1e-2"]
    assert main([*given, *LIGHT]) == 0
    sweep = Sweep.of(tmp_path / "runs" / "grid")
    states = [State.of(run) for run in sweep.runs]
    assert [state.status for state in states if state] == ["done", "done"]
    report = (sweep.folder / "report.md").read_text()
    assert all(run.name in report for run in sweep.runs)
    assert all(Plan.of(run).recipe.tracking.group == "grid" for run in sweep.runs)
    capsys.readouterr()
    assert main(["status", "grid", "--runs", "runs"]) == 0
    said = capsys.readouterr().out
    assert all(run.name in said for run in sweep.runs)
    assert main(["resume", "grid", "--runs", "runs"]) == 0
    assert [run.name for run in finding.runs_of("grid", Path("runs"))] == [run.name for run in sweep.runs]
    with pytest.raises(FinllmError, match="name one of its cells"):
        finding.run_of("grid", Path("runs"))
