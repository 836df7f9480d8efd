"""A new plan for a run that goes on: on other GPUs, or shared otherwise. Its steps stay what they were."""

import json
from collections.abc import Sequence

from finllm import machine, yamlfile
from finllm.errors import RecipeError, RunError
from finllm.files import write_text
from finllm.plan import Plan, decide
from finllm.recipe import BY_DEEPSPEED, SHARDED, Recipe
from finllm.run import Run, State
from finllm.yamlfile import Document
from launch.lowering import lowered
from launch.show import called

CHANGEABLE = ("resources.", "distributed.", "train.micro_batch=", "train.gradient_checkpointing=")
"""Keys that change where and how a run is computed, and not what."""


def replan(run: Run, overrides: Sequence[str]) -> None:
    """Put another plan into a run folder, and keep the one before; raises FinllmError where its checkpoints forbid it."""
    before, state = Plan.of(run), State.of(run)
    if state is not None and state.backend != "local":
        raise RunError(f"{run.name} runs on a cluster; give --cluster with another profile, or launch anew")
    for override in overrides:
        if not override.startswith(CHANGEABLE):
            raise RecipeError(
                f"{override}: a run that goes on can change {', '.join(key.rstrip('.=') for key in CHANGEABLE)}; "
                "launch a new run for anything else"
            )
    after = decide(
        _changed(before, overrides),
        here=machine.here(),
        rows=before.rows,
        folder=run.folder,
        source=before.source,
        overrides=(*before.overrides, *overrides),
        texts=before.texts,
    )
    after = _as_low(before, after, overrides)
    if run.complete_checkpoints() and not run.adapter.is_dir():
        _refuse(run, before, after)
    attempt = state.attempt if state else 1
    write_text(run.folder / f"plan-attempt{attempt}.json", run.plan.read_text(encoding="utf-8"))
    after.save(run)


def _changed(before: Plan, overrides: Sequence[str]) -> Recipe:
    """The run's recipe with the overrides; a strategy that auto has chosen stays, if its checkpoints need it."""
    values = json.loads(before.recipe.model_dump_json(exclude_unset=True))
    document = Document(name=f"{before.name}/recipe.yaml", values=values)
    if before.strategy in SHARDED and not any(text.startswith("distributed.strategy=") for text in overrides):
        yamlfile.override(document, f"distributed.strategy={before.strategy}")
    for text in overrides:
        yamlfile.override(document, text)
    return yamlfile.parse(Recipe, document)


def _as_low(before: Plan, after: Plan, overrides: Sequence[str]) -> Plan:
    """No more memory than what was left of a plan for such GPUs after they had run out of it; the user may know better."""
    asked = any(text.startswith(("train.micro_batch=", "train.gradient_checkpointing=")) for text in overrides)
    if asked or after.gpu != before.gpu or not before.ran_out:
        return after
    while after.micro_batch > before.micro_batch or before.gradient_checkpointing > after.gradient_checkpointing:
        found = lowered(after, "train")
        if found is None:
            break
        after, _ = found
    return after.model_copy(update={"ran_out": True})  # for the next time


def _refuse(run: Run, before: Plan, after: Plan) -> None:
    """Checkpoints hold the state of the optimizer as the strategy has divided it."""
    whole = before.strategy not in SHARDED
    if whole == (after.strategy not in SHARDED) and (whole or before.strategy == after.strategy):
        if before.strategy not in BY_DEEPSPEED or before.processes == after.processes:
            return
        raise RunError(
            f"{run.name} has checkpoints of DeepSpeed by {before.processes} processes, which {after.processes} cannot "
            f"read; resume with as many, or launch anew with strategy fsdp, whose checkpoints any number can read"
        )
    raise RunError(
        f"{run.name} has checkpoints of strategy {before.strategy}, which {after.strategy} cannot read; resume with "
        f"distributed.strategy={before.strategy}, or launch anew"
    )


def suit_gpus(run: Run) -> None:
    """Evaluate with the GPUs that are there; raise RunError where training was planned for more, with what to type."""
    if run.adapter.is_dir():
        fit_evaluation(run)
        return
    plan = Plan.of(run)
    if plan.device != "cuda" or plan.nodes > 1:
        return
    there = len(machine.here().gpus)
    if there < plan.processes:
        raise RunError(
            f"{run.name} was planned for {plan.processes} GPU(s), and {there} can be seen here; "
            f"`finllm resume {called(run)} resources.gpus={there}` goes on with that"
        )


def fit_evaluation(run: Run) -> None:
    """Let as many processes evaluate as there are GPUs here, where the run was planned for more."""
    plan = Plan.of(run)
    there = len(machine.here().gpus) if plan.device == "cuda" else plan.evaluators
    if 0 < there < plan.evaluators:
        plan.evaluated_by(there, run).save(run)
