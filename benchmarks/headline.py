"""The headline figures: settings chosen on validation, then three seeds on the test part, as rows of JSON.

    python benchmarks/headline.py --models smollm2-135m --at-once 4          # one GPU; writes results/headline.json
    python benchmarks/headline.py --models smollm2-135m /path/gemma-3-270m --at-once 4
    python benchmarks/results_table.py                                       # README's table from it

First every candidate is trained with one seed and scored on validation alone; its test part is not looked at. The
settings with the highest macro-F1, the mean over the validation parts of the data that it is trained on, are then
trained with each seed and scored on the test part, beside the base, TF-IDF and FinBERT where it can be had. What is done
is kept in --runs and goes on when the command is given again; rows are written as soon as a model and its data are done.
A GGUF file becomes a model's folder by benchmarks/from_gguf.py.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from conditions import write
from running import Job, Workers

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
NO_OTHERS = ("evaluation.base=false", "evaluation.baselines=[]", "evaluation.classifiers=[]")
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


def choose(model: str, data: str, asked: argparse.Namespace, workers: Workers) -> tuple[str, ...] | None:
    """The overrides of the candidate with the highest validation macro-F1; nothing of the test part is computed.

    None where a candidate is not done: the best of some is not the best of all.
    """
    cells = candidates(model, data, asked.grid)
    folder = asked.runs / "choose" / data
    alone = ("evaluation.parts=[validation]", *NO_OTHERS)
    jobs = [
        Job(
            "candidate",
            Path(asked.recipe),
            (*cell, f"train.seed={SEEDS[0]}", *alone, *asked.also),
            folder / named(cell),
        )
        for cell in cells
    ]
    ranked = []
    for cell, found in zip(cells, workers.all(jobs), strict=True):
        if found.failed:
            say(failed=[*cell], said=found.failed)
            continue
        said = validation(found.job.run)
        say(candidate=cell, seconds=found.seconds, validation=said)
        ranked.append((said["macro_f1"], -said["nll"], cell))
    if len(ranked) < len(cells):
        return None
    best = max(ranked)[2]
    say(chosen=best)
    return best


def measure(
    model: str, data: str, cell: tuple[str, ...], asked: argparse.Namespace, workers: Workers
) -> list[dict[str, Any]]:
    """Rows of the chosen settings over the seeds that are done, and of everything that they are compared with."""
    jobs = []
    for number, seed in enumerate(f"train.seed={seed}" for seed in asked.seeds):
        others = () if number == 0 else NO_OTHERS  # the base and the baselines know no seed
        folder = asked.runs / "measure" / data / named((*cell, seed))
        jobs.append(Job("measured", Path(asked.recipe), (*cell, seed, *others, *asked.also), folder))
    ended = workers.all(jobs)
    for one in ended:
        if one.failed:
            say(failed=[*one.job.overrides], said=one.failed)
    if ended[0].failed:
        return []
    runs = [one.job.run for one in ended if not one.failed]
    seeds_done = [seed for seed, one in zip(asked.seeds, ended, strict=True) if not one.failed]
    return rows_of_runs(runs, facts(model, data, cell, seeds_done, asked, Plan.of(runs[0])))


def facts(
    model: str, data: str, cell: tuple[str, ...], seeds_done: list[str], asked: argparse.Namespace, plan: Plan
) -> dict[str, Any]:
    """What all rows of one model and its data say."""
    return {
        "model": shown(model),
        "trained_on": data,
        "recipe": str(Path(asked.recipe).absolute().relative_to(ROOT))
        if Path(asked.recipe).absolute().is_relative_to(ROOT)
        else asked.recipe,
        "overrides": list(cell),
        "candidates": len(candidates(model, data, asked.grid)),
        "seeds": seeds_done,
        "hardware": plan.gpu or plan.device,
        "versions": plan.versions,
        "commit": plan.commit,
        "date": datetime.now(UTC).date().isoformat(),
        "interval": f"95 %, {DRAWS} draws of twin groups and seeds",
    }


def rows_of_runs(runs: Sequence[Run], common: dict[str, Any]) -> list[dict[str, Any]]:
    """Every system of the first run, and the tuned one over all, on every part of the test data."""
    scores, rows = Scores.of(runs[0]), []
    own = [of_run(run) for run in runs]
    for part in scores.parts:
        for system in scores.systems:
            each = own if system.key == own[0].key else [of_run(runs[0], system.key)]
            name = system.name.replace(Plan.of(runs[0]).recipe.model.name, common["model"])
            rows += [{**common, **row, "system": system.key, "name": name, "marks": list(system.marks),
                      "ms_one_text": system.latency_ms, "texts_per_s": round(system.texts_per_second, 1)}
                     for row in of_part(each, part.dataset)]  # fmt: skip
        rows += [
            {**common, "dataset": part.dataset, "system": m.key, "name": m.name, "missing": m.why}
            for m in scores.missing
        ]
    return rows


def shown(model: str) -> str:
    """A model's name, or that of its folder."""
    return Path(model).name if Path(model).is_dir() else model


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


def say(**facts_: Any) -> None:
    """One line of JSON."""
    print(json.dumps(facts_), flush=True)


class Output:
    """The file of rows: those of a model and its data take the place of older ones at once."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()

    def put(self, made: Sequence[dict[str, Any]]) -> None:
        """Write rows of one model and its data."""
        with self._lock:
            before = json.loads(self._path.read_text()) if self._path.is_file() else []
            key = {(row["model"], row["trained_on"]) for row in made}
            kept = [row for row in before if (row["model"], row["trained_on"]) not in key]
            write(self._path, [*kept, *made])


def study(model: str, data: str, asked: argparse.Namespace, workers: Workers, output: Output) -> bool:
    """Choose, then measure, one model on one kind of data; whether all of it is done."""
    cell = choose(model, data, asked, workers)
    if cell is None:
        return False
    made = measure(model, data, cell, asked, workers)
    output.put(made)
    for one in made:
        say(**one)
    return bool(made) and made[0]["seeds"] == list(asked.seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], help="names, hub ids or folders")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="what to train and score on")
    parser.add_argument("--recipe", default=str(ROOT / "recipes" / "sft" / "smollm2-135m-phrasebank.yaml"))
    parser.add_argument("--grid", type=json.loads, default=GRID, help='JSON: {"train.learning_rate": ["3e-4"], ...}')
    parser.add_argument("--seeds", nargs="+", default=list(SEEDS))
    parser.add_argument("--at-once", type=int, default=1, help="runs that share the machine")
    parser.add_argument("--minutes", type=float, help="end before so many; what is done is kept, the rest goes on")
    parser.add_argument("--also", nargs="*", default=[], metavar="key=value", help="for every run, such as max_steps")
    parser.add_argument("--runs", type=Path, default=Path("runs/headline"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    asked.runs = asked.runs.absolute()
    workers, output = Workers(asked.at_once, asked.minutes), Output(asked.output)
    studies = list(itertools.product(asked.models, asked.data))
    with ThreadPoolExecutor(len(studies)) as together:
        whole = list(together.map(lambda of: study(*of, asked, workers, output), studies))
    if not all(whole):
        sys.exit("not all is done; give the command again, with the same --runs")


if __name__ == "__main__":
    main()
