"""The headline figures: settings chosen on validation, then three seeds on the test part, as rows of JSON.

    python benchmarks/headline.py --models smollm2-135m --at-once 4          # one GPU; writes results/headline.json
    python benchmarks/headline.py --models smollm2-135m /path/gemma-3-270m --at-once 4
    python benchmarks/results_table.py                                       # README's table from it

First every candidate is trained with one seed and scored on validation alone; its test part is not looked at. The
settings with the highest macro-F1, the mean over the validation parts of the data that it is trained on, are then trained with each seed and
scored on the test part, beside the base, TF-IDF and FinBERT where it can be had. What is done is kept in --runs, so that
the command can be given again.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from finllm import calibration, metrics, seeds
from finllm.assessment import gold_of, groups, predicted_of, probabilities_of, rows_of
from finllm.plan import Plan
from finllm.predictions import Answers, Prediction, of_run
from finllm.run import Run
from finllm.scores import Scores

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "headline.json"
DATA = {
    "phrasebank": "[phrasebank]",
    "all": "[phrasebank, {name: fiqa, alias: fiqa-text}, {name: fiqa, target: true}, tfns]",
}
"""What a model is trained and scored on; `all` has FiQA both without and with its target."""
GRID = {"train.learning_rate": ("3e-4", "4.5e-4", "6e-4"), "lora.rank": ("16", "64")}
SEEDS = ("42", "43", "44")
DRAWS, DRAW_SEED = 2000, 0


def candidates(model: str, data: str, grid: dict[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Every combination of the grid, as overrides of the recipe; alpha is twice the rank."""
    made = []
    for values in itertools.product(*grid.values()):
        overrides = [
            f"model.name={model}",
            f"data={DATA[data]}",
            *(f"{key}={value}" for key, value in zip(grid, values, strict=True)),
        ]
        rank = next((value for key, value in zip(grid, values, strict=True) if key == "lora.rank"), None)
        made.append((*overrides, *([f"lora.alpha={2 * int(rank)}"] if rank else [])))
    return made


def done(recipe: str, overrides: Sequence[str], folder: Path) -> Run | None:
    """The run of these settings, trained and evaluated unless it is there; None where it failed, with a word why."""
    environment = {**os.environ, "FINLLM_RUNS": str(folder), "OMP_NUM_THREADS": "2"}
    name = Path(recipe).stem
    run = Run(folder / name)
    if run.scores.is_file():
        return run
    overridden = [*overrides, "tracking.wandb=disabled"]
    train = [recipe, *overridden] if not run.plan.is_file() else [str(run.folder)]
    stages = [("finllm.train", train)] if not run.adapter.is_dir() else []
    for stage, arguments in (*stages, ("finllm.evaluate", [str(run.folder)])):
        command = [sys.executable, "-m", stage, *arguments]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            print(json.dumps({"failed": overridden, "said": (answer.stdout + answer.stderr)[-1500:]}), flush=True)
            return None
    return run


def named(overrides: Sequence[str]) -> str:
    """A folder's name for settings."""
    return re.sub(r"[^\w-]+", "-", "_".join(o for o in overrides if not o.startswith("data=")))


def validation(run: Run) -> dict[str, float]:
    """Macro-F1, accuracy and NLL of a run's own system on validation, means over its data sets."""
    answers = of_run(run)
    found = []
    for dataset in sorted({p.dataset for p in answers.predictions}):
        rows = rows_of([answers], dataset, "validation")[answers.key]
        gold, predicted = gold_of(rows), predicted_of(rows)
        nll = float(calibration.nll(probabilities_of(rows), gold).mean())
        found.append((metrics.macro_f1(gold, predicted), metrics.accuracy(gold, predicted), nll))
    return dict(zip(("macro_f1", "accuracy", "nll"), np.mean(found, axis=0).tolist(), strict=True))


def choose(model: str, data: str, asked: argparse.Namespace) -> tuple[str, ...]:
    """The overrides of the candidate with the highest validation macro-F1; nothing of the test part is computed."""
    only = (
        "evaluation.parts=[validation]",
        "evaluation.base=false",
        "evaluation.baselines=[]",
        "evaluation.classifiers=[]",
    )
    cells = candidates(model, data, asked.grid)

    def one(cell: tuple[str, ...]) -> tuple[tuple[str, ...], Run | None]:
        wanted = (*cell, f"train.seed={SEEDS[0]}", *only)
        return cell, done(asked.recipe, wanted, asked.runs / "choose" / data / named(cell))

    ranked = []
    with ThreadPoolExecutor(asked.at_once) as pool:
        for cell, run in pool.map(one, cells):
            if run is not None:
                said = validation(run)
                print(json.dumps({"candidate": cell, "validation": said}), flush=True)
                ranked.append((said["macro_f1"], -said["nll"], cell))
    if not ranked:
        sys.exit(f"{model}, {data}: no candidate could be trained")
    best = max(ranked)[2]
    print(json.dumps({"chosen": best}), flush=True)
    return best


def measure(model: str, data: str, cell: tuple[str, ...], asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the chosen settings over the seeds, and of everything that they are compared with."""
    settings = tuple(f"train.seed={seed}" for seed in asked.seeds)

    def one(seed: str) -> Run | None:
        return done(asked.recipe, (*cell, seed), asked.runs / "measure" / data / named((*cell, seed)))

    with ThreadPoolExecutor(asked.at_once) as pool:
        runs = [run for run in pool.map(one, settings) if run is not None]
    if len(runs) < len(settings):
        sys.exit(f"{model}: {len(settings) - len(runs)} of {len(settings)} seeds failed; give the command again")
    plan, scores = Plan.of(runs[0]), Scores.of(runs[0])
    facts = {
        "model": model,
        "trained_on": data,
        "recipe": asked.recipe,
        "overrides": list(cell),
        "seeds": list(asked.seeds),
        "hardware": plan.gpu or plan.device,
        "versions": plan.versions,
        "commit": plan.commit,
        "date": datetime.now(UTC).date().isoformat(),
        "interval": f"95 %, {DRAWS} draws of twin groups and seeds",
    }
    rows = []
    own = [of_run(run) for run in runs]
    for part in scores.parts:
        for system in scores.systems:
            each = own if system.key == own[0].key else [of_run(runs[0], system.key)]
            rows += [{**facts, **row, "system": system.key, "name": system.name, "marks": list(system.marks),
                      "ms_one_text": system.latency_ms, "texts_per_s": round(system.texts_per_second, 1)}
                     for row in of_part(each, part.dataset)]  # fmt: skip
        rows += [
            {**facts, "dataset": part.dataset, "system": m.key, "name": m.name, "missing": m.why}
            for m in scores.missing
        ]
    return rows


def of_part(answers: Sequence[Answers], dataset: str) -> list[dict[str, Any]]:
    """One row for all texts of a data set's test part, for each band of agreement, and for what FinBERT has not seen."""
    keyed = [Answers(str(n), one.name, one.seconds, one.predictions) for n, one in enumerate(answers)]
    rows = list(rows_of(keyed, dataset, "test").values())
    kinds: dict[str, list[int]] = {"all": list(range(len(rows[0])))}
    for i, p in enumerate(rows[0]):
        if p.agreement is not None:
            kinds.setdefault(f"band {p.agreement}", []).append(i)
            if "prosus" not in (p.seen_by or ()):
                kinds.setdefault("not seen by ProsusAI/finbert", []).append(i)
    return [row(dataset, kind, [[one[i] for i in chosen] for one in rows]) for kind, chosen in kinds.items()]


def row(dataset: str, kind: str, each: Sequence[Sequence[Prediction]]) -> dict[str, Any]:
    """Figures in per cent: mean, sample standard deviation over seeds, and the interval's ends."""
    found = seeds.over_seeds(gold_of(each[0]), [predicted_of(one) for one in each], groups(each[0]), DRAWS, DRAW_SEED)
    figures = {
        name: {"mean": of.mean.value, "deviation": of.deviation, "low": of.mean.low, "high": of.mean.high}
        for name, of in found.items()
    }
    rounded = {name: {what: round(100 * value, 2) for what, value in of.items()} for name, of in figures.items()}
    nll = [float(calibration.nll(probabilities_of(one), gold_of(one)).mean()) for one in each]
    ece = [calibration.ece(probabilities_of(one), gold_of(one)) for one in each]
    return {
        "dataset": dataset,
        "texts": kind,
        "n": len(each[0]),
        "runs": len(each),
        **rounded,
        "nll": round(float(np.mean(nll)), 4),
        "ece": round(100 * float(np.mean(ece)), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], help="names, hub ids or folders")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="what to train and score on")
    parser.add_argument("--recipe", default=str(ROOT / "recipes" / "sft" / "smollm2-135m-phrasebank.yaml"))
    parser.add_argument("--grid", type=json.loads, default=GRID, help='JSON: {"train.learning_rate": ["3e-4"], ...}')
    parser.add_argument("--seeds", nargs="+", default=list(SEEDS))
    parser.add_argument("--at-once", type=int, default=1, help="runs that share the machine")
    parser.add_argument("--runs", type=Path, default=Path("runs/headline"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    before = json.loads(asked.output.read_text()) if asked.output.is_file() else []
    for model, data in itertools.product(asked.models, asked.data):
        made = measure(model, data, choose(model, data, asked), asked)
        before = [row for row in before if (row["model"], row["trained_on"]) != (model, data)] + made
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        asked.output.write_text(json.dumps(before, indent=1) + "\n")
        for one in made:
            print(json.dumps(one), flush=True)


if __name__ == "__main__":
    main()
