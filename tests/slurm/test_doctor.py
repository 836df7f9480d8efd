"""`finllm doctor --cluster` on a real SLURM."""

import json
from pathlib import Path
from typing import Any

import pytest

from finllm import doctor
from launch.cli import main


@pytest.fixture(autouse=True)
def _here(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001 -- is up
    """Runs stand in a folder with a hard name; compute nodes ask nobody."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)


def examined(profile: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, str]]]:
    Path("cluster.yaml").write_text(profile)
    status = main(["doctor", "--cluster", "cluster.yaml", "--json", "--runs", 'my "quick" runs'])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_every_node_of_the_profile_is_examined_and_nothing_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    """All checks on each of two, SLURM's commands on the one that submits; the GPUs that were asked for are not there."""
    status, found = examined("nodes: 2\ngpus_per_node: 1\ngpu: h100-80gb\ncpus: 1\nmemory: 1G\ntime: 20\n", capsys)
    assert status == 1
    wrong = {(one["where"], one["what"], one["found"]) for one in found if one["state"] == "wrong"}
    assert wrong == {(node, "GPU", "0 visible, and the profile asks for 1") for node in ("node1", "node2")}
    assert next(one for one in found if one["where"] == "here")["what"] == "SLURM"
    for node in ("node1", "node2"):
        assert {one["what"] for one in found if one["where"] == node} == set(doctor.checks(None, Path(), 0))
    assert not list(Path('my "quick" runs').iterdir())


@pytest.mark.slow
def test_an_interpreter_that_nodes_lack_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """The job ends without a finding; its last words are in the table."""
    status, found = examined("python: /none/python\ncpus: 1\nmemory: 1G\ntime: 20\n", capsys)
    assert status == 1
    (job,) = [one for one in found if one["what"] == "job"]
    assert "/none/python" in job["found"]
    assert "`python` in the profile" in job["mend"]
    assert not list(Path('my "quick" runs').iterdir())


def test_a_profile_that_slurm_refuses_is_wrong_input(capsys: pytest.CaptureFixture[str]) -> None:
    """In sbatch's words, with the key to change, and nothing left behind."""
    Path("cluster.yaml").write_text("partition: none\ntime: 20\n")
    assert main(["doctor", "--cluster", "cluster.yaml", "--runs", "runs"]) == 2
    assert "in the cluster profile, change partition" in capsys.readouterr().err
    assert not list(Path("runs").iterdir())
