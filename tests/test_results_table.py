"""README's table of results is what the recorded rows say, with others' figures beside it and marked."""

import json
import subprocess
import sys
from pathlib import Path

from finllm.published import FOUNDING, PUBLISHED

ROOT = Path(__file__).parent.parent


def table(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "results_table.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_readme_shows_the_recorded_results() -> None:
    """Whoever records new figures runs benchmarks/results_table.py too."""
    answer = table("--check")
    assert answer.returncode == 0, answer.stderr


def test_the_table_is_made_of_the_rows_and_a_stale_one_is_seen(tmp_path: Path) -> None:
    """A row has its n, interval and settings; a system that could not be had, or has no place, has no row."""
    facts = {"model": "m", "trained_on": "phrasebank", "recipe": "recipes/sft/m.yaml", "overrides": ["lora.rank=64"],
             "seeds": ["1", "2"], "hardware": "GPU", "date": "2026-11-30", "interval": "95 %"}  # fmt: skip
    figure = {"mean": 87.25, "deviation": 0.5, "low": 85.0, "high": 89.0}
    alone = {**figure, "deviation": 0.0}
    rows = [
        {**facts, "dataset": "phrasebank", "texts": "all", "n": 968, "system": "tfidf", "name": "TF-IDF", "accuracy": alone},
        {**facts, "dataset": "phrasebank", "texts": "all", "n": 968, "system": "tuned", "name": "m, tuned",
         "accuracy": figure, "macro_f1": figure},
        {**facts, "dataset": "phrasebank", "texts": "all", "n": 968, "system": "finbert", "name": "ProsusAI/finbert",
         "accuracy": alone, "marks": ["has seen phrasebank: some"]},
        {**facts, "dataset": "phrasebank", "system": "finbert-tone", "name": "tone", "missing": "no network"},
    ]  # fmt: skip
    (tmp_path / "headline.json").write_text(json.dumps(rows))
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- results -->\nold\n<!-- /results -->\nbelow\n")
    place = ("--readme", str(readme), "--results", str(tmp_path))
    assert table("--check", *place).returncode == 1
    assert table(*place).returncode == 0
    assert table("--check", *place).returncode == 0
    lines = readme.read_text().splitlines()
    assert lines[2] == "| texts | n | trained as | tuned: accuracy | macro-F1 | TF-IDF + LR | ProsusAI/finbert |"
    figures = "87.2 ± 0.5 [85.0, 89.0] | 87.2 ± 0.5 [85.0, 89.0] | 87.2 [85.0, 89.0] | 87.2 [85.0, 89.0] † |"
    assert lines[4] == f"| PhraseBank 50Agree | 968 | 1 | {figures}"
    assert "† Has seen texts of this data." in lines
    assert any(
        line.startswith("1. m, `sft/m` with lora.rank=64, trained on phrasebank; seeds 1, 2; GPU") for line in lines
    )
    assert not any("tone" in line for line in lines[:5])
    assert [lines[0], lines[-1]] == ["above", "below"]


def test_others_figures_stand_apart_with_their_protocols() -> None:
    """Every published figure has a protocol and a source; the founding text's are called unmeasured."""
    assert all(one.protocol and one.source and (one.accuracy or one.f1) for one in PUBLISHED)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ours, others = readme.split("*Not measured here")
    assert all(f"{system} {accuracy}" in others.split("*Never measured")[1] for system, accuracy, _ in FOUNDING)
    assert "FinGPT" not in ours.split("<!-- results -->")[1]
