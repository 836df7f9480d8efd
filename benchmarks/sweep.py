"""Train every cell of a grid, several at a time on one GPU, and print what validation says of each, best first.

    python benchmarks/sweep.py sft/smollm2-135m-phrasebank train.learning_rate=2e-4,5e-4 train.seed=42,43 --at-once 6

Each cell is `python -m finllm.train RECIPE key=value ...`; with --test the cells are evaluated on the test part too
(once per reported system). One JSON object a line: overrides, best validation figures, seconds, run folder.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def cells(axes: list[str]) -> list[tuple[str, ...]]:
    """Every combination of `key=a,b,c` axes, as overrides."""
    keys = [axis.split("=", 1) for axis in axes]
    return [
        tuple(f"{key}={value}" for (key, _), value in zip(keys, values, strict=True))
        for values in itertools.product(*(values.split(",") for _, values in keys))
    ]


def train(recipe: Path, overrides: tuple[str, ...], runs: Path, test: bool) -> dict[str, Any]:
    """Train (and evaluate) one cell in its own folder of runs; returns its row."""
    folder = runs / "_".join(o.replace(".", "-").replace("=", "_") for o in overrides)
    environment = {**os.environ, "FINLLM_RUNS": str(folder), "OMP_NUM_THREADS": "2"}
    began = time.monotonic()
    command = [sys.executable, "-m", "finllm.train", str(recipe), *overrides]
    trained = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    row: dict[str, Any] = {"overrides": overrides, "seconds": round(time.monotonic() - began, 1)}
    run = folder / recipe.stem
    if trained.returncode != 0:
        return {**row, "failed": (trained.stdout + trained.stderr)[-1500:]}
    row |= {"validation": best_validation(run), "run": str(run)}
    if test:
        answer = subprocess.run(
            [sys.executable, "-m", "finllm.evaluate", str(run)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        row["evaluated"] = answer.returncode == 0 or (answer.stdout + answer.stderr)[-1500:]
    return row


def best_validation(run: Path) -> dict[str, float]:
    """The validation figures of the checkpoint that was kept: the one with the lowest loss."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    points = [line for line in lines if "validation/loss" in line]
    best = min(points, key=lambda line: float(line["validation/loss"]))
    return {key: value for key, value in best.items() if key.startswith("validation/") or key == "step"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe's path, or its name below recipes/")
    parser.add_argument("axes", nargs="*", metavar="key=a,b,c")
    parser.add_argument("--at-once", type=int, default=1, help="runs that share the GPU (speed is then not measured)")
    parser.add_argument("--runs", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--test", action="store_true", help="evaluate on the test part too")
    asked = parser.parse_args()
    recipe = Path(asked.recipe) if Path(asked.recipe).is_file() else ROOT / "recipes" / f"{asked.recipe}.yaml"
    rows = []
    with ThreadPoolExecutor(asked.at_once) as pool:
        for row in pool.map(lambda cell: train(recipe, cell, asked.runs, asked.test), cells(asked.axes)):
            print(json.dumps(row), flush=True)
            rows.append(row)
    ranked = sorted((r for r in rows if "validation" in r), key=lambda r: float(r["validation"]["validation/loss"]))
    for row in ranked:
        figures = {k.removeprefix("validation/"): round(v, 4) for k, v in row["validation"].items()}
        print(" ".join(row["overrides"]), figures, row["seconds"], flush=True)


if __name__ == "__main__":
    main()
