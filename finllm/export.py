"""A trained run as files for other programs, checked against the answers that its report was made from."""

import gc
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from finllm import cards, licences, llamacpp, models, predictions, scoring
from finllm.errors import RunError
from finllm.example import LABELS
from finllm.files import write_json, write_text
from finllm.models import Card, Loaded
from finllm.plan import Plan
from finllm.predictions import Prediction
from finllm.progress import steps
from finllm.prompts import Prompter
from finllm.recipe import FOUR_BIT, Model
from finllm.run import Run
from finllm.scores import Scores

Form = Literal["merged", "adapter", "gguf"]
TIES_NATS = {"fp32": 1e-3, "bf16": 0.25}
"""Labels whose log-probabilities the run has closer than this are a tie: rounding may decide either way.

Rounding SmolLM2's merged weights to bf16 moved log-probabilities by up to 0.20 nats (docs/decisions/0011).
"""
MOST_NATS = {"fp32": 0.01, "bf16": 1.0}
"""A log-probability that differs by more is no rounding, even where no label differs on the few texts of a test part."""
LEAST = 1e-30
"""Probabilities below it count as it; their logarithms would say more of rounding than of the model."""
LEFT_BEHIND = ("README.md", "training_args.bin")
"""What PEFT and Transformers write beside weights: a card without content, and a pickle that names this machine."""


class AnswersDifferError(RunError):
    """The exported model does not answer as the run did."""


@dataclass(frozen=True)
class Check:
    """How the exported model answers the rows that the run was measured on."""

    rows: int
    differing: int
    """Rows with another label, ties left out."""
    ties: int
    """Rows with another label, where the run had both within TIES_NATS."""
    largest_nats: float
    """Largest difference of a label's log-probability among the three."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    form: Form
    check: Check


def export(run: Run, form: Form, to: Path, *, converter: Path | None = None) -> Exported:
    """Write an evaluated run to the new folder `to`, with a model card, after it has answered as the run did.

    Raises RunError where that cannot be done, AnswersDifferError where the answers differ; neither leaves anything at `to`.
    """
    plan, card, measured = Plan.of(run), Card.of(run.adapter), _measured(run)
    scores = Scores.of(run)
    if form == "adapter" and card.trained == "all weights":
        raise RunError(f"{run.name} trained all weights: there is no adapter; use --format merged")
    if to.exists():
        raise RunError(f"{to} exists; give --to another folder, or remove it")
    tool = llamacpp.find_converter(converter) if form == "gguf" else None
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        loaded = _write(run, plan, card, form, partial, tool)
        check = compare(_answers(loaded, card, measured, plan.batch_tokens), measured, TIES_NATS[plan.dtype])
        if check.differing or check.largest_nats > MOST_NATS[plan.dtype]:
            raise AnswersDifferError(_why(run, form, check))
        write_text(partial / "README.md", cards.markdown(run, plan, scores, card, form, loaded.tokenizer, said(check)))
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(to, form, check)


def _measured(run: Run) -> list[Prediction]:
    """The tuned model's answers: on the test part, or where none was scored on whatever was."""
    files = sorted(run.predictions.glob("*.tuned.jsonl"))
    chosen = [file for file in files if file.name.endswith(".test.tuned.jsonl")] or files
    if not chosen:
        raise RunError(f"{run.name} has no answers to compare with; `finllm evaluate {run.folder}` first")
    return [row for file in chosen for row in predictions.read(file)]


def _write(run: Run, plan: Plan, card: Card, form: Form, to: Path, tool: tuple[str, ...] | None) -> Loaded:
    """Write the files and load them again, as their user will."""
    if form == "adapter":
        _copy_adapter(run.adapter, card, to)
        base = models.load(card.base, dtype=plan.dtype, device=_device(), dequantize=plan.dequantize)
        return Loaded(models.attach(base.model, to), base.tokenizer)
    merged = to if tool is None else to / "merged"
    _merge(run.adapter, card, plan, merged)
    gc.collect()
    if tool is None:
        return models.load(Model(name=str(merged)), dtype=plan.dtype, device=_device())
    file = to / f"{run.name}-{llamacpp.TYPES[plan.dtype]}.gguf"
    llamacpp.convert(tool, merged, file, plan.dtype)
    loaded = llamacpp.load(file, merged, dtype=plan.dtype, device=_device())
    shutil.rmtree(merged)
    return loaded


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _copy_adapter(adapter: Path, card: Card, to: Path) -> None:
    """The adapter, naming its base as others can find it; not the folder of this machine's cache."""
    shutil.copytree(adapter, to, ignore=shutil.ignore_patterns(*LEFT_BEHIND), dirs_exist_ok=True)
    config = json.loads((to / "adapter_config.json").read_text(encoding="utf-8"))
    write_json(to / "adapter_config.json", {**config, "base_model_name_or_path": licences.base_id(card.base)})


def _merge(adapter: Path, card: Card, plan: Plan, to: Path) -> None:
    """Write whole weights in `plan.dtype`: the base loaded anew and dequantised, plus the adapter."""
    if card.trained == "all weights":
        shutil.copytree(adapter, to, ignore=shutil.ignore_patterns(*LEFT_BEHIND), dirs_exist_ok=True)
        return
    loaded = base_of(card.base, plan.dtype)
    merged = models.attach(loaded.model, adapter).merge_and_unload(safe_merge=True)  # refuses NaN
    merged.save_pretrained(to)
    loaded.tokenizer.save_pretrained(to)
    card.model_copy(update={"trained": "all weights"}).save(to)


def base_of(spec: Model, dtype: Literal["bf16", "fp32"]) -> Loaded:
    """The base in whole weights of `dtype`: of a 4-bit one the values that were trained on (decision 11), else its own.

    LLM.int8() quantises activations too; no whole weights compute the same, and the published ones come nearest.
    """
    whole = spec if spec.quantization in FOUR_BIT else spec.model_copy(update={"quantization": "none"})
    return models.load(whole, dtype=dtype, device=_device(), dequantize=True)


def _answers(loaded: Loaded, card: Card, rows: list[Prediction], batch_tokens: int) -> NDArray[np.float64]:
    """Log-probabilities (rows, labels) in nats, given that the answer is one of the labels."""
    prompter = Prompter(loaded.tokenizer, card.prompt)
    prompts = prompter.render([row.text for row in rows], [row.target for row in rows])
    labels = [prompter.answers[label] for label in LABELS]
    with steps("checking the exported model", len(rows), "text") as counter:
        ids = [prompt.ids for prompt in prompts]
        found = scoring.score(loaded.model, ids, labels, batch_tokens=batch_tokens, steps=counter)
    return np.log(np.maximum(scoring.probabilities(found), LEAST))


def said(check: Check) -> str:
    """The outcome of a check without differing labels, in one sentence."""
    ties = f", but for {check.ties} tie(s)" if check.ties else ""
    return (
        f"The exported files gave the {check.rows:,} texts that were scored the labels of the run{ties}; "
        f"log-probabilities differ by at most {check.largest_nats:.2g} nats."
    )


def _why(run: Run, form: Form, check: Check) -> str:
    return (
        f"the exported model does not answer as {run.name} did: another label on {check.differing} of {check.rows} texts "
        f"(ties not counted), log-probabilities up to {check.largest_nats:.2g} nats apart; nothing was kept. "
        f"Is {run.adapter} still the one that was evaluated? `finllm evaluate {run.folder}` measures it again"
        + ("; if so, llama.cpp's converter does not write this model rightly" if form == "gguf" else "")
    )


def compare(answers: NDArray[np.float64], measured: list[Prediction], tie: float) -> Check:
    """How far `answers`, log-probabilities (rows, labels), are from the run's."""
    expected = np.log(np.maximum([row.probabilities for row in measured], LEAST))
    chosen = answers.argmax(axis=1)
    every = np.arange(len(measured))
    behind = expected.max(axis=1) - expected[every, chosen]  # nats by which the run preferred its own label
    differ = chosen != expected.argmax(axis=1)
    return Check(
        rows=len(measured),
        differing=int((differ & (behind >= tie)).sum()),
        ties=int((differ & (behind < tie)).sum()),
        largest_nats=float(np.abs(answers - expected).max()),
    )
