"""The whole story, as a user tells it: launch, report, status, prediction; from recipe to answer, with real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from finllm.journal import history
from finllm.plan import Plan
from finllm.run import Run

PLANTED = {"WANDB_API_KEY": "planted0" * 5, "HF_TOKEN": "hf_plantedtokenplantedtoken"}


def finllm(*arguments: str, runs: Path) -> str:
    """What the command prints; fails with its output where it fails."""
    environment = {**os.environ, **PLANTED, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "FINLLM_RUNS": str(runs)}
    answer = subprocess.run(
        [Path(sys.executable).with_name("finllm"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two launches of one recipe with a 4-bit base: by one process, and by two."""
    folder = tmp_path_factory.mktemp("runs")
    qlora = ("model.quantization=nf4", "tracking.wandb=auto", "train.shared_prefix=auto")
    finllm("launch", str(recipe), *qlora, "--name", "one", runs=folder)
    finllm("launch", str(recipe), *qlora, "resources.cpu_processes=2", "--name", "two", runs=folder)
    return folder


@pytest.mark.slow
def test_a_launch_trains_evaluates_and_reports(runs: Path) -> None:
    """Every file of the run folder is there, and the report compares the four systems."""
    run = Run(runs / "one")
    assert Plan.of(run).shared_prefix
    for path in (
        run.recipe,
        run.log,
        run.scores,
        run.adapter / "adapter_model.safetensors",
        run.complete_checkpoints()[0],
    ):
        assert path.exists(), path
    report = run.report.read_text()
    assert all(f"| {key}: " in report for key in ("tuned", "base", "majority", "tfidf"))
    assert "QLoRA" in report or "nf4" in report


@pytest.mark.slow
def test_two_processes_launched_on_a_cpu_have_the_losses_of_one(runs: Path) -> None:
    """The same recipe takes the same steps on two processes over gloo, at the same global batch."""
    curves = [
        [row.numbers["train/loss"] for row in history(Run(runs / name)) if "train/loss" in row.numbers]
        for name in ("one", "two")
    ]
    assert Plan.of(Run(runs / "two")).processes == 2
    np.testing.assert_allclose(curves[1], curves[0], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_no_key_of_the_environment_reaches_the_run_folder(runs: Path) -> None:
    """Neither W&B's nor the hub's key stands in any file, text or binary."""
    files = [path for path in runs.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    found = [path for path in files for key in PLANTED.values() if key.encode() in path.read_bytes()]
    assert not found


@pytest.mark.slow
def test_status_and_predict_find_the_run_by_its_name(runs: Path) -> None:
    """From another shell the run is done, and answers."""
    states = {run["name"]: run["status"] for run in json.loads(finllm("status", "--json", runs=runs))}
    assert states == {"one": "done", "two": "done"}
    answer = json.loads(finllm("predict", "one", "Profits today. Orders doubled.", "--json", runs=runs))
    assert answer["text"] == "Profits today. Orders doubled."
    assert abs(sum(answer["probabilities"].values()) - 1) < 1e-6
