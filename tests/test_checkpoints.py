"""Checkpoints that were cut, damaged or lost in part, and what a run goes on from then."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from commandline import finllm
from finllm import checkpoints
from finllm import train as command
from finllm.journal import history
from finllm.run import COMPLETE, Run, State

Train = Callable[..., Run]
LIGHT = ("evaluation.base=false", "evaluation.baselines=[]", "evaluation.bootstrap_draws=100")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with three sealed checkpoints of two files each."""
    made = Run(tmp_path / "run")
    for step in (4, 8, 12):
        checkpoint = made.checkpoints / f"checkpoint-{step}"
        (checkpoint / "ref").mkdir(parents=True)
        (checkpoint / "adapter").write_bytes(os.urandom(1000))
        (checkpoint / "ref" / "state").write_text("{}")
        checkpoints.seal(checkpoint)
    return made


def test_a_whole_checkpoint_has_no_fault(run: Run) -> None:
    """Its marker lists every file, below folders too."""
    newest = run.complete_checkpoints()[-1]
    assert set(json.loads((newest / COMPLETE).read_text())) == {"adapter", "ref/state"}
    assert not checkpoints.fault(newest)
    assert checkpoints.set_faulty_aside(run) == []
    assert len(run.complete_checkpoints()) == 3


def _flip(checkpoint: Path) -> None:
    data = bytearray((checkpoint / "adapter").read_bytes())
    data[500] ^= 1
    (checkpoint / "adapter").write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut in the middle": (lambda c: (c / COMPLETE).unlink(), "was not written whole"),
    "a changed bit": (_flip, "contents of adapter have changed"),
    "a shorter file": (lambda c: (c / "adapter").write_bytes(b"x"), "has 1 bytes"),
    "a lost file": (lambda c: (c / "ref" / "state").unlink(), "ref/state is missing"),
    "a broken marker": (lambda c: (c / COMPLETE).write_text("{"), "cannot be read"),
    "another marker": (lambda c: (c / COMPLETE).write_text("12\n"), "does not list"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_run_goes_on_from_the_one_before(run: Run, kind: str) -> None:
    """And says so; a damaged one is kept under another name, a cut one is not."""
    damage, said = DAMAGE[kind]
    newest = run.checkpoints / "checkpoint-12"
    damage(newest)
    lines = checkpoints.set_faulty_aside(run)
    assert said in lines[0]
    assert lines[-1] == "going on from checkpoint-8"
    assert [path.name for path in run.complete_checkpoints()] == ["checkpoint-4", "checkpoint-8"]
    assert not newest.exists()
    assert (run.checkpoints / "damaged-checkpoint-12").exists() == (kind != "cut in the middle")


def test_without_a_sound_one_it_begins_again(run: Run) -> None:
    """All three are faulty."""
    for checkpoint in run.checkpoints.iterdir():
        shutil.rmtree(checkpoint / "ref")
    assert checkpoints.set_faulty_aside(run)[-1] == "starting from the beginning"
    assert run.complete_checkpoints() == []


@pytest.mark.slow
def test_a_trainer_with_a_damaged_checkpoint_takes_the_steps_again(
    train: Train, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The losses are those of the run before the damage."""
    made = train(recipe, tmp_path)
    shutil.rmtree(made.adapter)
    newest = made.complete_checkpoints()[-1]
    (newest / "adapter_model.safetensors").write_bytes(b"not weights")
    capsys.readouterr()
    assert command.main([str(made.folder)]) == 0
    assert "going on from checkpoint-7" in capsys.readouterr().out
    assert made.adapter.is_dir()
    again = [row.numbers["train/loss"] for row in history(made) if "train/loss" in row.numbers]
    assert len(again) > 14, "steps were taken twice"
    by_step: dict[int | None, list[float]] = {}
    for row in history(made):
        if "train/loss" in row.numbers:
            by_step.setdefault(row.step, []).append(row.numbers["train/loss"])
    for first, *others in by_step.values():
        np.testing.assert_allclose(others, [first] * len(others), rtol=0, atol=1e-6)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk on which one checkpoint of the tiny model has room beside the run's other files, and no second."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=340k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_run_goes_on_from_the_checkpoint_before(
    train: Train, recipe: Path, small_disk: Path, tmp_path: Path
) -> None:
    """Though nothing new can be written; once there is room, the steps are those of a run that had it."""
    answer = finllm("launch", str(recipe), "--name", "full", "--runs", str(small_disk), *LIGHT)
    assert answer.returncode == 1
    run, said = Run(small_disk / "full"), f"{small_disk}/full: the disk is full"
    state = State.of(run)
    assert state is not None
    assert state.status == "failed"
    assert state.error.startswith(said)
    assert said in answer.stderr
    assert not list(run.folder.glob(".*")), "no half-written file is left"
    assert [path.name for path in run.complete_checkpoints()] == ["checkpoint-7"]
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    answer = finllm("resume", str(run.folder))
    assert answer.returncode == 0, answer.stderr
    assert "going on from checkpoint-7" in answer.stdout
    same = train(recipe, tmp_path / "undisturbed")
    mine, theirs = (load_file(one.adapter / "adapter_model.safetensors") for one in (run, same))
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=1e-6)
