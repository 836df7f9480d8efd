"""Runs side by side: the same rows or none, seeds taken together, and sweeps that are ranked by validation alone."""

import argparse
import importlib.util
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finllm import assessment, comparison, predictions, seeds
from finllm.errors import RunError
from finllm.example import LABELS, Example, Split
from finllm.machine import Machine
from finllm.metrics import Indices
from finllm.plan import Rows, decide
from finllm.predictions import Answers
from finllm.recipe import Recipe
from finllm.report import Facts, write
from finllm.run import Run, create
from finllm.sweeps import Cell, Sweep, holding, write_report
from launch import cli


def examples(part: Split, count: int) -> list[Example]:
    return [Example(f"news:{part}:{n}", "news", f"text {n}", LABELS[n % 3], part) for n in range(count)]


ROWS = [*examples("validation", 90), *examples("test", 150)]


def evaluated(
    runs: Path, name: str, right: dict[str, float], rows: Sequence[Example] = ROWS, *, seed: int = 42, rank: int = 16
) -> Run:
    """A run folder as an evaluation leaves it, right on about so many rows of each part."""
    recipe = Recipe.model_validate(
        {
            "model": "smollm2-135m",
            "data": [{"name": "sample", "alias": "news"}],
            "lora": {"rank": rank},
            "train": {"method": "sft", "seed": seed},
        }
    )
    run = create(runs, name)
    counts = Rows(train=100, validation=90, test=150)
    plan = decide(recipe, here=Machine((), 2), rows=counts, folder=run.folder, source="demo.yaml")
    plan.save(run)
    draw = np.random.default_rng([seed, rank])
    table = np.full((len(rows), 3), 0.1)
    for n, example in enumerate(rows):
        wrong = draw.random() >= right[example.split]
        table[n, (LABELS.index(example.label) + wrong) % 3] = 0.8
    answers = Answers("tuned", "the tuned one", 3.0, predictions.of(rows, table))
    predictions.write(run, answers)
    scores = assessment.score([answers], 100, 0, parts=["test"])
    scores.save(run)
    facts = Facts(rows={"news": counts})
    facts.save(run)
    write(run, scores, plan, facts)
    return run


def test_runs_are_compared_on_the_same_rows(tmp_path: Path) -> None:
    """The verdict is about the first; the table has every run, and the page stands beside it."""
    runs = [
        evaluated(tmp_path, "good", {"validation": 0.9, "test": 0.9}, rank=8),
        evaluated(tmp_path, "poor", {"validation": 0.5, "test": 0.5}),
    ]
    path, scores = comparison.write(runs, tmp_path / "both")
    assert [system.key for system in scores.systems] == ["good", "poor"]
    text = path.read_text()
    assert "smollm2-135m, tuned beats smollm2-135m" not in text
    assert re.search(r"\| good: smollm2-135m, tuned \| \d\d\.\d \[", text)
    assert "Over seeds" not in text
    assert path.with_suffix(".html").is_file()


def test_runs_on_other_test_rows_are_refused_by_name(tmp_path: Path) -> None:
    """The message says which two, how many rows, and the first of them."""
    one = evaluated(tmp_path, "one", {"validation": 0.9, "test": 0.9})
    other = evaluated(tmp_path, "other", {"validation": 0.9, "test": 0.9}, ROWS[:-1])
    with pytest.raises(RunError, match=r"other and one did not answer the same rows: 1 differ, the first is news:test"):
        comparison.write([one, other], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_validation_rows_that_differ_are_left_out(tmp_path: Path) -> None:
    """Runs on other validation rows can be compared, without temperatures."""
    one = evaluated(tmp_path, "one", {"validation": 0.9, "test": 0.9})
    other = evaluated(tmp_path, "other", {"validation": 0.9, "test": 0.9}, ROWS[3:], rank=8)
    _, scores = comparison.write([one, other], tmp_path / "both")
    assert scores.parts[0].calibration["one"].softened is None


def test_runs_that_differ_in_their_seed_are_taken_together(tmp_path: Path) -> None:
    """Mean, standard deviation and seeds stand in one line."""
    runs = [evaluated(tmp_path, f"s{s}", {"validation": 0.9, "test": 0.8}, seed=s) for s in (1, 2, 3)]
    runs.append(evaluated(tmp_path, "other", {"validation": 0.9, "test": 0.5}, rank=4))
    path, scores = comparison.write(runs, tmp_path / "all")
    shares = [scores.parts[0].systems[f"s{s}"].accuracy.value for s in (1, 2, 3)]
    expected = f"{100 * np.mean(shares):.1f} ± {100 * np.std(shares, ddof=1):.1f} ["
    line = next(line for line in path.read_text().splitlines() if line.startswith("| s1, 3 seeds | 3 |"))
    assert line.split("|")[3].strip().startswith(expected)
    assert re.search(r"\| other \| \+\d\d\.\d \[.*\| better \|", path.read_text())


def right(share: float, seed: int, rows: int = 400) -> tuple[Indices, Indices]:
    gold = np.arange(rows) % 3
    wrong = np.random.default_rng(seed).random(rows) >= share
    return gold, (gold + wrong) % 3


def test_the_interval_over_seeds_and_rows_is_wider_than_that_of_the_rows() -> None:
    """Seeds that differ widen it; one seed has the interval of the rows alone; equal seeds likewise."""
    gold, one = right(0.8, 1)
    _, far = right(0.6, 2)
    alone = seeds.over_seeds(gold, [one], [None] * 400, 2000, 0)["accuracy"]
    same = seeds.over_seeds(gold, [one, one], [None] * 400, 2000, 0)["accuracy"]
    apart = seeds.over_seeds(gold, [one, far], [None] * 400, 2000, 0)["accuracy"]
    assert alone.deviation == same.deviation == 0
    width = {n: f.mean.high - f.mean.low for n, f in (("alone", alone), ("same", same), ("apart", apart))}
    assert width["alone"] == pytest.approx(2 * 1.96 * np.sqrt(0.8 * 0.2 / 400), rel=0.1)
    assert width["same"] == pytest.approx(width["alone"])
    assert width["apart"] > 2 * width["alone"]
    assert apart.mean.value == pytest.approx(((one == gold).mean() + (far == gold).mean()) / 2)


def test_a_difference_over_seeds_is_paired_by_rows() -> None:
    """Two systems with the same answers differ by 0 in every draw; far ones are decided."""
    gold, one = right(0.8, 1)
    _, far = right(0.5, 2)
    none = seeds.difference(gold, [one], [one], [None] * 400, 500, 0)["macro_f1"]
    assert (none.value, none.low, none.high) == (0, 0, 0)
    assert seeds.difference(gold, [one, one], [far], [None] * 400, 500, 0)["accuracy"].decided


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Rank 8 is best on validation and worst on test; rank 4 has two seeds; rank 64 is not done."""
    runs = tmp_path_factory.mktemp("runs")
    share = {4: (0.6, 0.9), 8: (0.95, 0.3), 64: (0.0, 0.0)}
    cells = []
    for rank, seed in itertools.product((4, 8, 64), (1, 2)):
        name = f"ranks-{rank}-{seed}"
        cells.append(Cell(name, (f"lora.rank={rank}", f"train.seed={seed}")))
        if rank != 64:
            validation, test = share[rank]
            evaluated(runs, name, {"validation": validation, "test": test}, seed=seed, rank=rank)
    made = Sweep(runs / "ranks", "demo.yaml", ("lora.rank", "train.seed"), tuple(cells))
    made.save()
    return made


def test_a_sweep_is_ranked_by_validation_and_shows_the_test_of_the_chosen_alone(sweep: Sweep) -> None:
    """The settings that would win on test do not, and their test figures are nowhere in the report."""
    text = write_report(sweep).read_text()
    assert "**lora.rank=8: " in text
    ranks = re.findall(r"^\| (\d) \| lora\.rank=(\d+) \| 2 of 2 \|", text, re.MULTILINE)
    assert ranks == [("1", "8"), ("2", "4")]
    test = text[text.index("## Test figures") : text.index("## How to read this")]
    chosen, other = (assessment_of(sweep, f"ranks-{rank}-{seed}") for rank, seed in ((8, 1), (4, 1)))
    assert f"{100 * np.mean([chosen, assessment_of(sweep, 'ranks-8-2')]):.1f} ± " in test
    assert "lora.rank=4" not in test
    assert f"{100 * other:.1f}" not in text
    assert "ranks-64-1 (lora.rank=64, train.seed=1): not begun" in text
    assert "finllm launch demo.yaml --sweep lora.rank=4,8,64 --sweep train.seed=1,2" in text
    assert (sweep.folder / "report.html").is_file()


def assessment_of(sweep: Sweep, name: str) -> float:
    """Test accuracy of a cell."""
    answers = predictions.of_run(Run(sweep.folder.parent / name))
    rows = [p for p in answers.predictions if p.part == "test"]
    return sum(p.gold == p.predicted for p in rows) / len(rows)


def test_a_sweep_without_validation_is_told_and_not_ranked(tmp_path: Path) -> None:
    """Its report is written all the same, without any test figure."""
    evaluated(tmp_path, "only-1", {"test": 0.9}, examples("test", 60))
    Sweep(tmp_path / "only", "demo.yaml", ("lora.rank",), (Cell("only-1", ("lora.rank=16",)),)).save()
    text = write_report(Sweep.of(tmp_path / "only")).read_text()
    assert "1 of the 1 cells is done." in text
    assert "Not ranked: only-1 has no answers to validation texts" in text
    assert "## Test figures" not in text


def test_a_run_knows_its_sweep(sweep: Sweep, tmp_path: Path) -> None:
    """W&B groups the runs by it."""
    assert holding(sweep.runs[0]) == "ranks"
    assert holding(Run(tmp_path / "alone")) is None


def test_the_command_makes_every_kind_of_report(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    """One run again, two against each other, a sweep; and says what it cannot do."""
    runs = ["--runs", str(sweep.folder.parent)]
    first, second = (run.name for run in sweep.runs[:2])
    (sweep.runs[0].folder / "report.html").unlink()
    assert cli.main(["report", first, *runs]) == 0
    assert (sweep.runs[0].folder / "report.html").is_file()
    assert cli.main(["report", first, second, *runs]) == 0
    assert (sweep.folder.parent / f"{first}-and-{second}" / "report.html").is_file()
    assert cli.main(["report", "--sweep", "ranks", *runs]) == 0
    assert str(sweep.folder / "report.md") in capsys.readouterr().out
    for wrong, said in (
        (["report", *runs], "name one run"),
        (["report", "--sweep", "none", *runs], "no sweep 'none'"),
        (["report", first, "nowhere", *runs], "no run 'nowhere'"),
    ):
        assert cli.main(wrong) == 2
        assert said in capsys.readouterr().err


def test_an_earlier_run_can_be_a_system_of_an_evaluation(tmp_path: Path) -> None:
    """Its answers are taken row by row; rows that it did not answer are named."""
    from finllm.systems import earlier

    before = evaluated(tmp_path, "before", {"validation": 0.9, "test": 0.9})
    now = Run(tmp_path / "now")
    found = earlier("before", now, ROWS[::-1])
    assert [p.id for p in found.predictions] == [e.id for e in ROWS[::-1]]
    assert found.key == before.name
    other = [replace(ROWS[-1], id="news:test:999")]
    with pytest.raises(RunError, match=r"before did not answer 1 of 1 rows of this run, the first is news:test:999"):
        earlier("before", now, other)


def test_headline_rows_follow_from_the_runs_of_the_chosen_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates are ranked by validation; the rows have mean and deviation over the seeds, n, interval and settings."""
    headline = load("headline", monkeypatch)
    grid = {"lora.rank": ("8", "16")}
    poor, good = headline.candidates("m", "phrasebank", grid)
    assert good == ("model.name=m", "data=[phrasebank]", "lora.rank=16", "lora.alpha=32")
    recipe = tmp_path / "x.yaml"
    for cell, share in ((poor, {"validation": 0.5, "test": 0.95}), (good, {"validation": 0.9, "test": 0.8})):
        run = evaluated(tmp_path / "choose" / "phrasebank" / headline.named(cell), "x", share)
        run.adapter.mkdir()
    for seed in (42, 43):
        name = headline.named((*good, f"train.seed={seed}"))
        run = evaluated(tmp_path / "measure" / "phrasebank" / name, "x", {"validation": 0.9, "test": 0.8}, seed=seed)
        run.adapter.mkdir()
    asked = argparse.Namespace(recipe=str(recipe), grid=grid, seeds=["42", "43"], runs=tmp_path, also=[])
    workers = headline.Workers(2)
    assert headline.choose("m", "phrasebank", asked, workers) == good
    (row,) = headline.measure("m", "phrasebank", good, asked, workers)
    answers = [predictions.of_run(run) for run in map(Run, (tmp_path / "measure" / "phrasebank").glob("*/x"))]
    shares = [100 * np.mean([p.predicted == p.gold for p in one.predictions if p.part == "test"]) for one in answers]
    assert (row["dataset"], row["texts"], row["n"], row["runs"], row["system"]) == ("news", "all", 150, 2, "tuned")
    assert row["accuracy"]["mean"] == pytest.approx(np.mean(shares), abs=0.01)
    assert row["accuracy"]["deviation"] == pytest.approx(np.std(shares, ddof=1), abs=0.01)
    assert row["accuracy"]["low"] < row["accuracy"]["mean"] < row["accuracy"]["high"]
    assert row["overrides"] == list(good)
    assert json.loads(json.dumps(row)) == row
    output = headline.Output(tmp_path / "headline.json")
    for made in ([row], [{**row, "model": "other"}], [{**row, "n": 1}]):
        output.put(made)
    assert [(one["model"], one["n"]) for one in json.loads((tmp_path / "headline.json").read_text())] == [
        ("other", 150), ("m", 1)
    ]  # fmt: skip
    late = argparse.Namespace(**{**vars(asked), "seeds": ["42", "43", "44"]})
    (some,) = headline.measure("m", "phrasebank", good, late, headline.Workers(2, minutes=0))
    assert (some["seeds"], some["runs"]) == (["42", "43"], 2), "the seed that found no time is left out, not the others"
    wider = argparse.Namespace(**{**vars(asked), "grid": {"lora.rank": ("8", "16", "32")}})
    assert headline.choose("m", "phrasebank", wider, headline.Workers(2, minutes=0)) is None


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script of benchmarks/ as a module, with those that stand beside it."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
