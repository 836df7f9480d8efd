"""Training: the right things learn, the order is the machine's business alone, and nothing is lost on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finllm import train as command
from finllm.checkpoints import fault
from finllm.example import LABELS, Example
from finllm.journal import history
from finllm.prompts import Prompter
from finllm.recipe import Prompt
from finllm.run import COMPLETE, Progress, Run
from finllm.shared_prefix import IGNORED
from finllm.training.batches import NO_ROW, GlobalBatches, encode, pad

Train = Callable[..., Run]
LENGTHS = [20 + 7 * i % 61 for i in range(50)]
"""Tokens of fifty rows."""


def losses(run: Run) -> list[float]:
    """Training loss of each step."""
    return [row.numbers["train/loss"] for row in history(run) if "train/loss" in row.numbers]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(train: Train, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(recipe, tmp_path_factory.mktemp("runs"))


def test_the_loss_falls_and_every_step_is_kept(trained: Run) -> None:
    """Seven steps an epoch, two epochs, each with its loss."""
    assert len(losses(trained)) == 14
    assert losses(trained)[-1] < losses(trained)[0] - 0.8


def test_only_adapters_are_trained_and_all_of_them(trained: Run) -> None:
    """Every LoRA matrix has moved from its start, in fp32; nothing else is in the adapter."""
    trained_weights = weights(trained)
    assert {name.split(".")[-2] for name in trained_weights} == {"lora_A", "lora_B"}
    assert len(trained_weights) == 2 * 7 * 2  # two matrices, seven linear layers, two blocks
    for name, tensor in trained_weights.items():
        assert tensor.dtype == torch.float32
        assert tensor.abs().max() > 0, name  # B starts at 0


def test_checkpoints_are_complete_and_the_best_is_kept(trained: Run) -> None:
    """Every checkpoint has its marker; the adapter is that of the lowest validation loss."""
    kept = trained.complete_checkpoints()
    assert set(kept) == set(trained.checkpoints.iterdir())
    assert "adapter_model.safetensors" in json.loads((kept[-1] / COMPLETE).read_text())
    assert not any(fault(checkpoint) for checkpoint in kept)
    points = {row.step: row.numbers["validation/loss"] for row in history(trained) if "validation/loss" in row.numbers}
    best = min(points, key=lambda step: points[step])
    saved = load_file(trained.checkpoints / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in weights(trained).items())


@pytest.mark.parametrize("micro_batch", [1, 8], ids=["one at a time", "all at once"])
def test_the_micro_batch_changes_nothing(
    train: Train, trained: Run, recipe: Path, tmp_path: Path, micro_batch: int
) -> None:
    """Losses are those of the whole batch, however it is divided; also on average, not only each within rounding."""
    other = train(recipe, tmp_path, f"train.micro_batch={micro_batch}")
    difference = np.array(losses(other)) - np.array(losses(trained))
    assert np.abs(difference).max() < 1e-4
    assert abs(difference.mean()) < 2e-5


def test_another_seed_takes_other_steps(train: Train, trained: Run, recipe: Path, tmp_path: Path) -> None:
    """Negative control of the comparisons here: another order of examples shows."""
    other = train(recipe, tmp_path, "train.seed=7", "train.epochs=1")
    assert np.abs(np.array(losses(other)) - np.array(losses(trained)[:7])).max() > 1e-2


def test_a_stopped_run_continues_to_the_same_losses(train: Train, recipe: Path, trained: Run, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch and resumed, it takes the steps of a run that was never stopped."""
    run = _stopped_at_step(train, recipe, tmp_path, 4)
    assert not run.adapter.exists()
    before = losses(run)
    run.stop_request.unlink()
    assert command.main([str(run.folder)]) == 0
    whole = [*before, *losses(run)[len(before) :]]
    np.testing.assert_allclose(whole, losses(trained), rtol=0, atol=1e-6)
    for name, tensor in weights(trained).items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=0, atol=1e-6)


def _stopped_at_step(train: Train, recipe: Path, runs: Path, step: int, *overrides: str) -> Run:
    """A run that found the STOP file after `step` steps."""
    from finllm.training.stopping import StopRequests

    seen = 0

    class StopLater(StopRequests):
        @property
        def reason(self) -> str | None:
            nonlocal seen
            seen += 1
            if seen == step:
                self._run.stop_request.touch()
            return super().reason

    from finllm.training import stopping

    before, stopping.StopRequests = stopping.StopRequests, StopLater  # type: ignore[misc]
    try:
        run = train(recipe, runs, *overrides)
    finally:
        stopping.StopRequests = before  # type: ignore[misc]
    progress = Progress.of(run)
    assert progress is not None
    assert progress.outcome == "stopped"
    assert [path.name for path in run.complete_checkpoints()] == [f"checkpoint-{step}"]
    return run


def test_a_checkpoint_without_its_marker_does_not_count(train: Train, recipe: Path, tmp_path: Path) -> None:
    """One cut off in the middle of writing is passed over for the one before."""
    run = _stopped_at_step(train, recipe, tmp_path, 4)
    (run.checkpoints / "checkpoint-9").mkdir()
    assert [path.name for path in run.complete_checkpoints()] == ["checkpoint-4"]


def _poison(model: Path) -> None:
    """Put a NaN among the weights of a model folder."""
    from safetensors.torch import save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_a_loss_that_is_not_a_number_stops_the_run(
    train: Train, recipe: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says the step, the examples and the likely causes; the run folder keeps why; what was saved before stays."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    run = _stopped_at_step(train, recipe, tmp_path / "runs", 4, f"model.name={model}")
    run.stop_request.unlink()
    (checkpoint,) = run.complete_checkpoints()
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    _poison(model)
    assert command.main([str(run.folder)]) == 1
    said = capsys.readouterr().err
    assert "the loss is not a finite number at step 5, in the batch of table:" in said
    assert "learning rate" in said
    progress = Progress.of(run)
    assert progress is not None
    assert progress.outcome == "failed"
    assert "not a finite number" in progress.error
    assert not run.adapter.exists()
    assert run.complete_checkpoints() == [checkpoint]
    assert {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()} == before


def test_all_weights_can_be_trained(train: Train, recipe: Path, tmp_path: Path) -> None:
    """Without LoRA the whole model is saved, and predicts."""
    from finllm import SentimentPredictor

    run = train(recipe, tmp_path, "lora=null", "train.epochs=1", "train.learning_rate=1e-3")
    assert "model.layers.0.mlp.up_proj.weight" in load_file(run.adapter / "model.safetensors")
    assert SentimentPredictor(run.folder).predict("Profits today. Sales rose.")["sentiment"] in LABELS


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def launch(*arguments: str, runs: Path, processes: int) -> subprocess.Popen[str]:
    """`accelerate launch` as a user would, with a configuration of his own."""
    runs.mkdir(exist_ok=True)
    own = runs.parent / f"accelerate{processes}.yaml"
    kind = "MULTI_GPU" if processes > 1 else "NO"
    own.write_text(f"distributed_type: {kind}\nnum_processes: {processes}\nuse_cpu: true\nmixed_precision: 'no'\n")
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(own)]
    return subprocess.Popen(
        [*accelerate, "-m", "finllm.train", *arguments],
        env={**environment(), "FINLLM_RUNS": str(runs)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(recipe: Path, trained: Run, tmp_path: Path) -> None:
    """Two CPU processes over gloo, from a recipe, by plain `accelerate launch`: the same losses and the same adapter."""
    process = launch(str(recipe), runs=tmp_path / "runs", processes=2)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    run = Run(tmp_path / "runs" / "tiny")
    np.testing.assert_allclose(losses(run), losses(trained), rtol=0, atol=1e-4)
    for name, tensor in weights(trained).items():
        assert (weights(run)[name] - tensor).norm() < 1e-3 * tensor.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_and_leaves_no_process(recipe: Path, tmp_path: Path, number: signal.Signals) -> None:
    """A signal to `accelerate launch` alone reaches the trainer: it saves a checkpoint and is gone."""
    runs = tmp_path / "runs"
    process = launch(str(recipe), "train.epochs=400", runs=runs, processes=1)
    run = Run(runs / "tiny")
    _wait_for(lambda: len(history(run)) > 3)
    trainer = _children(process.pid)
    process.send_signal(number)
    process.communicate(timeout=120)
    _wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in trainer))
    assert len(trainer) == 1
    assert run.complete_checkpoints()
    progress = Progress.of(run)
    assert progress is not None
    assert progress.outcome == "stopped"


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait_for(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_the_loss_is_on_label_and_end_alone(tiny_model: Path) -> None:
    """Everything else is ignored; the end of sequence after the label is learnt, although nothing pads with it."""
    from transformers import AutoTokenizer

    prompter = Prompter(AutoTokenizer.from_pretrained(tiny_model), Prompt())
    example = Example("x:1", "x", "Sales rose.", "positive", "train")
    row = encode([example], prompter)[0]
    batch = pad([row, encode([Example("x:2", "x", "A longer text, it fell.", "neutral", "train")], prompter)[0]])
    learnt = batch["labels"][0][batch["labels"][0] != IGNORED].tolist()
    assert learnt == [*prompter.answers["positive"], prompter.tokenizer.eos_token_id]
    assert row.answer == learnt


def test_padding_does_not_change_the_loss(tiny_model: Path) -> None:
    """More padding, and padding with any token, gives the same loss."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompter = Prompter(AutoTokenizer.from_pretrained(tiny_model), Prompt())
    rows = encode([Example("x:1", "x", "Sales rose.", "positive", "train")], prompter)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    batch = pad(rows)
    results = []
    for extra, token in ((0, 0), (7, 0), (7, prompter.end), (30, 99)):
        padded = {
            "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, extra), value=token),
            "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, extra)),
            "labels": torch.nn.functional.pad(batch["labels"], (0, extra), value=IGNORED),
        }
        with torch.no_grad():
            results.append(float(model(**padded).loss))
    np.testing.assert_allclose(results, results[0], atol=1e-6)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_step_has_the_same_examples_on_any_machine(processes: int, accumulation: int) -> None:
    """The global batches of an epoch are the same sets, every example once, every process as many passes."""
    micro = 12 // processes // accumulation
    samplers = [
        GlobalBatches(LENGTHS, micro_batch=micro, accumulation=accumulation, rank=rank, processes=processes, seed=3)
        for rank in range(processes)
    ]
    passes = [list(sampler) for sampler in samplers]
    assert {len(p) for p in passes} == {len(samplers[0])} == {5 * accumulation}
    steps = [
        sorted(
            i for p in passes for batch in p[s * accumulation : (s + 1) * accumulation] for i in batch if i != NO_ROW
        )
        for s in range(5)
    ]
    one = GlobalBatches(LENGTHS, micro_batch=12, accumulation=1, rank=0, processes=1, seed=3)
    assert steps == [sorted(i for i in batch if i != NO_ROW) for batch in one]
    assert sorted(i for step in steps for i in step) == list(range(50))


def test_early_stopping_ends_a_run_that_no_longer_improves(train: Train, recipe: Path, tmp_path: Path) -> None:
    """With a learning rate far too high, validation gets worse, and the run ends before its epochs do."""
    run = train(recipe, tmp_path, "train.early_stopping=1", "train.epochs=20", "train.learning_rate=0.5")
    assert len(losses(run)) < 20 * 7
    assert (run.adapter / "adapter_model.safetensors").is_file()
