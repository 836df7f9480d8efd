"""The experiment on DPO: which settings validation prefers, what the test part says, and what happens when time is up."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finllm import calibration, metrics, predictions
from finllm.assessment import gold_of, predicted_of, probabilities_of
from finllm.example import LABELS, Example
from finllm.predictions import Answers, Prediction
from finllm.run import Run

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROWS = [
    Example(f"phrasebank:{n}", "phrasebank", f"text {n}", LABELS[n % 3], "test", agreement=("100", "66-75")[n % 2],
            group=f"phrasebank:{n // 2}")
    for n in range(120)
]  # fmt: skip


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("dpo_figures")


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("dpo_phrasebank")


def answered(folder: Path, share: float, seed: int) -> Run:
    """A run that is right on about so many rows."""
    run, draw = Run(folder), np.random.default_rng(seed)
    run.predictions.mkdir(parents=True)
    table = draw.dirichlet([1, 1, 1], len(ROWS))
    for n, row in enumerate(ROWS):
        table[n, (LABELS.index(row.label) + (draw.random() >= share)) % 3] += 1.5
    table /= table.sum(axis=1, keepdims=True)
    predictions.write(run, Answers("tuned", "tuned", 1.0, predictions.of(ROWS, table)))
    return run


def test_differences_are_paired_over_rows_and_seeds(figures: Any, tmp_path: Path) -> None:
    """Values are those of the runs, a clear difference is decided, a system does not differ from itself."""
    systems = {
        name: {str(seed): answered(tmp_path / f"{name}-{seed}", share, seed) for seed in found}
        for name, share, found in (("SFT", 0.5, (42, 43)), ("DPO", 0.9, (42, 43, 44)))
    }
    made = list(figures.rows({**systems, "again": systems["SFT"]}, [("DPO", "SFT"), ("again", "SFT"), ("DPO", "none")]))
    whole = [row for row in made if row["slice"] == "50Agree"]
    assert [row["system"] for row in whole] == ["SFT", "DPO", "again", "DPO", "again"]
    assert {row["slice"] for row in made} == {"50Agree", "band 100", "band 66-75"}, "texts of other kinds are not there"
    apart = next(row for row in whole if row["kind"] == "difference")
    assert (apart["n"], apart["seeds"], apart["less"]) == (120, 2, "SFT")
    each = {
        name: [figures.answers(systems[name][seed]) for seed in ("42", "43")] for name in ("DPO", "SFT")
    }  # fmt: skip
    measures: dict[str, Callable[[list[Prediction]], Any]] = {
        "accuracy": lambda rows: metrics.accuracy(gold_of(rows), predicted_of(rows)),
        "macro_f1": lambda rows: metrics.macro_f1(gold_of(rows), predicted_of(rows)),
        "nll": lambda rows: calibration.nll(probabilities_of(rows), gold_of(rows)).mean(),
        "ece": lambda rows: calibration.ece(probabilities_of(rows), gold_of(rows)),
    }
    for name, measure in measures.items():
        by_seed = [measure(one) - measure(other) for one, other in zip(each["DPO"], each["SFT"], strict=True)]
        assert apart[name]["value"] == pytest.approx(np.mean(by_seed)), name
        assert apart["by_seed"][name] == pytest.approx(by_seed)
        assert apart[name]["low"] < apart[name]["value"] < apart[name]["high"]
    assert apart["accuracy"]["low"] > 0 > apart["nll"]["high"]
    none = next(row for row in whole if row["system"] == "again" and row["kind"] == "difference")
    for name in measures:
        assert none[name] == {"value": 0, "low": 0, "high": 0}, name


def trained(experiment: Any, folder: Path, rate: str, seed: int, accuracy: float) -> Any:
    """A job that is done, with what validation said of it."""
    job = experiment.Job("DPO", folder / "x.yaml", (f"train.learning_rate={rate}",), folder / f"{rate}-{seed}")
    job.run.adapter.mkdir(parents=True)
    said = {"step": 1, "validation/loss": 1 - accuracy, "validation/accuracy": accuracy}
    (job.run.folder / "metrics.jsonl").write_text(json.dumps(said) + "\n")
    return job


def test_validation_chooses_by_the_mean_of_the_seeds_that_all_rates_have(experiment: Any, tmp_path: Path) -> None:
    """One lucky seed is not enough; a rate without a run keeps its system out."""
    said = {("1e-5", 42): 0.9, ("1e-5", 43): 0.5, ("1e-4", 42): 0.8, ("1e-4", 43): 0.8, ("1e-4", 44): 0.1}
    jobs: dict[int, list[Any]] = {42: [], 43: [], 44: []}
    for (rate, seed), accuracy in said.items():
        jobs[seed].append(trained(experiment, tmp_path, rate, seed, accuracy))
    rows, systems = experiment.chosen(jobs)
    assert {row["rate"]: (row["accuracy"], row["seeds"]) for row in rows} == {
        "1e-5": (pytest.approx(0.7), ["42", "43"]), "1e-4": (pytest.approx(0.8), ["42", "43"])
    }  # fmt: skip
    assert {seed: job.overrides for seed, job in systems["DPO"].items()} == dict.fromkeys(
        ("42", "43"), ("train.learning_rate=1e-4",)
    )
    jobs[42].append(experiment.Job("DPO", tmp_path / "x.yaml", ("train.learning_rate=1",), tmp_path / "late"))
    assert experiment.chosen(jobs)[1] == {}


def test_a_job_beyond_the_last_minute_is_left_for_the_next_call(experiment: Any, tmp_path: Path) -> None:
    """Nothing is begun; what is done stays done, and the record says which is which."""
    done = trained(experiment, tmp_path, "1e-5", 42, 0.9)
    kept = experiment.Job(done.name, done.recipe, done.overrides, done.runs, evaluated=False)
    late = experiment.Job("DPO", tmp_path / "x.yaml", (), tmp_path / "late")
    ended = experiment.Workers(2, minutes=0).all([kept, late])
    assert [one.failed for one in ended] == ["", "no time left; give the command again"]
    assert not late.run.folder.exists()
    record = experiment.Record(tmp_path / "results.json", {"hardware": "none"})
    record.ended(ended[1], 42)
    record.found([{"kind": "validation", "accuracy": 0.123456789}])
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["kind"] for row in rows] == ["conditions", "validation", "run"]
    assert rows[1]["accuracy"] == 0.12346
    assert rows[2]["failed"].startswith("no time left")
