"""README's table of speeds is what the recorded results say."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROW = {"name": "train", "examples_per_s": 1234.5, "peak_gib": 1.25, "peer": "TRL", "ratio": 4.0, "limit_ratio": None}


def table(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "table.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_readme_shows_the_recorded_speeds() -> None:
    """Whoever records new figures runs benchmarks/table.py too."""
    answer = table("--check")
    assert answer.returncode == 0, answer.stderr
    assert list((ROOT / "benchmarks" / "results").glob("cpu.json"))


def test_the_table_is_made_of_the_rows_and_a_stale_one_is_seen(tmp_path: Path) -> None:
    """Text around the table stays; a result file that is not there has no rows; other files are no results."""
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- speed -->\nold\n<!-- /speed -->\nbelow\n")
    (tmp_path / "cpu.json").write_text(json.dumps([ROW, {"name": "other", "failed": "no memory"}]))
    alone = {**ROW, "peer": None, "ratio": None, "limit_ratio": 0.57, "hardware": "NVIDIA H200, 580.1, 700.00 W"}
    (tmp_path / "h200_sft.json").write_text(json.dumps([alone]))
    pairs = {**alone, "examples_per_s": None, "pairs_per_s": 321.0, "hardware": "NVIDIA H100 80GB HBM3, 580.1"}
    (tmp_path / "h200_dpo.json").write_text(json.dumps([pairs]))
    (tmp_path / "loss_curves.json").write_text("{}")
    place = ("--readme", str(readme), "--results", str(tmp_path))
    assert table("--check", *place).returncode == 1
    assert table(*place).returncode == 0
    assert table("--check", *place).returncode == 0
    lines = readme.read_text().splitlines()
    assert [lines[0], lines[-1]] == ["above", "below"]
    assert "| CPU | train | 1,234 | 1.25 | TRL | 4.00 |  |" in lines
    assert "| H200, training | train | 1,234 | 1.25 |  |  | 57% reached |" in lines
    assert "| H100, DPO, pairs | train | 321 | 1.25 |  |  | 57% reached |" in lines
    assert len(lines) == 2 + 2 + 2 + 3  # texts, marks, head and rule, rows: no line for what failed


def test_a_readme_without_marks_is_refused(tmp_path: Path) -> None:
    """Nothing is written at a place nobody chose."""
    readme = tmp_path / "README.md"
    readme.write_text("above\n")
    answer = table("--readme", str(readme))
    assert answer.returncode == 1
    assert "has no <!-- speed -->" in answer.stderr
    assert readme.read_text() == "above\n"
