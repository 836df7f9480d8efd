"""The command: what it says, what it refuses, and with which status it exits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commandline import FINLLM, finllm
from finllm.errors import RecipeError
from finllm.plan import Plan
from finllm.recipe import Recipe, load
from finllm.run import Progress, State
from launch import cli, planning, shipped


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A recipe of one's own."""
    path = tmp_path / "small.yaml"
    path.write_text("purpose: tests\nmodel: smollm2-135m\ndata: sample\ntrain: {method: sft, epochs: 1}\n")
    return path


def test_help_fits_on_one_screen_and_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    """45 lines, 80 columns."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert len(shown.splitlines()) <= 45
    assert max(map(len, shown.splitlines())) <= 80
    assert "finllm launch demo" in shown


def test_the_examples_of_the_help_can_be_parsed() -> None:
    """Every line of them is a command that exists, with options that exist."""
    examples = re.findall(r"^  (?:cat \S+ \| )?finllm (.+?)(?:  +.*)?$", cli.EXAMPLES, re.MULTILINE)
    assert len(examples) >= 6
    for example in examples:
        _, rest = cli.build_parser().parse_known_args(example.split())
        assert not [argument for argument in rest if argument.startswith("-")], example


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lanch", "demo"], "invalid choice: 'lanch'"),
        (["launch"], "the following arguments are required: RECIPE"),
        (["launch", "demo", "--dry-rn"], "--dry-rn: not known here; did you mean --dry-run?"),
        (["launch", "demo", "--dry"], "--dry: not known here; did you mean --dry-run?"),
        (["status", "--jsn"], "--jsn: not known here; did you mean --json?"),
        (["logs", "one", "two"], "two: not known here; see --help"),
        (["cancel", "one", "--wait", "-3"], "-3 is no waiting time"),
        (["cancel", "one", "--wait", "soon"], "soon is no waiting time"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unknown_words_are_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2, the nearest known option, and no abbreviation that means something else tomorrow."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["launch", "dmo"], "dmo: no such file, and no shipped recipe of that name; did you mean demo?"),
        (["launch", "none/at/all.yaml"], "`finllm recipes` lists those that are shipped"),
        (["launch", "demo", "train.epocs=1", "--dry-run"], "train.epocs is not a known key; did you mean epochs?"),
        (["launch", "demo", "epochs"], "'epochs' is no override; write key=value"),
        (["launch", "demo", "--name", "a/b"], "'a/b' is no name for a run"),
        (["launch", "demo", "resources.gpu=a100-80gb"], "that is for plans only; take it out, or use --dry-run"),
        (["check", "demo", "train.global_batch=0"], "train.global_batch is 0"),
        (["check", "demo", "data=table", "data.0.path=/none.csv", "data.0.text=t", "data.0.label=l"], "/none.csv"),
        (["status", "none"], "no run 'none' in"),
        (["resume", "none"], "there are none yet; `finllm launch RECIPE` makes one"),
        (["recipes", "/none"], "/none: no *.yaml there"),
        (["predict", "none", "text"], "no run 'none' in"),
        (["predict", "smollm2-135m", "text", "--file", "x"], "texts and --file are both given"),
        (["predict", "smollm2-135m", "--file", "/none.txt"], "/none.txt: cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_message_and_exit_2(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On standard error, without a traceback, and nothing is made."""
    monkeypatch.setenv("FINLLM_RUNS", str(tmp_path / "runs"))
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.startswith("finllm: ")
    assert "Traceback" not in shown.err
    assert not list((tmp_path / "runs").glob("*"))


def test_the_installed_command_is_this_one(small: Path) -> None:
    """`finllm`, as the package installs it."""
    program = Path(sys.executable).with_name("finllm")
    answer = subprocess.run([program, "launch", small, "--dry-run"], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("run ")


def test_a_dry_run_shows_what_would_happen(small: Path, tmp_path: Path) -> None:
    """Batch, steps, commands and reasons; overrides may stand anywhere; the folder is the one that would be made."""
    (tmp_path / "runs" / "small").mkdir(parents=True)
    answer = finllm(
        "launch", str(small), "train.global_batch=32", "--dry-run", "--runs", str(tmp_path / "runs"), "resources.gpus=0",
        "resources.cpu_processes=2",
    )  # fmt: skip
    assert (answer.returncode, answer.stderr) == (0, "")
    assert f"run      {tmp_path / 'runs' / 'small-2'}" in answer.stdout
    assert "sample; 390 train, 60 validation, 170 test" in answer.stdout
    assert "batch    32 = 2 process(es) x micro-batch 16 x 1 accumulated" in answer.stdout
    assert "steps    13" in answer.stdout
    assert f"-m finllm.train {tmp_path / 'runs' / 'small-2'}" in answer.stdout
    assert not (tmp_path / "runs" / "small-2").exists()


def test_a_dry_run_can_be_for_a_gpu_that_is_not_here(small: Path) -> None:
    """And then says so."""
    answer = finllm("launch", str(small), "--dry-run", "resources.gpu=h100-80gb", "resources.gpus=4")
    assert "device   NVIDIA H100 80 GB, 4 process(es) (ddp), bf16" in answer.stdout


def test_a_dry_run_counts_only_what_is_at_hand(small: Path, tmp_path: Path) -> None:
    """A set of the hub is not fetched; one that is missing is named."""
    hub = finllm("launch", str(small), "--dry-run", "data=[{name: hub, id: a/b, text: t, label: l}]")
    assert hub.returncode == 0
    assert "rows not counted: hub would have to be fetched" in hub.stdout
    missing = finllm("launch", str(small), "--dry-run", f"data=[{{name: phrasebank, path: {tmp_path / 'none'}}}]")
    assert "steps    known once the data is counted" in missing.stdout
    assert f"{tmp_path / 'none'}: does not exist" in missing.stdout


def test_a_run_folder_is_whole_before_anything_starts(small: Path, tmp_path: Path) -> None:
    """Plan, recipe, Accelerate's file and a state; the second run of a name gets a number."""
    first = planning.prepare(str(small), ("train.seed=7",), None, tmp_path / "runs")
    second = planning.prepare(str(small), (), None, tmp_path / "runs")
    assert (first.name, second.name) == ("small", "small-2")
    plan = Plan.of(first)
    assert (plan.name, plan.overrides, plan.source) == ("small", ("train.seed=7",), str(small))
    assert load(first.recipe) == plan.recipe == load(small, ["train.seed=7"])
    assert State.of(first) == State("created", host=os.uname().nodename)
    assert all(str(first.folder) in command for command in (plan.commands["train"], plan.commands["evaluate"]))


def test_a_refused_plan_leaves_no_folder(small: Path, tmp_path: Path) -> None:
    """The next launch gets the name."""
    with pytest.raises(RecipeError, match="7 processes do not divide"):
        planning.prepare(str(small), ("resources.gpus=0", "resources.cpu_processes=7"), None, tmp_path / "runs")
    assert not list((tmp_path / "runs").iterdir())


def test_runs_that_cannot_be_made_are_refused(small: Path, tmp_path: Path) -> None:
    """Such as below a file."""
    (tmp_path / "file").write_text("")
    answer = finllm("launch", str(small), "--runs", str(tmp_path / "file" / "runs"))
    assert answer.returncode == 2
    assert "no run folder can be made here" in answer.stderr


@pytest.mark.parametrize(
    ("file", "name"), [("demo.yaml", "demo"), ("my recipe!.yaml", "my-recipe-"), ("_.yaml", "run"), ("ü.yaml", "run")]
)
def test_a_run_is_named_after_its_recipe(file: str, name: str) -> None:
    """In letters that every file system and command line takes."""
    assert planning.default_name(Path(file)) == name


def test_recipes_are_found_by_path_and_by_name(small: Path) -> None:
    """With and without the suffix."""
    assert shipped.find(str(small)) == small
    assert shipped.find("demo") == shipped.find("demo.yaml") == shipped.FOLDER / "demo.yaml"


def test_recipes_are_listed_with_their_purpose(small: Path) -> None:
    """The shipped ones, or those of a folder; a faulty one does not hide the others."""
    listed = finllm("recipes").stdout
    for name in shipped.names():
        assert re.search(rf"^{re.escape(name)} ", listed, re.MULTILINE), name
    (small.parent / "faulty.yaml").write_text("model: a\n")
    own = finllm("recipes", str(small.parent)).stdout
    assert re.search(r"^small +smollm2-135m +sft, LoRA rank 16 +sample +tests$", own, re.MULTILINE)
    assert re.search(r"^faulty +faulty: see `finllm check .*faulty.yaml`$", own, re.MULTILINE)


def test_check_says_no_faults_only_where_there_are_none(tmp_path: Path) -> None:
    """Pairs come from the runs of a sweep, of which none is there."""
    recipe = tmp_path / "pairs.yaml"
    recipe.write_text(
        "model: smollm2-135m\ndata: sample\ntrain: {method: dpo, pairs: [{name: folds, sweep: nowhere}], learning_rate: 1e-5}\n"
    )
    answer = finllm("check", str(recipe))
    assert answer.returncode == 2
    assert "no faults" not in answer.stdout
    assert "nowhere" in answer.stderr


def test_check_counts_the_data(small: Path) -> None:
    """Per set, part and label; and says that no text leaks."""
    answer = finllm("check", str(small))
    assert answer.returncode == 0
    assert f"{small}: no faults" in answer.stdout
    counts = re.search(r"^sample +train +(\d+) +(\d+) +(\d+) +(\d+)$", answer.stdout, re.MULTILINE)
    assert counts
    negative, neutral, positive, every = map(int, counts.groups())
    assert negative + neutral + positive == every == 390
    assert "stands in two parts" in answer.stdout


def test_check_finds_texts_that_stand_in_two_parts(small: Path, tmp_path: Path) -> None:
    """And refuses the recipe, with the texts."""
    table = tmp_path / "own.csv"
    rows = [f"Revenue of company {i} rose by {i} per cent,positive,train" for i in range(5)]
    table.write_text("\n".join(["t,l,s", *rows, "Losses mounted at the steel maker,negative,train",
                                "Losses mounted at the steel maker,negative,test"]))  # fmt: skip
    answer = finllm("check", str(small), f"data={{name: table, path: {table}, text: t, label: l, split: s}}")
    assert answer.returncode == 2
    assert "Losses mounted at the steel maker" in answer.stderr


def test_the_schema_describes_recipes(small: Path) -> None:
    """Every key, no others, short forms, `extends`; each reference leads somewhere."""
    schema = json.loads(finllm("schema").stdout)
    assert set(schema["properties"]) == {*Recipe.model_fields, "extends"}
    assert schema["additionalProperties"] is False
    assert {"type": "string"} in schema["properties"]["model"]["anyOf"]
    assert schema["$defs"]["Sft"]["properties"]["global_batch"]["description"].startswith("Examples in one optimizer")
    references = set(_references(schema))
    assert references
    assert references <= {f"#/$defs/{name}" for name in schema["$defs"]}
    assert set(load(small).model_dump()) <= set(schema["properties"])


def _references(part: Any) -> list[str]:
    if isinstance(part, list):
        return [reference for item in part for reference in _references(item)]
    if not isinstance(part, dict):
        return []
    own = [part["$ref"]] if "$ref" in part else []
    return own + [reference for item in part.values() for reference in _references(item)]


def test_status_shows_every_run_the_oldest_first(small: Path, tmp_path: Path) -> None:
    """Also one that the launcher did not start; ended ones have no time left."""
    runs = tmp_path / "runs"
    assert "no runs in" in finllm("status", "--runs", str(runs)).stdout
    stopped, started_elsewhere = (planning.prepare(str(small), (), name, runs) for name in ("second", "first"))
    State(
        "stopped", attempt=2, host="here", started="2026-01-01T10:00:00+00:00", ended="2026-01-01T11:02:03+00:00"
    ).save(stopped)
    started_elsewhere.state.unlink()
    for run in (stopped, started_elsewhere):
        Progress("training", 30, 40, loss=0.123456, seconds=60).save(run)
    answer = finllm("status", "--runs", str(runs))
    assert answer.returncode == 0
    _, one, two, *remarks = answer.stdout.splitlines()
    assert one.split() == ["second", "stopped", "train", "30/40", "step", "0.1235", "2", "1:02:03", "local,", "here"]
    assert two.split()[:7] == ["first", "unknown", "training", "30/40", "step", "0.1235", "0:20"]
    assert remarks == [f"second is stopped; `finllm resume {stopped.folder}` goes on"]
    (standing,) = json.loads(finllm("status", "first", "--json", "--runs", str(runs)).stdout)
    assert (standing["status"], standing["seconds_left"], standing["elapsed_seconds"]) == ("unknown", 20.0, None)
    Progress("writing the report").save(stopped)  # which counts nothing
    one = finllm("status", "second", "--runs", str(runs)).stdout.splitlines()[1]
    assert one.split() == ["second", "stopped", "train", "2", "1:02:03", "local,", "here"]


def test_a_run_can_be_named_by_its_folder_and_runs_by_the_environment(small: Path, tmp_path: Path) -> None:
    """From any folder."""
    run = planning.prepare(str(small), (), None, tmp_path / "runs")
    for answer in (finllm("status", str(run.folder)), finllm("status", "small", FINLLM_RUNS=str(tmp_path / "runs"))):
        assert re.search(r"^small +created", answer.stdout, re.MULTILINE)


def test_a_run_that_never_began_can_be_cancelled(small: Path, tmp_path: Path) -> None:
    """There is nothing to wait for."""
    run = planning.prepare(str(small), (), None, tmp_path / "runs")
    answer = finllm("cancel", str(run.folder))
    assert (answer.returncode, answer.stdout.splitlines()[-1]) == (0, "small: cancelled")
    assert "small has ended already: cancelled" in finllm("cancel", str(run.folder)).stdout


def test_a_reader_that_has_seen_enough_is_no_error(small: Path, tmp_path: Path) -> None:
    """`finllm logs RUN | head -1`."""
    run = planning.prepare(str(small), (), None, tmp_path / "runs")
    run.log.write_text("line\n" * 200_000)
    reading = subprocess.Popen([*FINLLM, "logs", str(run.folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert reading.stdout is not None
    assert reading.stderr is not None
    assert reading.stdout.readline() == b"line\n"
    reading.stdout.close()
    assert (reading.wait(timeout=20), reading.stderr.read()) == (0, b"")
    reading.stderr.close()


def test_a_log_is_shown_as_a_terminal_would_show_it(small: Path, tmp_path: Path) -> None:
    """A bar that wrote over itself is one line; what is no UTF-8 and a last line without an end are shown too."""
    run = planning.prepare(str(small), (), None, tmp_path / "runs")
    run.log.write_bytes(b"0%\r50%\r100%\nwindows\r\ncaf\xe9\nlast")
    assert finllm("logs", str(run.folder)).stdout == "100%\nwindows\ncaf\ufffd\nlast\n"


@pytest.mark.slow
def test_predict_answers_line_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Arguments, a file or standard input; empty lines keep their place, tabs inside a text do not."""
    texts = tmp_path / "texts.txt"
    texts.write_text("Profit rose 20%\n\nZürich Re\tcut its dividend\n", encoding="utf-8")
    from_file = finllm("predict", "smollm2-135m", "--file", str(texts))
    assert from_file.returncode == 0
    rows = [line.split("\t") for line in from_file.stdout.splitlines()]
    assert [text for _, _, text in rows] == ["Profit rose 20%", "", "Zürich Re cut its dividend"]
    assert all(label in ("negative", "neutral", "positive") and 0.33 < float(sure) <= 1 for label, sure, _ in rows)
    with texts.open(encoding="utf-8") as given:
        monkeypatch.setattr("sys.stdin", given)
        assert cli.main(["predict", "smollm2-135m"]) == 0
    assert capsys.readouterr().out == from_file.stdout
    assert cli.main(["predict", "smollm2-135m", "--json", "Profit rose 20%", "--", "-5% in a day"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["text"], first["sentiment"]) == ("Profit rose 20%", rows[0][0])
    assert second["text"] == "-5% in a day"
    assert sum(second["probabilities"].values()) == pytest.approx(1)


@pytest.mark.slow
def test_a_launch_that_fails_says_so_and_exits_1(tmp_path: Path) -> None:
    """From the recipe to the evaluator's own words; the run folder keeps them."""
    recipe = tmp_path / "lost.yaml"
    recipe.write_text(f"model: {tmp_path / 'no-model'}\ndata: sample\n")
    answer = finllm("launch", str(recipe), "--runs", str(tmp_path / "runs"), "resources.gpus=0")
    assert answer.returncode == 1
    assert "lost failed in evaluate" in answer.stderr
    assert "no-model" in answer.stderr
    assert "Traceback" not in answer.stderr
