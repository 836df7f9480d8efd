"""Does DPO help? SmolLM2-135M on PhraseBank, split_s42: SFT, SFT + cross-entropy on confused rows, SFT + DPO on them.

    python benchmarks/dpo_phrasebank.py --runs /tmp/dpo --at-once 6 > benchmarks/results/dpo_phrasebank.jsonl

For each seed: SFT on the training part, five folds of it (for pairs from models that had not seen the row), then each
way of going on at each learning rate: one epoch over the same pairs, in the same order. The learning rate of each way
is the one of the best mean validation accuracy; the test part is scored for those alone. A line of JSON for each run,
for each system and slice (mean over seeds), and for each comparison (paired, 95 % intervals over groups of near twins).
Runs share the GPU, so speeds mean nothing here. `--tiny` does the same with a random model of two layers, on a CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from h200_dpo import make_tiny
from sweep import best_validation

from finllm import calibration, embedded, metrics, predictions
from finllm.data.sample import Sample
from finllm.example import LABELS
from finllm.plan import Plan
from finllm.predictions import Prediction
from finllm.run import Run
from finllm.sweeps import Cell, Sweep

ROOT = Path(__file__).parent.parent
DRAWS = 2000
MODEL = """\
model: {model}
data: [phrasebank, {{name: sample, kind: mixed, parts: [test]}}]
evaluation: {{base: false, baselines: [], parts: [validation, test]}}
tracking: {{wandb: disabled}}
"""
SFT = "extends: {root}/recipes/base/small.yaml\n" + MODEL
GO_ON = """\
extends: [{root}/recipes/base/small.yaml, {root}/recipes/base/dpo.yaml]
train:
  init: {init}
  pairs: [{pairs}]
"""
FOLDS = '{{name: folds, sweep: {sweep}, bands: ["100", "75-99", "66-75"]}}'
MIXED = "{{name: file, path: {file}}}"
WAYS: dict[str, tuple[str, ...]] = {
    "cross-entropy": ("train.loss=sft", "train.sft_weight=0"),
    "DPO": ("train.sft_weight=0",),
    "DPO and cross-entropy": (),
    "the same, smoothed by agreement": ("train.band_smoothing={'66-75': 0.3, '75-99': 0.1}",),
}
"""Ways of going on from SFT."""
PAIRS = {"": FOLDS, " with mixed signals": f"{FOLDS}, {MIXED}"}
"""What they go over: confused rows of PhraseBank, perhaps with the sample's mixed-signal training rows beside."""
AGAINST = [("DPO", "cross-entropy"), ("DPO and cross-entropy", "cross-entropy"),
           ("the same, smoothed by agreement", "cross-entropy")]  # fmt: skip
SLICES: dict[str, Callable[[Prediction], bool]] = {
    "50Agree": lambda p: p.dataset == "phrasebank",
    "band 100": lambda p: p.agreement == "100",
    "band 75-99": lambda p: p.agreement == "75-99",
    "band 66-75": lambda p: p.agreement == "66-75",
    "band 50-66": lambda p: p.agreement == "50-66",
    "mixed signals": lambda p: p.dataset == "sample",
}


@dataclass(frozen=True)
class Job:
    """One run of the command."""

    system: str
    seed: int
    recipe: Path
    overrides: tuple[str, ...]
    runs: Path
    """Its folder holds the run, which is named as the recipe."""

    @property
    def run(self) -> Run:
        """Where the run is."""
        return Run(self.runs / self.recipe.stem)


def command(module: str, *arguments: str, runs: Path) -> str:
    """Run a module of finllm; returns what it said where it failed, else nothing."""
    environment = {**os.environ, "FINLLM_RUNS": str(runs), "OMP_NUM_THREADS": "2"}
    asked = [sys.executable, "-m", f"finllm.{module}", *arguments]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-3000:]


def train(job: Job) -> dict[str, Any]:
    """Train, and tell what validation says of the checkpoint that was kept."""
    began = time.monotonic()
    failed = command("train", str(job.recipe), *job.overrides, runs=job.runs)
    row: dict[str, Any] = {
        "run": str(job.run.folder),
        "system": job.system,
        "seed": job.seed,
        "overrides": job.overrides,
    }
    row["seconds"] = round(time.monotonic() - began, 1)
    if failed:
        return {**row, "failed": failed}
    plan = Plan.of(job.run)
    assert plan.rows is not None, job
    return {**row, "rows": plan.rows.train, "steps": plan.steps, "validation": best_validation(job.run.folder)}


def evaluate(run: Run) -> str:
    """Score a run; what went wrong, or nothing."""
    return command("evaluate", str(run.folder), runs=run.folder.parent)


def mixed_pairs(folder: Path) -> Path:
    """The sample's mixed-signal training rows, right answer over careless answer."""
    rows = [row for row in Sample(name="sample", kind="mixed").read() if row.split == "train"]
    pairs = ({"prompt": row.text, "chosen": row.label, "rejected": row.careless} for row in rows)
    path = folder / "mixed.jsonl"
    path.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    return path


def supervised(model: str, seed: int, folds: int, runs: Path, short: tuple[str, ...]) -> list[Job]:
    """SFT on the whole training part, and on all but each fold of it."""
    recipe = runs / "sft.yaml"
    recipe.write_text(SFT.format(root=ROOT, model=model), encoding="utf-8")
    given = (f"train.seed={seed}", *short)
    jobs = [Job("SFT", seed, recipe, given, runs / f"sft-{seed}")]
    for fold in range(1, folds + 1):
        asked = (*given, f"data.0.fold={fold}/{folds}")
        jobs.append(Job("fold", seed, recipe, asked, runs / f"folds-{seed}" / str(fold)))
    return jobs


def sweep_of(jobs: Sequence[Job], runs: Path) -> Path:
    """The folds of one seed as a sweep; its runs stand beside it."""
    seed = jobs[0].seed
    folder = runs / f"folds-{seed}"
    cells = []
    for job in jobs:
        beside = folder / f"fold-{job.runs.name}"
        if not beside.exists():
            beside.symlink_to(job.run.folder, target_is_directory=True)
        cells.append(Cell(beside.name, job.overrides[-1:]))
    Sweep(folder / "sweep", str(jobs[0].recipe), ("data.0.fold",), tuple(cells)).save()
    return folder / "sweep"


def going_on(model: str, seed: int, sweep: Path, rates: Sequence[str], runs: Path, short: tuple[str, ...]) -> list[Job]:
    """Each way, over each set of pairs, at each learning rate."""
    jobs = []
    for number, (kind, pairs) in enumerate(PAIRS.items()):
        recipe = runs / f"go-on-{seed}-{number}.yaml"
        listed = pairs.format(sweep=sweep, file=runs / "mixed.jsonl")
        text = GO_ON.format(root=ROOT, init=runs / f"sft-{seed}" / "sft", pairs=listed) + MODEL.format(model=model)
        recipe.write_text(text, encoding="utf-8")
        for way, changes in WAYS.items():
            for rate in rates:
                given = (f"train.seed={seed}", f"train.learning_rate={rate}", *changes, *short)
                jobs.append(
                    Job(way + kind, seed, recipe, given, runs / f"{way}-{number}-{seed}-{rate}".replace(" ", "-"))
                )
    return jobs


def chosen(rows: Sequence[dict[str, Any]], jobs: Sequence[Job]) -> dict[str, list[Run]]:
    """The runs of each system at the learning rate that validation prefers, in the order of seeds."""
    cells: dict[tuple[str, str], list[tuple[float, float, Run]]] = {}
    for row, job in zip(rows, jobs, strict=True):
        if "validation" in row:
            rate = next((o for o in job.overrides if o.startswith("train.learning_rate")), "")
            said = row["validation"]
            figures_ = (said["validation/accuracy"], -said["validation/loss"], job.run)
            cells.setdefault((job.system, rate), []).append(figures_)
    best: dict[str, tuple[tuple[float, float], list[Run]]] = {}
    for (system, rate), found in cells.items():
        mean = (statistics.fmean(f[0] for f in found), statistics.fmean(f[1] for f in found))
        say(kind="validation", system=system, rate=rate, seeds=len(found), accuracy=mean[0], nll=-mean[1])
        if system not in best or mean > best[system][0]:
            best[system] = (mean, [run for *_, run in found])
    return {system: runs for system, (_, runs) in best.items()}


def answers(run: Run) -> list[Prediction]:
    """All test answers of a run."""
    paths = sorted(run.predictions.glob("*.test.tuned.jsonl"))
    return [prediction for path in paths for prediction in predictions.read(path)]


def figures(rows: Sequence[Prediction]) -> dict[str, float]:
    """What is reported of one run on one slice."""
    gold = np.array([LABELS.index(p.gold) for p in rows])
    shares = np.array([p.probabilities for p in rows])
    predicted = np.array([LABELS.index(p.predicted) for p in rows])
    return {
        "accuracy": metrics.accuracy(gold, predicted),
        "macro_f1": metrics.macro_f1(gold, predicted),
        "nll": float(calibration.nll(shares, gold).mean()),
        "ece": calibration.ece(shares, gold),
    }


def differences(one: Sequence[Sequence[Prediction]], other: Sequence[Sequence[Prediction]]) -> dict[str, Any]:
    """One system less the other, seeds averaged for each row, with intervals over groups of near twins."""
    groups = [p.group or p.id for p in one[0]]

    def each(system: Sequence[Sequence[Prediction]]) -> Any:
        right = np.mean([[p.gold == p.predicted for p in run] for run in system], axis=0)
        lost = [-np.log(max(p.probabilities[LABELS.index(p.gold)], 1e-12)) for run in system for p in run]
        return np.stack([right, np.mean(np.reshape(lost, (len(system), -1)), axis=0)], axis=1)

    apart = each(one) - each(other)
    counted = np.concatenate([apart, np.ones((len(apart), 1))], axis=1)
    drawn = metrics.sums(counted, groups, DRAWS, 0)
    told: dict[str, Any] = {"n": len(apart)}
    for column, name in enumerate(("accuracy", "nll")):
        told[name] = float(apart[:, column].mean())
        told[f"{name}_interval"] = metrics.interval_of(drawn[:, column] / drawn[:, 2])
    for seed, (a, b) in enumerate(zip(one, other, strict=True)):
        told.setdefault("macro_f1_by_seed", []).append(figures(a)["macro_f1"] - figures(b)["macro_f1"])
        told.setdefault("accuracy_by_seed", []).append(figures(a)["accuracy"] - figures(b)["accuracy"])
        assert [p.id for p in a] == [p.id for p in b], seed
    return told


def report(systems: dict[str, list[Run]]) -> None:
    """Means over seeds for each slice, then each system against SFT and against cross-entropy on the same rows."""
    found = {system: [answers(run) for run in runs] for system, runs in systems.items()}
    for name, wanted in SLICES.items():
        cut = {system: [[p for p in run if wanted(p)] for run in runs] for system, runs in found.items()}
        for system, runs in cut.items():
            each = [figures(run) for run in runs]
            spread = {key: statistics.stdev(f[key] for f in each) if len(each) > 1 else 0.0 for key in each[0]}
            mean = {key: statistics.fmean(f[key] for f in each) for key in each[0]}
            say(kind="test", slice=name, system=system, n=len(runs[0]), seeds=len(runs), mean=mean, deviation=spread)
        pairs = [(system, "SFT") for system in cut if system != "SFT"]
        pairs += [(one + kind, other + kind) for kind in PAIRS for one, other in AGAINST]
        for one, other in pairs:
            if one in cut and other in cut and len(cut[one]) == len(cut[other]):
                say(kind="difference", slice=name, system=one, less=other, **differences(cut[one], cut[other]))


def say(**facts: Any) -> None:
    """One line of JSON, its figures to five places."""
    print(json.dumps(_rounded(facts)), flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/dpo-experiment"), help="an empty folder")
    parser.add_argument("--at-once", type=int, default=1, help="runs that share the GPU")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--rates", nargs="+", default=["5e-6", "2e-5", "1e-4"])
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="does all of this run?")
    asked = parser.parse_args()
    runs = asked.runs.absolute()
    runs.mkdir(parents=True, exist_ok=True)
    model = "smollm2-135m"
    short: tuple[str, ...] = ()
    if asked.tiny:
        make_tiny(runs / "model", embedded.folder())
        model, short = str(runs / "model"), ("train.max_steps=2", "data.0.train_rows=200")
        for way in list(WAYS)[2:]:
            del WAYS[way]
    mixed_pairs(runs)
    with ThreadPoolExecutor(asked.at_once) as pool:

        def all_of(jobs: Sequence[Job]) -> list[dict[str, Any]]:
            rows = []
            for row in pool.map(train, jobs):
                say(kind="run", **row)
                rows.append(row)
            return rows

        first = [job for seed in asked.seeds for job in supervised(model, seed, asked.folds, runs, short)]
        rows = all_of(first)
        folds = [job for job in first if job.system == "fold"]
        for job, failed in zip(folds, pool.map(evaluate, [job.run for job in folds]), strict=True):
            if failed:
                raise SystemExit(f"{job}: {failed}")
        later = []
        for seed in asked.seeds:
            sweep = sweep_of([job for job in folds if job.seed == seed], runs)
            later += going_on(model, seed, sweep, asked.rates, runs, short)
        rows += all_of(later)
        known = [(row, job) for row, job in zip(rows, [*first, *later], strict=True) if job.system != "fold"]
        systems = chosen([row for row, _ in known], [job for _, job in known])
        wanted = [run for runs_ in systems.values() for run in runs_]
        for run, failed in zip(wanted, pool.map(evaluate, wanted), strict=True):
            if failed:
                raise SystemExit(f"{run}: {failed}")
    report(systems)


if __name__ == "__main__":
    main()
