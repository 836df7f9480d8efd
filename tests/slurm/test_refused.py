"""What SLURM does not take, or cannot begin."""

import os
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from slurm.acts import LIGHT, ONE, launch, profile, slurm, standing
from slurm.conftest import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _here(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001 -- is up
    """Runs stand in a folder of the test's own."""
    monkeypatch.setenv("FINLLM_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)


REFUSED = {
    "partition: nowhere": "change partition",
    "account: nobody": "change account",
    "qos: best": "change qos",
    "gpus_per_node: 7\ngpu: a100-80gb": "gpus_per_node, gpu_type, cpus, memory or nodes",
    "partition: short": "change time",
    "constraint: quantum": "change constraint",
    "nodes: 99": "change nodes",
    "sbatch: {nonsense: 3}": "change sbatch",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_refused_profile_is_answered_in_slurms_words(
    recipe: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And with the key to change; nothing is left behind."""
    given = ["launch", str(recipe), "--name", "refused", "--cluster", str(profile(ONE + line + "\n")), *LIGHT]
    given += ["train.global_batch=693", "train.micro_batch=auto"]  # for 7 and for 99 processes
    assert main(given) == 2
    said = capsys.readouterr().err
    assert "SLURM refused the job" in said
    assert "sbatch: " in said or "error: " in said
    assert REFUSED[line] in said
    assert not list(Path(os.environ["FINLLM_RUNS"]).iterdir())
    assert not slurm("squeue", "--noheader")


def test_a_refused_evaluation_takes_the_training_out_of_the_queue(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have begun already; the answer names the profile."""
    second = profile("partition: nowhere\ntime: 4\nsignal_seconds: 30\n", "second.yaml")
    given = ["launch", str(recipe), "--name", "refused", "--cluster", str(profile(ONE)), "--evaluate-on", str(second)]
    assert main([*given, *LIGHT]) == 2
    assert "--evaluate-on: SLURM refused the job: " in capsys.readouterr().err
    assert not slurm("squeue", "--noheader")
    assert not list(Path(os.environ["FINLLM_RUNS"]).iterdir())


def test_a_job_that_dies_before_it_begins_is_lost_and_says_why(recipe: Path) -> None:
    """Here the interpreter of the profile is not on the node."""
    run = launch(recipe, "unborn", ONE + "python: /no/such/python\n", *LIGHT)
    assert wait_until(lambda: standing(run).status == "lost")
    assert "FAILED" in standing(run).error
    assert "/no/such/python" in standing(run).error
