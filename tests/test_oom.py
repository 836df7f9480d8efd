"""Running out of memory: what is recorded, the lower plan that follows, and that the run's losses stay what they were."""

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from finllm.exhaustion import cause_of
from finllm.fitting import FEWEST_SCORED_TOKENS
from finllm.journal import history
from finllm.machine import Machine
from finllm.plan import Plan, Rows, decide
from finllm.recipe import load
from finllm.run import Progress, Run, State, create
from launch import tether
from launch.lowering import ADVICE, lowered
from launch.place import mark
from launch.replanning import replan
from launch.show import Silent
from launch.supervisor import supervise

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

TRAINER = """
    import os, sys, torch
    from finllm import training
    from finllm.training import sft

    class Narrow(sft.Sft):
        '''A trainer on a device without room for more than LARGEST examples, from step FROM on.'''

        def compute_loss(self, model, inputs, *rest, **more):
            here = os.environ.get("RANK", "0") == "RANK_OF_IT"
            if here and self.state.global_step >= FROM and self.args.per_device_train_batch_size > LARGEST:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().compute_loss(model, inputs, *rest, **more)

    training.METHODS["sft"] = Narrow
    from finllm.train import main
    sys.exit(main(sys.argv[1:]))
"""
NOTED = """
    import sys
    from pathlib import Path
    from finllm.plan import Plan
    from finllm.run import Progress, Run
    run = Run(Path(sys.argv[1]))
    plan = Plan.of(run)
    if not (CONDITION):
        said = "torch.OutOfMemoryError: CUDA out of memory"
        Progress("training", outcome="failed", error=said, cause="out of memory").save(run)
        sys.exit(1)
    print("micro-batch", plan.micro_batch)
    DONE
"""


def losses(run: Run) -> list[float]:
    """Training loss of each step; of a step that was taken again, the last."""
    return list({r.step: r.numbers["train/loss"] for r in history(run) if "train/loss" in r.numbers}.values())


def planned(recipe: Path, runs: Path, *overrides: str, processes: int = 1) -> tuple[Run, Plan]:
    """A run folder with its plan."""
    run = create(runs, "narrow")
    rows = Rows(train=52, validation=6, test=6)
    wanted = (*overrides, f"resources.cpu_processes={processes}", "evaluation.base=false")
    plan = decide(load(recipe, wanted), here=Machine((), 2), rows=rows, folder=run.folder, source=str(recipe))
    plan.save(run)
    State("created").save(run)
    return run, plan


def with_commands(run: Run, plan: Plan, **programs: tuple[str, ...]) -> None:
    plan.model_copy(update={"commands": programs}).save(run)


def program(run: Run, stage: str, text: str) -> tuple[str, ...]:
    path = run.folder / f"{stage}.py"
    path.write_text(textwrap.dedent(text))
    return (sys.executable, str(path), str(run.folder))


def trainer(run: Run, *, largest: int, start: int = 0, rank: int = 0) -> tuple[str, ...]:
    text = TRAINER.replace("LARGEST", str(largest)).replace("FROM", str(start)).replace("RANK_OF_IT", str(rank))
    return program(run, "train", text)


def noted(run: Run, stage: str, condition: str, done: str) -> tuple[str, ...]:
    return program(run, stage, NOTED.replace("CONDITION", condition).replace("DONE", done))


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_errors_that_mean_memory_ran_out_are_known() -> None:
    """Torch's own error, Python's, and what torch says on a CPU (a real one, of an exabyte)."""
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (real.value, torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        assert cause_of(error) == "out of memory"
    for other in (RuntimeError("shape mismatch"), ValueError("DefaultCPUAllocator"), KeyboardInterrupt()):
        assert cause_of(other) == ""


@pytest.mark.slow
def test_a_run_that_runs_out_of_memory_goes_on_to_the_same_losses(
    train: Callable[..., Run], recipe: Path, tmp_path: Path
) -> None:
    """Step 6 is too large; half the micro-batch resumes from step 4, in the middle of the first epoch of seven steps."""
    overrides = ("train.micro_batch=4", "train.evals_per_epoch=4")
    whole = train(recipe, tmp_path / "whole", *overrides)
    run, plan = planned(recipe, tmp_path / "runs", *overrides)
    with_commands(run, plan, train=trainer(run, largest=2, start=5))
    state = supervise(run, Silent(), ["train"])
    assert (state.status, state.attempt) == ("done", 2)
    assert "attempt 1 ran out of memory; now micro-batch 2 x 4 accumulated" in state.note
    log = run.log.read_text()
    assert f"{state.note}; from checkpoint-4" in log
    before = json.loads((run.folder / "plan-attempt1.json").read_text())
    after = Plan.of(run)
    assert (before["micro_batch"], before["accumulation"]) == (4, 2)
    assert (after.micro_batch, after.accumulation) == (2, 4)
    np.testing.assert_allclose(losses(run), losses(whole), rtol=0, atol=1e-4)
    assert len(losses(run)) == 14


@pytest.mark.slow
@pytest.mark.parametrize("shares", ["on", "off"])
def test_a_resumed_run_skips_examples_and_not_micro_batches(
    train: Callable[..., Run], recipe: Path, tmp_path: Path, shares: str
) -> None:
    """Eight at once until the middle of the second epoch, then four at a time: as if nothing had happened."""
    overrides = ("train.micro_batch=8", "train.evals_per_epoch=7", f"train.shared_prefix={shares}")
    whole = train(recipe, tmp_path / "whole", *overrides)
    run, plan = planned(recipe, tmp_path / "runs", *overrides)
    with_commands(run, plan, train=trainer(run, largest=4, start=10))
    state = supervise(run, Silent(), ["train"])
    assert state.status == "done"
    assert Plan.of(run).micro_batch == 4
    assert "from checkpoint-10" in run.log.read_text()
    np.testing.assert_allclose(losses(run), losses(whole), rtol=0, atol=1e-4)
    other = train(recipe, tmp_path / "other", *overrides, "train.seed=7")  # another order shows
    assert np.abs(np.array(losses(other)) - np.array(losses(whole))).max() > 1e-2


@pytest.mark.slow
def test_one_process_of_two_can_run_out_of_memory(recipe: Path, tmp_path: Path) -> None:
    """What the first process says of the connection that broke does not hide the cause; both start again."""
    run, plan = planned(recipe, tmp_path / "runs", "train.epochs=1", processes=2)
    command = list(plan.commands["train"])
    script = trainer(run, largest=2, rank=1)
    accelerated = (*command[: command.index("-m", 3)], *script[1:])
    with_commands(run, plan, train=accelerated)
    state = supervise(run, Silent(), ["train"])
    assert (state.status, state.attempt) == ("done", 2)
    assert (Plan.of(run).micro_batch, Plan.of(run).accumulation) == (2, 2)
    assert len(losses(run)) == 7
    assert not tether.members(mark(run))


def test_the_cause_is_recorded_and_stays(recipe: Path, tmp_path: Path) -> None:
    """The process that ran out says so, whichever it is; what others note afterwards does not replace it."""
    from finllm.progress import Steps
    from finllm.train import _failed

    run, _ = planned(recipe, tmp_path / "runs")
    _failed(run, "CUDA out of memory", "Traceback ...", 1, is_main=False, cause="out of memory")
    Steps("training", 14, "step", run).write()
    _failed(run, "connection closed by peer", "Traceback of another", 1, is_main=True)
    progress = Progress.of(run)
    assert progress is not None
    assert (progress.outcome, progress.cause, progress.error) == ("failed", "out of memory", "Traceback ...")


def test_memory_is_halved_until_nothing_is_left(recipe: Path, tmp_path: Path) -> None:
    """Micro-batch 8, 4, 2, 1, checkpointing, then smaller scoring batches; at the end the run fails, with advice."""
    run, plan = planned(recipe, tmp_path / "runs", "train.micro_batch=8")
    with_commands(run, plan, train=noted(run, "train", "False", ""))
    state = supervise(run, Silent(), ["train"])
    assert state.status == "failed"
    assert state.error == f"torch.OutOfMemoryError: CUDA out of memory; {ADVICE}"
    plans = [json.loads(path.read_text()) for path in sorted(run.folder.glob("plan-attempt*.json"))]
    last = Plan.of(run)
    assert [p["micro_batch"] for p in plans] == [8, 4, 2, 1]
    assert [p["gradient_checkpointing"] for p in plans] == [False] * 4
    assert (last.micro_batch, last.accumulation, last.gradient_checkpointing) == (1, 8, True)
    assert last.batch_tokens == FEWEST_SCORED_TOKENS
    assert state.attempt == len(plans) + 1
    assert {p["micro_batch"] * p["accumulation"] for p in plans} == {8}


def test_a_failure_of_another_kind_is_not_tried_again(recipe: Path, tmp_path: Path) -> None:
    """Only memory can be helped by another plan."""
    run, plan = planned(recipe, tmp_path / "runs")
    failing = program(run, "train", "raise RuntimeError('a bug')")
    with_commands(run, plan, train=failing)
    state = supervise(run, Silent(), ["train"])
    assert (state.status, state.attempt, state.error) == ("failed", 1, "RuntimeError: a bug")
    assert not list(run.folder.glob("plan-attempt*"))


def test_a_stop_that_was_asked_for_is_not_followed_by_another_attempt(recipe: Path, tmp_path: Path) -> None:
    """A person's word goes before the supervisor's help."""
    run, plan = planned(recipe, tmp_path / "runs")
    text = NOTED.replace("CONDITION", "run.stop_request.touch()").replace("DONE", "")
    with_commands(run, plan, train=program(run, "train", text))
    state = supervise(run, Silent(), ["train"])
    assert (state.status, state.attempt) == ("failed", 1)
    assert Plan.of(run).micro_batch == plan.micro_batch


def test_an_evaluation_is_repeated_with_smaller_batches(recipe: Path, tmp_path: Path) -> None:
    """The training is not done again, and its plan stays."""
    run, plan = planned(recipe, tmp_path / "runs")
    fits = noted(run, "evaluate", "plan.batch_tokens <= 4096", "")
    with_commands(run, plan, train=noted(run, "train", "True", "run.adapter.mkdir()"), evaluate=fits)
    state = supervise(run, Silent())
    assert (state.status, state.attempt) == ("done", 3)
    assert Plan.of(run).batch_tokens == 4096
    assert Plan.of(run).micro_batch == plan.micro_batch
    assert run.log.read_text().count("micro-batch 4\n") == 2


def test_on_a_gpu_weights_go_back_to_four_bits_last(tmp_path: Path) -> None:
    """The estimate follows each step down, and is always of the plan that holds it."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: {name: mistralai/Mistral-7B-v0.1, quantization: nf4}\ndata: sample\n"
        "train: {method: sft, global_batch: 4}\nresources: {gpu: l4-24gb}\n"
    )
    plan = decide(load(recipe), here=Machine((), 2), rows=None, folder=tmp_path / "run", source=str(recipe))
    seen = []
    while (found := lowered(plan, "train")) is not None:
        plan, said = found
        assert plan.reasons[-1] == f"out of memory before: {said}"
        assert plan.memory is not None
        seen.append((plan.micro_batch, plan.gradient_checkpointing, plan.dequantize, plan.memory.total))
    by_size = {size: total for size, checkpointing, _, total in seen if not checkpointing}
    assert list(by_size) == sorted(by_size, reverse=True)
    assert by_size[min(by_size)] == min(by_size.values())
    assert seen[-1][:3] == (1, True, False)
    assert seen[-1][3] < by_size[1]


def test_the_hand_written_passes_follow_the_plan(recipe: Path, tmp_path: Path) -> None:
    """Else a plan with checkpointing would run out of memory as the one before it did."""
    from finllm import data, models
    from finllm.prompts import Prompter
    from finllm.training import handwritten
    from finllm.training.batches import encode

    _, plan = planned(recipe, tmp_path / "runs")
    loaded = models.load(plan.recipe.model, dtype="fp32", device="cpu")
    assert plan.recipe.lora is not None
    model = models.with_adapter(loaded.model, plan.recipe.lora, 0)
    rows = encode(data.read_parts(plan.recipe.data).train[:8], Prompter(loaded.tokenizer, plan.recipe.prompt))
    for checkpointing in (False, True):
        asked = plan.model_copy(update={"hand_written": True, "gradient_checkpointing": checkpointing})
        engine = handwritten.engine(model, rows, asked, is_main=False)
        assert engine is not None
        assert engine.recompute is checkpointing


def test_an_odd_batch_is_divided_as_it_can_be(recipe: Path, tmp_path: Path) -> None:
    """Not more than half of 9 that divides 9 is 3."""
    _, plan = planned(recipe, tmp_path / "runs", "train.global_batch=9", "train.micro_batch=9")
    sizes = []
    while (found := lowered(plan, "train")) is not None:
        plan = found[0]
        sizes.append((plan.micro_batch, plan.accumulation))
    assert sizes[:3] == [(3, 3), (1, 9), (1, 9)]


def test_another_number_of_processes_does_not_forget_that_memory_ran_out(recipe: Path, tmp_path: Path) -> None:
    run, plan = planned(recipe, tmp_path / "runs", "train.micro_batch=4")
    lower = plan
    while not lower.gradient_checkpointing:
        found = lowered(lower, "train")
        assert found is not None
        lower = found[0]
    lower.save(run)
    replan(run, ("resources.cpu_processes=2",))
    after = Plan.of(run)
    assert (after.processes, after.micro_batch, after.gradient_checkpointing) == (2, 1, True)
    assert after.processes * after.micro_batch * after.accumulation == plan.micro_batch * plan.accumulation
    replan(run, ("resources.cpu_processes=1",))  # nor does the time after that
    assert (Plan.of(run).micro_batch, Plan.of(run).gradient_checkpointing) == (1, True)
    replan(run, ("train.micro_batch=2", "train.gradient_checkpointing=auto"))  # who asks for more shall have it
    assert (Plan.of(run).micro_batch, Plan.of(run).gradient_checkpointing) == (2, False)
    plan.save(run)
    replan(run, ("resources.cpu_processes=2",))  # of a plan that was never lowered nothing is taken
    assert (Plan.of(run).micro_batch, Plan.of(run).gradient_checkpointing) == (4, False)


def test_no_process_is_left(recipe: Path, tmp_path: Path) -> None:
    """Also of a trainer that hangs after it has said that its memory ran out."""
    run, plan = planned(recipe, tmp_path / "runs")
    text = NOTED.replace("CONDITION", "plan.micro_batch <= 2").replace("DONE", "")
    hanging = text.replace("sys.exit(1)", "import time; time.sleep(600)")
    with_commands(run, plan, train=program(run, "train", hanging))
    from launch import supervisor

    before, supervisor.OTHERS_SECONDS = supervisor.OTHERS_SECONDS, 0.5
    try:
        state = supervise(run, Silent(), ["train"])
    finally:
        supervisor.OTHERS_SECONDS = before
    assert (state.status, state.attempt) == ("done", 2)
    assert not tether.members(mark(run))
    assert (run.folder / "plan-attempt1.json").exists()
