"""From a recipe's name to a plan: the deciding half of `finllm launch`, without torch."""

import os
import re
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finllm import data, machine
from finllm.data import DatasetSpec, Parts
from finllm.data.hub import Hub
from finllm.data.table import Table
from finllm.errors import DataError, RecipeError, RunError
from finllm.learnt import counted
from finllm.lengths import Lengths
from finllm.plan import Plan, Rows, decide
from finllm.recipe import Recipe, load
from finllm.run import Run, State, create
from launch import cluster as clusters
from launch import shipped
from launch.cluster import Cluster
from launch.place import Stage


def preview(
    recipe_name: str, overrides: tuple[str, ...], name: str | None, runs: Path, cluster: Cluster | None = None
) -> Plan:
    """The plan that a launch would have; makes nothing, downloads nothing."""
    path = shipped.find(recipe_name)
    recipe = load(path, overrides)
    rows, texts, why_not = _counted_at_hand(recipe)
    folder = _free(runs, name or default_name(path))
    plan = decide(
        recipe, rows=rows, folder=folder, source=str(path), overrides=overrides, texts=texts, **_where(cluster)
    )
    return plan if rows else plan.model_copy(update={"reasons": (*plan.reasons, f"rows not counted: {why_not}")})


def prepare(
    recipe_name: str, overrides: tuple[str, ...], name: str | None, runs: Path, cluster: Cluster | None = None
) -> Run:
    """A new run folder with a plan; raises FinllmError, and leaves nothing, where it cannot run here or on `cluster`."""
    path = shipped.find(recipe_name)
    recipe = load(path, overrides)
    if recipe.resources.gpu is not None:
        raise RecipeError(
            f"{path}: resources.gpu is {recipe.resources.gpu}: that is for plans only; take it out, or use --dry-run"
        )
    where, (rows, texts) = _where(cluster), counted(recipe, _parts(recipe))
    run = _create(runs, name or default_name(path))
    try:
        plan = decide(
            recipe, rows=rows, folder=run.folder, source=str(path), overrides=overrides, texts=texts, **where,
        )  # fmt: skip
        plan.save(run)
        stage: Stage = "train" if recipe.train else "evaluate"
        if cluster is None:
            State("created", stage=stage, host=socket.gethostname()).save(run)
        else:
            clusters.save(run, cluster)
            State("created", stage=stage, backend="slurm").save(run)
    except BaseException:
        shutil.rmtree(run.folder)
        raise
    return run


def _where(cluster: Cluster | None) -> dict[str, Any]:
    """What the plan must know of the place; GPUs of a cluster need not be seen from here."""
    if cluster is None:
        return {"here": machine.here()}
    return {
        "here": cluster.machine(),
        "nodes": cluster.nodes,
        "network_gbit": cluster.network_gbit,
        "python": cluster.interpreter,
    }


def default_name(recipe: Path) -> str:
    """The name of a run that was given none: that of its recipe."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", recipe.stem).lstrip("._-") or "run"


def _create(runs: Path, name: str) -> Run:
    try:
        return create(runs, name)
    except OSError as error:
        raise RunError(f"{runs.absolute()}: no run folder can be made here ({error}); give --runs FOLDER") from error


def _free(runs: Path, name: str) -> Path:
    """The folder that `create` would make."""
    numbered = (runs / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000))
    return next(folder for folder in numbered if not folder.exists()).absolute()


def _parts(recipe: Recipe) -> Parts:
    # Looking for near twins takes seconds, and changes the counts only where one set's rows give away another's.
    # The trainer does it in any case.
    if recipe.train is not None and len(recipe.data) > 1:
        return data.training_parts(recipe.data)[0]
    return data.read_parts(recipe.data)


def _counted_at_hand(recipe: Recipe) -> tuple[Rows | None, Lengths | None, str]:
    """Rows before near twins of other sets are left out; None, and why, where reading is not quick."""
    slow = [spec.title for spec in recipe.data if _is_slow(spec)]
    if slow:
        return None, None, f"{', '.join(slow)} would have to be fetched or split first; `finllm check` does it"
    os.environ["HF_HUB_OFFLINE"] = "1"  # a preview ends with its process
    try:
        return *counted(recipe, data.read_parts(recipe.data)), ""
    except (DataError, RunError) as error:
        return None, None, str(error)


def _is_slow(spec: DatasetSpec) -> bool:
    """Whether reading needs the network, or libraries that take seconds to load."""
    return isinstance(spec, Hub) or (isinstance(spec, Table) and (spec.split is None or spec.path.suffix == ".parquet"))


def checked(recipe_name: str, overrides: Sequence[str]) -> tuple[Path, Recipe, Parts, tuple[str, ...]]:
    """A recipe and its data, read in full, and what was left out; raises FinllmError for whatever is wrong with them."""
    path = shipped.find(recipe_name)
    recipe = load(path, list(overrides))
    if recipe.train is None:
        return path, recipe, data.read_parts(recipe.data), ()
    parts, notes = data.training_parts(recipe.data)
    return path, recipe, parts, notes
