"""Training: the table of contents of a run, shared by all methods."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from finllm import checkpoints, data, metrics, models, shared_prefix, spread, tracking
from finllm.data import Parts
from finllm.errors import RunError
from finllm.example import LABELS
from finllm.fast.engine import Engine
from finllm.learnt import initial_adapter, learnt
from finllm.methods import Training
from finllm.models import Card
from finllm.plan import Plan, steps_of
from finllm.progress import steps
from finllm.prompts import Prompter
from finllm.recipe import APART
from finllm.run import Run
from finllm.training import dpo, handwritten, sft, sharded, sharing
from finllm.training.arguments import arguments
from finllm.training.stopping import StopRequests
from finllm.training.watching import LossWatch, OnValidation, Watcher, memory_gib

METHODS: dict[str, Any] = {"sft": sft.Sft, "dpo": dpo.Dpo}
"""A training method is a trainer in a module of its own, and a type in the recipe's union."""


def train(run: Run, plan: Plan, stop: StopRequests, *, rank: int, local_rank: int) -> str | None:
    """Train as planned and leave the weights in the run folder; returns what stopped it early, or None."""
    recipe = plan.recipe
    assert recipe.train is not None, "the plan of a run without training has no command that leads here"
    parts, notes = data.training_parts(recipe.data)
    if not parts.train:
        raise RunError(f"{', '.join(s.title for s in recipe.data)}: no training rows; `parts` must name train")
    method, items, init = METHODS[recipe.train.method], learnt(recipe, parts), initial_adapter(recipe)
    explains = recipe.explanations is not None or (init is not None and Card.of(init).explains)
    if rank == 0:
        print(*notes, _counts(parts, items), sep="\n", flush=True)
    loaded = models.load(
        recipe.model,
        dtype=_weights_dtype(plan),
        device="cpu" if plan.loads_on_host else models.device_of(plan.device, local_rank),
        dequantize=plan.dequantize,
        apart=plan.strategy in APART,
        run=run if rank == 0 else None,
    )
    prompter = Prompter(loaded.tokenizer, recipe.prompt)
    rows = method.encode(items, prompter, recipe)
    handwritten.unpack_if_roomy(loaded.model, rows, plan, is_main=rank == 0)
    model = models.trainable(loaded.model, recipe.lora, recipe.train.seed, init)
    if recipe.distributed.offload:
        sharded.use_all_cores()
    if plan.strategy == "zero3":
        sharded.gather_by_layer(model)
    tracker = tracking.start(run, plan, "train", main=rank == 0)
    total = steps_of(recipe.train, len(items))
    losses = LossWatch(items)
    engine = handwritten.engine(model, rows, plan, is_main=rank == 0)
    collate = _collate(method, model, rows, plan, engine, is_main=rank == 0)
    with steps("training", total, "step", run if rank == 0 else None) as counter:
        watcher = Watcher(
            losses=losses, steps=counter, stop=stop, tracker=tracker, is_main=rank == 0, processes=plan.processes
        )
        trainer = method(
            model=model,
            processing_class=loaded.tokenizer,
            args=arguments(run, plan, len(items), validates=bool(parts.validation), engine=engine is not None),
            rows=rows,
            collate=collate or method.pad,
            engine=engine,
            losses=losses,
            validation=_validation(model, parts, prompter, plan, engine) if parts.validation else None,
            callbacks=_callbacks(recipe.train, watcher, validates=bool(parts.validation)),
        )
        with shared_prefix.attending(model, streams=collate is not None and engine is None):
            _run(trainer, run, tracker)
    if watcher.stopped_by is None:
        _save(trainer, loaded.tokenizer, run, plan, explains=explains)
    tracker.finish()
    return watcher.stopped_by


def _collate(method: Any, model: Any, rows: Sequence[Any], plan: Plan, engine: Engine | None, *, is_main: bool) -> Any:
    """Makes batches as the passes of this run need them; None is padded rows."""
    if engine is None:
        return sharing.collate(model, rows, plan, is_main=is_main, make=method.stream)
    shared = shared_prefix.shared_length([row.prompt for row in rows])
    return partial(method.packed, shared=shared, device=plan.device)


def _run(trainer: Any, run: Run, tracker: tracking.Tracker) -> None:
    """All steps that are left, from the newest complete checkpoint."""
    from transformers import PrinterCallback

    if trainer.accelerator.is_main_process:
        for line in checkpoints.set_faulty_aside(run):
            print(line, flush=True)
    trainer.accelerator.wait_for_everyone()
    done = run.complete_checkpoints()
    began = time.monotonic()
    trainer.remove_callback(PrinterCallback)  # the watcher says it better
    trainer.train(resume_from_checkpoint=str(done[-1]) if done else None)
    figures = {"train/seconds": time.monotonic() - began, "train/memory_gib": memory_gib()}
    if trainer.state.best_metric is not None:
        figures["validation/best_loss"] = trainer.state.best_metric
    tracker.summary(**figures)


def _weights_dtype(plan: Plan) -> Any:
    """Weights that are trained are fp32, whatever the arithmetic; frozen ones are as the plan says."""
    return plan.dtype if plan.recipe.lora else "fp32"


def _counts(parts: Parts, items: Sequence[Any]) -> str:
    pairs = "" if items is parts.train else f"; {len(items)} pairs to learn from"
    return f"{len(parts.train)} training, {len(parts.validation)} validation, {len(parts.test)} test examples{pairs}"


def _validation(model: Any, parts: Parts, prompter: Prompter, plan: Plan, engine: Engine | None) -> OnValidation:
    """A function that scores the validation part, its rows spread over the processes."""
    examples = parts.validation
    prompts = [p.ids for p in prompter.render([e.text for e in examples], [e.target for e in examples])]
    answers = [prompter.answers[label] for label in LABELS]
    gold = np.array([LABELS.index(e.label) for e in examples])

    def validate() -> dict[str, float]:
        with shared_prefix.attending(model, streams=False), sharded.entered(model):
            rows = spread.score(
                model,
                prompts,
                answers,
                batch_tokens=plan.batch_tokens,
                engine=engine,
                in_step=plan.strategy in APART,
            )
        predicted = rows.argmax(axis=1)
        return {
            "loss": float(-rows[np.arange(len(gold)), gold].mean()),
            "accuracy": metrics.accuracy(gold, predicted),
            "macro_f1": metrics.macro_f1(gold, predicted),
        }

    return validate


def _callbacks(spec: Training, watcher: Watcher, *, validates: bool) -> list[Any]:
    from transformers import EarlyStoppingCallback

    if spec.early_stopping is None:
        return [watcher]
    if not validates:
        raise RunError("train.early_stopping needs a validation part, which this data does not have")
    return [watcher, EarlyStoppingCallback(early_stopping_patience=spec.early_stopping)]


def _save(trainer: Any, tokenizer: Any, run: Run, plan: Plan, *, explains: bool) -> None:
    """The best weights, with what is needed to use them; whole or not at all."""
    temporary = run.folder / ".adapter"
    trainer.save_model(str(temporary))
    if not trainer.accelerator.is_main_process:
        return
    tokenizer.save_pretrained(temporary)
    recipe = plan.recipe
    Card(
        base=recipe.model,
        prompt=recipe.prompt,
        trained="adapter" if recipe.lora else "all weights",
        explains=explains,
        commit=plan.commit,
    ).save(temporary)
    temporary.rename(run.adapter)
