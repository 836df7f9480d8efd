"""`--sweep key=a,b`: from values to cells, each a run of its own."""

import itertools
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from finllm.errors import RecipeError
from finllm.recipe import load
from finllm.run import create
from finllm.sweeps import Cell, Sweep
from launch import planning, shipped
from launch.cluster import Cluster

LONGEST_NAME = 100


def described(recipe_name: str, overrides: Sequence[str], asked: Sequence[str], name: str | None, runs: Path) -> Sweep:
    """The sweep that `asked` (`key=a,b` each) stands for; raises RecipeError where a cell is no valid recipe."""
    path = shipped.find(recipe_name)
    axes = dict(_axis(text) for text in asked)
    if len(axes) < len(asked):
        raise RecipeError(f"--sweep names a key twice ({', '.join(asked)}); give all its values at once: key=a,b,c")
    name = name or f"{planning.default_name(path)}-sweep"
    cells: list[Cell] = []
    for values in itertools.product(*axes.values()):
        chosen = tuple(f"{key}={value}" for key, value in zip(axes, values, strict=True))
        load(path, (*overrides, *chosen))
        cells.append(Cell(_cell_name(name, axes, values, len(cells)), chosen))
    if len({cell.run for cell in cells}) < len(cells):
        cells = [replace(cell, run=f"{name}-{number}") for number, cell in enumerate(cells, 1)]
    return Sweep(runs.absolute() / name, str(path), tuple(axes), tuple(cells))


def prepare(sweep: Sweep, recipe_name: str, overrides: Sequence[str], cluster: Cluster | None) -> Sweep:
    """Make the folders of a sweep and of its cells; leaves nothing where one of them cannot be made."""
    runs = sweep.folder.parent
    made = [create(runs, sweep.folder.name).folder]
    sweep = replace(sweep, folder=made[0])
    try:
        cells = []
        for cell in sweep.cells:
            given = (*overrides, *cell.overrides, *_group(sweep, overrides))
            run = planning.prepare(recipe_name, given, cell.run, runs, cluster)
            made.append(run.folder)
            cells.append(replace(cell, run=run.name))
        sweep = replace(sweep, cells=tuple(cells))
        sweep.save()
    except BaseException:
        for folder in made:
            shutil.rmtree(folder)
        raise
    return sweep


def _group(sweep: Sweep, overrides: Sequence[str]) -> list[str]:
    """W&B shows the cells together, unless the user has a group of their own."""
    given = load(Path(sweep.source), tuple(overrides)).tracking.group
    return [] if given else [f"tracking.group={sweep.name}"]


def _axis(text: str) -> tuple[str, list[str]]:
    """`key=a,b` as key and values; commas in brackets belong to a value."""
    key, equals, rest = text.partition("=")
    values = [value.strip() for value in re.split(r",(?![^\[\]{}]*[\]}])", rest)]
    if not equals or not key or not all(values):
        raise RecipeError(f"--sweep {text}: write key=a,b,c, such as train.learning_rate=1e-4,2e-4")
    if len(set(values)) < len(values):
        raise RecipeError(f"--sweep {text}: has a value twice; every cell is to differ")
    return key, values


def _cell_name(name: str, keys: Sequence[str] | dict[str, list[str]], values: Sequence[str], number: int) -> str:
    parts = [
        key.rpartition(".")[2] + re.sub(r"[^A-Za-z0-9._-]+", "", value) for key, value in zip(keys, values, strict=True)
    ]
    whole = "-".join([name, *parts])
    return whole if len(whole) <= LONGEST_NAME else f"{name}-{number + 1}"
