"""Does DPO help? SmolLM2-135M on PhraseBank, split_s42: SFT, SFT + cross-entropy on confused rows, SFT + DPO on them.

    python benchmarks/dpo_phrasebank.py --runs /dev/shm/dpo --at-once 8 --minutes 9

For each seed: SFT on the training part, five folds of it (for pairs from models that had not seen the row), then each
way of going on at each learning rate: one epoch over the same pairs, in the same order. The learning rate of each way
is the one of the best mean validation accuracy; the test part is scored for those alone. benchmarks/results/
dpo_phrasebank.json has a row for each run, each setting on validation, each system and kind of text (mean over seeds),
and each comparison (paired, 95 % intervals over seeds and groups of near twins); it is written whenever something is
done. Runs share the GPU, so speeds mean nothing here. What is done is kept in --runs: the command can be given again.
`--tiny` does the same with a random model of two layers, on a CPU.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import dpo_figures
from conditions import conditions, make_tiny, results, write
from running import Done, Job, Workers
from sweep import best_validation

from finllm.data.sample import Sample
from finllm.plan import Plan
from finllm.run import Run
from finllm.sweeps import Cell, Sweep

ROOT = Path(__file__).parent.parent
MODEL = """\
model: {model}
data: [phrasebank, {{name: sample, kind: mixed, parts: [test]}}]
evaluation: {{base: false, baselines: [], classifiers: [], parts: [validation, test]}}
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
SMOOTHED = "train.band_smoothing={'66-75': 0.3, '75-99': 0.1}"
MIX = ", with mixed signals"
WAYS: dict[str, tuple[str, ...]] = {
    "cross-entropy": ("train.loss=sft", "train.sft_weight=0"),
    "DPO": ("train.sft_weight=0",),
    "DPO and cross-entropy": (),
    "DPO and cross-entropy, smoothed": (SMOOTHED,),
    f"cross-entropy{MIX}": ("train.loss=sft", "train.sft_weight=0"),
    f"DPO and cross-entropy{MIX}": (),
}
"""Ways of going on from SFT, over confused rows of PhraseBank; some with the sample's mixed-signal training rows beside."""
AGAINST = [
    *((way, "SFT") for way in WAYS),
    *((way, "cross-entropy") for way in WAYS if way.startswith("DPO") and not way.endswith(MIX)),
    (f"DPO and cross-entropy{MIX}", f"cross-entropy{MIX}"),
]


@dataclass
class Record:
    """The rows of the results, written whenever one is added."""

    path: Path | None
    common: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)
    rest: list[dict[str, Any]] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def ended(self, done: Done, seed: int) -> None:
        """A run is done, or is not."""
        job = done.job
        row = {"kind": "run", "system": job.name, "seed": seed, "overrides": job.overrides}
        if done.failed:
            row["failed"] = done.failed
        else:
            plan = Plan.of(job.run)
            assert plan.rows is not None, job
            row |= {"rows": plan.rows.train, "steps": plan.steps, "validation": best_validation(job.run.folder)}
        print(json.dumps({**row, "seconds": done.seconds}), flush=True)
        with self.lock:
            self.runs.append(_rounded(row))
            self._write()

    def found(self, rows: Iterable[dict[str, Any]]) -> None:
        """Validation and test as they stand now, in place of what was known before."""
        made = [_rounded(row) for row in rows]
        print(*map(json.dumps, made), sep="\n", flush=True)
        with self.lock:
            self.rest = made
            self._write()

    def _write(self) -> None:
        write(self.path, [{"kind": "conditions", **self.common}, *self.rest, *self.runs])


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
    jobs = [Job("SFT", recipe, given, runs / f"sft-{seed}")]
    for fold in range(1, folds + 1):
        asked = (*given, "evaluation.parts=[test]", f"data.0.fold={fold}/{folds}")
        jobs.append(Job("fold", recipe, asked, runs / f"folds-{seed}" / str(fold)))
    return jobs


def sweep_of(jobs: Sequence[Job], folder: Path) -> Path:
    """The folds of one seed as a sweep; its runs stand beside it."""
    cells = []
    for job in jobs:
        beside = folder / f"fold-{job.runs.name}"
        if not beside.exists():
            beside.symlink_to(job.run.folder, target_is_directory=True)
        cells.append(Cell(beside.name, job.overrides[-1:]))
    Sweep(folder / "sweep", str(jobs[0].recipe), ("data.0.fold",), tuple(cells)).save()
    return folder / "sweep"


def going_on(model: str, seed: int, rates: Sequence[str], runs: Path, short: tuple[str, ...]) -> list[Job]:
    """Each way at each learning rate; not evaluated yet."""
    jobs = []
    sources = FOLDS.format(sweep=runs / f"folds-{seed}" / "sweep")
    for way, changes in WAYS.items():
        pairs = f"{sources}, {MIXED.format(file=runs / 'mixed.jsonl')}" if way.endswith(MIX) else sources
        recipe = runs / f"go-on-{seed}{'-mixed' if way.endswith(MIX) else ''}.yaml"
        text = GO_ON.format(root=ROOT, init=runs / f"sft-{seed}" / "sft", pairs=pairs) + MODEL.format(model=model)
        recipe.write_text(text, encoding="utf-8")
        for rate in rates:
            given = (f"train.learning_rate={rate}", f"train.seed={seed}", *changes, *short)
            folder = runs / f"{way}-{seed}-{rate}".replace(" ", "-").replace(",", "")
            jobs.append(Job(way, recipe, given, folder, evaluated=False))
    return jobs


def chosen(jobs: dict[int, list[Job]]) -> tuple[list[dict[str, Any]], dict[str, dict[str, Job]]]:
    """What validation says of each setting, and the jobs of each system at the rate that it prefers, by seed.

    A system is left out until each of its rates has a run of the same seeds.
    """
    cells: dict[str, dict[str, dict[str, Job]]] = {}
    for seed, those in jobs.items():
        for job in (job for job in those if job.run.adapter.is_dir()):
            rate = next((o.split("=")[1] for o in job.overrides if o.startswith("train.learning_rate")), "")
            cells.setdefault(job.name, {}).setdefault(rate, {})[str(seed)] = job
    rows: list[dict[str, Any]] = []
    systems = {}
    for name, by_rate in cells.items():
        done = set.intersection(*(set(by_seed) for by_seed in by_rate.values()))
        rates = len(
            {o for those in jobs.values() for j in those if j.name == name for o in j.overrides if "rate=" in o}
        )
        if not done or len(by_rate) < rates:
            continue
        ranked = []
        for rate, by_seed in by_rate.items():
            said = [best_validation(by_seed[seed].run.folder) for seed in sorted(done)]
            accuracy = statistics.fmean(one["validation/accuracy"] for one in said)
            nll = statistics.fmean(one["validation/loss"] for one in said)
            rows.append({"kind": "validation", "system": name, "rate": rate, "seeds": sorted(done),
                         "accuracy": accuracy, "nll": nll})  # fmt: skip
            ranked.append((accuracy, -nll, rate))
        systems[name] = {seed: by_rate[max(ranked)[2]][seed] for seed in sorted(done)}
    return rows, systems


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def experiment(asked: argparse.Namespace, model: str, short: tuple[str, ...], record: Record) -> bool:
    """All of it, as far as time allows; whether everything is done."""
    workers = Workers(asked.at_once, asked.minutes)
    jobs = {seed: supervised(model, seed, asked.folds, asked.runs, short) for seed in asked.seeds}
    for seed, those in _each(workers, jobs, record):
        if all(job.done for job in those):  # this seed's pairs are known
            sweep_of([job for job in those if job.name == "fold"], asked.runs / f"folds-{seed}")
    first = {seed: [job for job in those if job.name == "SFT"] for seed, those in jobs.items()}
    later = {
        seed: going_on(model, seed, asked.rates, asked.runs, short)
        for seed, those in jobs.items()
        if all(job.done for job in those)
    }
    for _ in _each(workers, later, record):
        pass
    validation, systems = chosen({seed: [*first[seed], *later.get(seed, [])] for seed in asked.seeds})
    record.found(validation)
    wanted = [Job(j.name, j.recipe, j.overrides, j.runs) for by_seed in systems.values() for j in by_seed.values()]
    failed = [one for one in workers.all(wanted) if one.failed]
    for one in failed:
        print(json.dumps({"system": one.job.name, "failed": one.failed}), flush=True)
    tested: dict[str, dict[str, Run]] = {
        name: {seed: job.run for seed, job in by_seed.items() if job.run.scores.is_file()}
        for name, by_seed in systems.items()
    }
    record.found([*validation, *dpo_figures.rows(tested, AGAINST)])
    return len(systems) == 1 + len(WAYS) and all(len(runs) == len(asked.seeds) for runs in tested.values())


def _each(workers: Workers, jobs: dict[int, list[Job]], record: Record) -> Iterable[tuple[int, list[Job]]]:
    """The jobs of each seed once they have ended; all are begun in the order of the seeds."""
    begun = {seed: [workers.start(job) for job in those] for seed, those in jobs.items()}
    for seed, futures in begun.items():
        for future in futures:
            record.ended(future.result(), seed)
        yield seed, jobs[seed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/dpo-experiment"), help="empty, or of a call before")
    parser.add_argument("--results", type=Path, help="else results/dpo_phrasebank.json, of --tiny none")
    parser.add_argument("--at-once", type=int, default=1, help="runs that share the GPU")
    parser.add_argument("--minutes", type=float, help="end before so many; what is done is kept, the rest goes on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--rates", nargs="+", default=["5e-6", "2e-5", "1e-4"])
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="does all of this run?")
    asked = parser.parse_args()
    asked.results = results(asked.results, "dpo_phrasebank.json", tiny=asked.tiny)
    asked.runs = asked.runs.absolute()
    asked.runs.mkdir(parents=True, exist_ok=True)
    model = "smollm2-135m"
    short: tuple[str, ...] = ()
    if asked.tiny:
        make_tiny(asked.runs / "model", None)
        model, short = str(asked.runs / "model"), ("train.max_steps=2", "data.0.train_rows=100", "data.0.bands=[66-75]")
    mixed_pairs(asked.runs)
    note = f"{model}; runs share the machine, so no speeds"
    if not experiment(asked, model, short, Record(asked.results, conditions(note=note))):
        sys.exit("not all is done; give the command again, with the same --runs")


if __name__ == "__main__":
    main()
