"""What was asked for, decided and used: settings, data, and the command that repeats a run."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finllm.example import SPLITS
from finllm.memory import described
from finllm.methods import Dpo, Explanations, Training
from finllm.plan import Plan, Rows
from finllm.recipe import Recipe
from finllm.report.document import Block, Code, Table, Text

SHIPPED = Path(__file__).parents[2] / "recipes"


def settings(plan: Plan) -> dict[str, str]:
    """What was asked for and what was decided, in words."""
    recipe = plan.recipe
    model = recipe.model
    revision = f" at {model.revision}" if model.revision else ""
    quantized = "" if model.quantization == "none" else f", {model.quantization}"
    unpacked = f", dequantised once to {plan.dtype}" if plan.dequantize else ""
    return {
        "model": f"{model.name}{revision}{quantized}{unpacked}",
        "prompt": f"{recipe.prompt.template}, at most {recipe.prompt.max_tokens} tokens: {recipe.prompt.instruction}",
        **_method(plan, recipe),
        "device": f"{plan.gpu or plan.device}, {_processes(plan)}, {plan.dtype}",
        "memory, estimated": "not known before loading" if plan.memory is None else described(plan.memory, plan.device),
    }


def _method(plan: Plan, recipe: Recipe) -> dict[str, str]:
    train, lora = recipe.train, recipe.lora
    if train is None:
        return {"method": "none: the model as it is"}
    scale = "sqrt(rank)" if lora and lora.rank_stabilized else "rank"
    return {
        "method": train.method,
        **_learnt(train, recipe.explanations),
        "trained": "all weights"
        if lora is None
        else f"LoRA, rank {lora.rank}, alpha {lora.alpha:g} over {scale}, dropout {lora.dropout:g}, on "
        + (lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)),
        "length": f"{plan.steps if plan.steps is not None else '?'} steps" + f", {train.epochs:g} epochs",
        "batch": f"{train.global_batch} = {_processes(plan)} x {plan.micro_batch} x {plan.accumulation} accumulated; "
        f"gradient checkpointing {'on' if plan.gradient_checkpointing else 'off'}; "
        f"shared prefix {'on' if plan.shared_prefix else 'off'}",
        "learning rate": f"{train.learning_rate:g}, {train.schedule}, warm-up {100 * train.warmup_share:g} %",
        "optimizer": f"{train.optimizer}, weight decay {train.weight_decay:g}, gradient norm at most {train.max_grad_norm:g}",
        "seed": str(train.seed),
    }


def _learnt(train: Training, explanations: Explanations | None) -> dict[str, str]:
    """What a method learns from, and its loss."""
    if isinstance(train, Dpo):
        beside = f", {train.sft_weight:g} of cross-entropy beside it" if train.sft_weight else ""
        doubted = {"all": train.label_smoothing, **train.band_smoothing}
        doubts = ", ".join(f"{share:g} of {band}" for band, share in doubted.items() if share) or "none"
        return {
            "goes on from": str(train.init) if train.init else "the base model",
            "pairs": "; ".join(_told(source.model_dump(mode="json", exclude_none=True)) for source in train.pairs),
            "loss": f"{train.loss}, beta {train.beta:g}{beside}; label smoothing: {doubts}",
        }
    if explanations is None:
        return {}
    return {
        "explanations": f"learnt, weight {explanations.explanation_weight:g} a token, {explanations.label_weight:g} of labels"
    }


def _told(spec: Mapping[str, Any]) -> str:
    """The keys and values of a part of a recipe."""
    shown = ((key, ", ".join(value) if isinstance(value, list) else value) for key, value in spec.items())
    return ", ".join(f"{key} {value}" for key, value in shown)


def _processes(plan: Plan) -> str:
    return f"{plan.processes} process{'' if plan.processes == 1 else 'es'}"


def data(plan: Plan, rows: Mapping[str, Rows]) -> Table:
    """Each data set as it was asked for, and its examples where they were counted."""
    lines = []
    for spec in plan.recipe.data:
        asked = spec.model_dump(mode="json", exclude={"alias"}, exclude_none=True)
        told = "; ".join(f"{key} {', '.join(v) if isinstance(v, list) else v}" for key, v in asked.items())
        counted = rows[spec.title].model_dump() if spec.title in rows else {}
        lines.append((spec.title, *(f"{counted[part]:,}" if counted else "" for part in SPLITS), told))
    return Table(("data set", *SPLITS, "as asked"), lines)


def repeat(plan: Plan) -> list[Block]:
    """The command, commit and versions."""
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    return [
        Code(shlex.join(["finllm", "launch", _named(plan.source), *plan.overrides])),
        Text(f"Commit {plan.commit or 'unknown'}; planned {plan.created}; {versions}."),
        Text(
            "Every answer with its probabilities stands in [predictions/](predictions/), every figure in "
            "[scores.json](scores.json), the resolved recipe in [recipe.yaml](recipe.yaml)."
        ),
    ]


def _named(source: str) -> str:
    """A recipe's path, or of a shipped one its name, which works on any machine."""
    path = Path(source)
    return path.relative_to(SHIPPED).with_suffix("").as_posix() if path.is_relative_to(SHIPPED) else source
