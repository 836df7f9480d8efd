"""Runs that tests start as the launcher does, and what these are compared by."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from finllm.files import write_json
from finllm.journal import history
from finllm.plan import Plan
from finllm.run import Run
from launch import planning

USUAL = ("train.epochs=1", "train.evals_per_epoch=2", "train.shared_prefix=auto", "train.micro_batch=auto")
"""Of the tests' recipe: seven steps, a checkpoint after the fourth, and after the last."""
OTHER = {"negative": "positive", "positive": "negative", "neutral": "positive"}
"""A label that is as wrong as can be."""


def start(recipe: Path, runs: Path, name: str, *overrides: str, **changes: Any) -> Run:
    """A new run of that recipe, trained; `changes` are of its plan."""
    run = planning.prepare(str(recipe), overrides, name, runs)
    if changes:
        write_json(run.plan, Plan.of(run).model_copy(update=changes).model_dump(mode="json"))
    go(run)
    return run


def go(run: Run) -> None:
    """Trains, or goes on training, in processes of their own; their output where they fail."""
    command = Plan.of(run).commands["train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if Plan.of(run).device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert run.adapter.is_dir()


def figures(run: Run, name: str = "train/loss") -> list[float]:
    """A figure of each step, as the run's journal has it; steps that were taken twice are there twice."""
    return [row.numbers[name] for row in history(run) if name in row.numbers]


def weights(folder: Path) -> torch.Tensor:
    """All of an adapter in PEFT's format, or of a model in Transformers', which must be fp32."""
    (file,) = folder.glob("*model.safetensors")
    found = load_file(file)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    return torch.cat([found[name].flatten() for name in sorted(found)])


def error(one: Path, other: Path) -> float:
    """How far weights lie from others, relative to the others' length."""
    ours, theirs = weights(one), weights(other)
    return float((ours - theirs).norm() / theirs.norm())


def forget_the_end(run: Run) -> None:
    """As if the run had ended after its first checkpoint."""
    first, last = run.complete_checkpoints()
    assert first.name == "checkpoint-4"
    shutil.rmtree(last)
    shutil.rmtree(run.adapter)


def preferring(recipe: Path, init: Run, folder: Path) -> Path:
    """A DPO recipe that goes on from a run, on the training rows of the tests' recipe as a user's own pairs."""
    lines = recipe.read_text().splitlines()
    data = next(line for line in lines if line.startswith("data:"))
    rows = [json.loads(line) for line in Path(data.split("path: ")[1].split(",")[0]).read_text().splitlines()]
    own = [
        {"prompt": row["text"], "chosen": row["label"], "rejected": OTHER[row["label"]], "agreement": "66-75"}
        for row in rows
        if row["split"] == "train"
    ]
    (folder / "own.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in own))
    train_ = {
        "method": "dpo", "init": str(init.folder), "pairs": [{"name": "file", "path": str(folder / "own.jsonl")}],
        "global_batch": 8, "learning_rate": 5e-3, "beta": 0.3, "epochs": 2, "sft_weight": 0.1,
    }  # fmt: skip
    path = folder / "tiny-dpo.yaml"
    path.write_text(
        "\n".join(line if not line.startswith("train:") else f"train: {json.dumps(train_)}" for line in lines)
    )
    return path
