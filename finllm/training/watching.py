"""What happens around the steps: tracking, progress, checkpoints marked complete, stopping, a broken loss."""

import resource
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from finllm import checkpoints
from finllm.data.preferences import Preference
from finllm.errors import RunError
from finllm.example import Example
from finllm.fast.engine import pinned
from finllm.progress import Steps
from finllm.tracking import Tracker
from finllm.training.stopping import StopRequests


def memory_gib() -> float:
    """Peak memory of this process so far: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


SAY_SECONDS = 5.0
"""Between two lines of training loss in the log; metrics.jsonl has them all."""


class LossWatch:
    """Keeps the losses of each step, and which examples they came from, until they are seen to be finite."""

    def __init__(self, examples: Sequence[Example] | Sequence[Preference]) -> None:
        self._examples = examples
        self._passes: list[tuple[torch.Tensor, list[int]]] = []
        self._steps: deque[_Step] = deque()
        self.examples_done = 0
        self.tokens_done = 0

    def add(self, loss: torch.Tensor, meta: dict[str, Any]) -> None:
        """One forward pass is done."""
        self._passes.append((loss.detach(), meta["rows"]))
        self.examples_done += len(meta["rows"])
        self.tokens_done += meta["tokens"]

    def check(self, step: int, learning_rate: float, *, wait: bool = True) -> None:
        """Raise RunError if a loss was not a finite number; without `wait`, that of this step may be told a step later.

        What is on its way from a GPU takes until the GPU has done the step; to wait for it leaves the GPU idle.
        """
        if self._passes:
            losses = torch.stack([loss for loss, _ in self._passes])
            self._steps.append(_Step(step, learning_rate, [rows for _, rows in self._passes], *_on_its_way(losses)))
            self._passes = []
        late = 1 if self._steps and self._steps[-1].arrived is not None and not wait else 0
        while len(self._steps) > late:
            self._judge(self._steps.popleft())

    def _judge(self, one: "_Step") -> None:
        if one.arrived is not None:
            one.arrived.synchronize()
        finite = torch.isfinite(one.losses)
        if bool(finite.all()):
            return
        rows = [row for good, rows in zip(finite.tolist(), one.rows, strict=True) if not good for row in rows]
        named = ", ".join(self._examples[row].id for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
        raise RunError(
            f"the loss is not a finite number at step {one.step}, in the batch of {named}\n"
            f"Likely causes: learning rate {one.learning_rate:.1e} is too high (try a tenth); a base model whose "
            "weights hold NaN or overflow in this dtype (try model.dtype=fp32).\n"
            "What was saved before this step stands: `finllm resume` continues from there with the same settings."
        )


@dataclass(frozen=True, slots=True)
class _Step:
    """Losses of one step's passes."""

    step: int
    learning_rate: float
    rows: list[list[int]]
    losses: torch.Tensor
    arrived: Any
    """A CUDA event after which `losses` can be read, or None at once."""


def _on_its_way(losses: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """The losses in the host's memory, and when they will be there."""
    if not losses.is_cuda:
        return losses, None
    here = torch.empty_like(losses, device="cpu", pin_memory=True)
    here.copy_(losses, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return here, event


class Watcher(TrainerCallback):  # type: ignore[misc]  # Transformers ships no types for its callbacks
    """Connects the trainer with the run folder and with tracking; one for each process."""

    def __init__(
        self, *, losses: LossWatch, steps: Steps, stop: StopRequests, tracker: Tracker, is_main: bool, processes: int
    ) -> None:
        self._losses, self._steps, self._stop, self._tracker = losses, steps, stop, tracker
        self._is_main, self._processes = is_main, processes
        self._last = (time.monotonic(), 0, 0)
        self._said = float("-inf")
        self.stopped_by: str | None = None
        self._answer: tuple[torch.Tensor, Any] | None = None

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """The first step, or the first after a resume."""
        self._last = (time.monotonic(), 0, 0)
        self._steps.begin_at(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Weights have changed: look at the loss, and whether to stop."""
        saves = state.save_steps and state.global_step % state.save_steps == 0
        last = state.global_step >= state.max_steps
        rate = more["optimizer"].param_groups[0]["lr"]
        self._losses.check(state.global_step, rate, wait=bool(saves or last))
        self._steps.at(state.global_step)
        if state.global_step >= state.max_steps:
            control.should_evaluate = args.eval_strategy != "no"
        reason = self._anyone(self._stop.reason)
        if reason is not None:
            self._losses.check(state.global_step, rate)
            self.stopped_by = reason
            control.should_save = control.should_training_stop = True

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
        """Figures of a step or of a validation."""
        numbers = {_key(name): float(value) for name, value in logs.items() if isinstance(value, int | float)}
        if "loss" in logs:
            numbers |= self._pace()
            self._steps.at(state.global_step, logs["loss"])
        self._tracker.log(state.global_step, **numbers)
        self._say(state, numbers)

    def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        """The parts of a checkpoint are written."""
        _barrier()  # every process has written its part
        if self._is_main:
            checkpoints.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _say(self, state: Any, numbers: dict[str, float]) -> None:
        """A line for the log: each validation, and the training loss every few seconds."""
        if not self._is_main:
            return
        head = f"step {state.global_step}/{state.max_steps}"
        if "validation/loss" in numbers:
            figures = (f"{name} {numbers[f'validation/{name}']:.4f}" for name in ("loss", "accuracy", "macro_f1"))
            print(f"{head}: validation {', '.join(figures)}", flush=True)
        elif "train/loss" in numbers and time.monotonic() - self._said > SAY_SECONDS:
            self._said = time.monotonic()
            pace = numbers["train/examples_per_s"]
            print(f"{head}: loss {numbers['train/loss']:.4f}, {pace:.1f} examples/s", flush=True)

    def _pace(self) -> dict[str, float]:
        """Throughput since the last log, over all processes, and peak memory of this one."""
        then, examples, tokens = self._last
        now = time.monotonic()
        self._last = (now, self._losses.examples_done, self._losses.tokens_done)
        scale = self._processes / max(now - then, 1e-9)
        return {
            "train/examples_per_s": (self._losses.examples_done - examples) * scale,
            "train/tokens_per_s": (self._losses.tokens_done - tokens) * scale,
            "train/memory_gib": memory_gib(),
        }

    def _anyone(self, reason: str | None) -> str | None:
        """The reason to stop of any process; all processes get the same answer, so all stop at the same step.

        On GPUs it is the answer to the question of the step before, for which none has to wait.
        """
        if not dist.is_initialized():
            return reason
        asked = pinned(torch.tensor([reason is not None], dtype=torch.int32)).to(_device(), non_blocking=True)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        answer, self._answer = self._answer, _on_its_way(asked)
        if not asked.is_cuda:
            answer = self._answer
        if answer is None:
            return None
        if answer[1] is not None:
            answer[1].synchronize()
        return (reason or "another process") if answer[0].item() else None


def _key(name: str) -> str:
    """Transformers' name of a figure as a path: `eval_loss` is `validation/loss`."""
    return f"validation/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


OnValidation = Callable[[], dict[str, float]]
"""Computes the validation figures, on every process alike."""


def validated(trainer: Any, validation: OnValidation | None) -> dict[str, float]:
    """The figures that choose the best checkpoint, logged as `eval_...`, in place of a trainer's own evaluation."""
    assert validation is not None, "validation is scheduled only where there is a validation part"
    training = trainer.model.training
    trainer.model.eval()
    figures = {f"eval_{name}": value for name, value in validation().items()}
    trainer.log(figures)
    trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, figures)
    trainer.model.train(training)
    return figures
