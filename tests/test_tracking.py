"""Tracking: what W&B and metrics.jsonl hold afterwards, in one session and in several, and what they must not hold."""

import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finllm import assessment, boards, predictions, report, tracking
from finllm.errors import RunError
from finllm.example import LABELS, Example
from finllm.journal import history
from finllm.machine import Machine
from finllm.plan import Plan, decide
from finllm.predictions import Answers
from finllm.recipe import Recipe
from finllm.report import Facts
from finllm.run import Run, create
from finllm.sweeps import Cell, Sweep

KEY = "planted0key0" + "7" * 40
"""Long enough to pass for an API key."""


@pytest.fixture(autouse=True)
def _no_key_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches the account of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens on the discard port
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create(tmp_path / "runs", "demo")


def plan(wandb: str = "offline", **more: Any) -> Plan:
    recipe = Recipe.model_validate(
        {
            "model": "smollm2-135m",
            "data": "sample",
            "train": {"method": "sft", "learning_rate": 5e-4},
            "tracking": {"wandb": wandb, "project": "tests", "tags": ["fast"], **more},
        }
    )
    here = Machine((), 2)
    return decide(recipe, here=here, rows=None, folder=Path("runs/demo"), source="demo.yaml", overrides=("a=1",))


# What W&B writes is a LevelDB log (https://github.com/google/leveldb/blob/main/doc/log_format.md) after 7 bytes of its
# own; each record is a `Record` of wandb.proto.

BLOCK = 32_768


def records(run: Run) -> list[Any]:
    """Every record of every session, oldest session first."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made at run time by protobuf

    files = sorted(run.folder.glob("wandb/*run-*/run-*.wandb"))
    return [Record.FromString(data) for file in files for data in _log_records(file.read_bytes())]


def _log_records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B", data[:7]
    at, pieces = 7, b""
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:  # too short for a header: padding
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        pieces += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last piece
            yield pieces
            pieces = b""


def values(items: Any) -> dict[str, Any]:
    """The items of a history, summary or config record as a dictionary; nested keys are joined by dots."""
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def history_rows(run: Run) -> list[dict[str, Any]]:
    return [values(r.history.item) for r in records(run) if r.WhichOneof("record_type") == "history"]


def summary(run: Run) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for record in records(run):
        if record.WhichOneof("record_type") == "summary":
            merged |= values(record.summary.update)
    return merged


def started(run: Run) -> list[Any]:
    return [record.run for record in records(run) if record.WhichOneof("record_type") == "run"]


def test_an_offline_run_holds_config_history_and_summary(run: Run) -> None:
    """What was logged is read back from the file on disk, with the resolved recipe as configuration."""
    tracker = tracking.start(run, plan(), "train")
    tracker.log(1, **{"train/loss": 0.5, "train/learning_rate": 1e-4})
    tracker.log(2, **{"train/loss": 0.25})
    tracker.summary(**{"test/sample/tuned/accuracy": 0.875})
    tracker.finish()
    (record,) = started(run)
    assert (record.run_id, record.display_name, record.project) == (tracking.run_id(run), "demo", "tests")
    assert list(record.tags) == ["fast"]
    config = values(record.config.update)
    assert config["train"]["learning_rate"] == 5e-4
    assert config["model"]["name"] == "smollm2-135m"
    assert config["plan"]["micro_batch"] == 16
    rows = history_rows(run)
    assert [(row[tracking.STEP], row["train/loss"]) for row in rows] == [(1, 0.5), (2, 0.25)]
    assert summary(run)["test/sample/tuned/accuracy"] == 0.875


def test_a_second_session_continues_the_same_run(run: Run) -> None:
    """After a requeue the id is the same, W&B's own step goes on rising, and replayed steps are kept."""
    for steps in ((1, 2, 3), (2, 3, 4)):
        tracker = tracking.start(run, plan(), "train")
        for step in steps:
            tracker.log(step, **{"train/loss": 1 / step})
        tracker.finish()
    evaluation = tracking.start(run, plan(), "evaluate")
    evaluation.summary(**{"test/accuracy": 0.75})
    evaluation.finish()
    assert {record.run_id for record in started(run)} == {tracking.run_id(run)}
    assert len(started(run)) == 3
    rows = history_rows(run)
    assert [row[tracking.STEP] for row in rows] == [1, 2, 3, 2, 3, 4]
    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert summary(run)["test/accuracy"] == 0.75


def children() -> str:
    """Names of the processes that this one has started and that are still there."""
    return subprocess.run(
        ["ps", "-o", "comm=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True
    ).stdout


def test_finish_leaves_no_process_behind(run: Run) -> None:
    """W&B's own process has written everything and is gone when finish returns."""
    tracker = tracking.start(run, plan(), "train")
    assert "wandb-core" in children()
    tracker.finish()
    assert "wandb-core" not in children()


def test_every_figure_is_drawn_over_the_training_step(run: Run) -> None:
    """W&B is told to use our step as x-axis, so that a rollback overlaps instead of being dropped."""
    tracking.start(run, plan(), "train").finish()
    axes = {r.metric.glob_name: r.metric.step_metric for r in records(run) if r.WhichOneof("record_type") == "metric"}
    assert axes["*"] == tracking.STEP


def test_metrics_jsonl_mirrors_figures_and_summary(run: Run) -> None:
    """Each call is one line with step, time and stage, readable while the run goes on."""
    tracker = tracking.start(run, plan(), "train")
    before = time.time()
    tracker.log(7, **{"train/loss": 0.5})
    tracker.log(8, **{"train/loss": math.nan})
    tracker.summary(accuracy=0.75)
    first, second, last = history(run)  # before finish
    tracker.finish()
    assert (first.step, first.stage, first.numbers) == (7, "train", {"train/loss": 0.5})
    assert abs(first.time - before) < 5
    assert math.isnan(second.numbers["train/loss"])
    assert (last.step, last.numbers) == (None, {"accuracy": 0.75})
    assert "NaN" not in run.metrics.read_text("utf-8")


def test_a_line_torn_by_a_crash_is_left_out_and_cut_off_by_the_next_attempt(run: Run) -> None:
    """Neither the reader nor the following attempt stumbles over it."""
    tracker = tracking.start(run, plan("disabled"), "train")
    tracker.log(1, loss=0.5)
    with run.metrics.open("a") as file:
        file.write('{"step": 2, "time": 17')
    assert [row.step for row in history(run)] == [1]
    again = tracking.start(run, plan("disabled"), "train")
    again.log(2, loss=0.25)
    assert [(row.step, row.numbers) for row in history(run)] == [(1, {"loss": 0.5}), (2, {"loss": 0.25})]
    tracker.finish()
    again.finish()


def test_a_damaged_line_is_named(run: Run) -> None:
    """A line that is whole but not ours is a fault, with its place."""
    run.metrics.write_text('{"step": 1, "time": 2, "stage": "train"}\nnonsense\n', "utf-8")
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: is no line of figures"):
        history(run)


def test_a_run_without_figures_has_an_empty_history(run: Run) -> None:
    """No file is no fault."""
    assert history(run) == []


def test_only_the_main_process_tracks(run: Run) -> None:
    """The others get a tracker that keeps nothing, and make no file."""
    tracker = tracking.start(run, plan(), "train", main=False)
    tracker.log(1, loss=0.5)
    tracker.summary(accuracy=0.75)
    tracker.finish()
    assert list(run.folder.iterdir()) == []


def test_disabled_tracking_still_writes_metrics_jsonl(run: Run) -> None:
    """There is no W&B folder and no id then."""
    tracker = tracking.start(run, plan("disabled"), "train")
    tracker.log(1, loss=0.5)
    tracker.finish()
    assert [path.name for path in run.folder.iterdir()] == ["metrics.jsonl"]


def test_the_id_is_made_once_even_by_many_at_the_same_time(run: Run) -> None:
    """All threads read the same id, and no temporary file stays."""
    ids: list[str] = []
    threads = [threading.Thread(target=lambda: ids.append(tracking.run_id(run))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 16
    assert len(set(ids)) == 1
    assert [path.name for path in run.folder.iterdir()] == ["wandb_id"]


def test_two_runs_have_two_ids(run: Run, tmp_path: Path) -> None:
    """Also where both have the same name."""
    other = create(tmp_path / "elsewhere", "demo")
    assert tracking.run_id(run) != tracking.run_id(other)


MODES: dict[str, tuple[str, dict[str, str], str, str]] = {
    "auto without a key": ("auto", {}, "offline", "no API key"),
    "auto with a key": ("auto", {"WANDB_API_KEY": KEY}, "online", ""),
    "auto with a key, but WANDB_MODE=offline": ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline", ""),
    "auto with a key, but WANDB_MODE=disabled": (
        "auto",
        {"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"},
        "disabled",
        "",
    ),
    "auto with a key that cannot be one": ("auto", {"WANDB_API_KEY": "short"}, "offline", "WANDB_API_KEY invalid"),
    "online without a key": ("online", {}, "offline", "no API key"),
    "online with a key": ("online", {"WANDB_API_KEY": KEY}, "online", ""),
    "offline with a key": ("offline", {"WANDB_API_KEY": KEY}, "offline", ""),
    "disabled with a key": ("disabled", {"WANDB_API_KEY": KEY}, "disabled", ""),
}


@pytest.mark.parametrize(("wanted", "environment", "mode", "reason"), MODES.values(), ids=MODES)
def test_mode_follows_recipe_key_and_environment(
    wanted: str, environment: dict[str, str], mode: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decided without contacting anything; the reason says what is missing."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found, why = tracking._mode(plan(wanted))
    assert found == mode
    assert reason in why


def test_a_key_in_netrc_counts() -> None:
    """`wandb login` stores it there."""
    Path(os.environ["NETRC"]).write_text(f"machine 127.0.0.1:9 login user password {KEY}\n")
    assert tracking._mode(plan("auto"))[0] == "online"


def test_online_without_a_network_goes_offline_in_time_and_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run goes on, nothing hangs, and the log tells how to upload later; no key is in any file."""
    monkeypatch.setattr(tracking, "INIT_SECONDS", 1.5)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    began = time.monotonic()
    tracker = tracking.start(run, plan("online"), "train")
    assert time.monotonic() - began < 10
    tracker.log(1, **{"train/loss": 0.5})
    tracker.finish()
    said = capfd.readouterr().out
    assert "W&B is offline: " in said
    assert f"wandb sync {run.folder}/wandb/offline-run-*" in said
    assert f"wandb leet {run.folder}/wandb" in said
    assert [row["train/loss"] for row in history_rows(run)] == [0.5]
    assert files_with(run, KEY) == []


def files_with(run: Run, secret: str) -> list[Path]:
    """Files of the run folder that hold `secret`; compressed data would hide it, so there must be none."""
    found = [path for path in run.folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in found)
    assert not [path for path in found if path.suffix in (".gz", ".zip", ".tgz")]
    return [path for path in found if secret.encode() in path.read_bytes()]


SESSION = """
import sys
from pathlib import Path
from finllm import tracking
from finllm.plan import Plan
from finllm.run import Run

run = Run(Path(sys.argv[1]))
print("the console says", sys.argv[2])
tracker = tracking.start(run, Plan.of(run), "train")
tracker.log(1, **{"train/loss": 0.5})
tracker.summary(accuracy=0.75)
tracker.finish()
"""


def test_no_secret_of_the_environment_or_the_console_reaches_the_run_folder(run: Run) -> None:
    """Keys are planted in the environment, on the command line and on the console; every file is searched."""
    planned = plan("offline")
    planned.save(run)
    planted = {"WANDB_API_KEY": KEY, "HF_TOKEN": "hf_planted_token_of_the_user"}
    spoken = "planted-on-the-command-line"
    subprocess.run(
        [sys.executable, "-c", SESSION, str(run.folder), spoken], env={**os.environ, **planted}, check=True, timeout=60
    )
    for secret in (*planted.values(), spoken):
        assert files_with(run, secret) == []
    assert files_with(run, "train/loss") != []  # the search does find what is there


def test_an_offline_run_contacts_nobody(run: Run) -> None:
    """Not even W&B's own error reporting: a proxy that all connections must pass sees none."""
    plan("offline").save(run)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        environment = {**os.environ, "HTTP_PROXY": address, "HTTPS_PROXY": address}
        for name in ("WANDB_BASE_URL", "WANDB_ERROR_REPORTING"):
            del environment[name]
        subprocess.run([sys.executable, "-c", SESSION, str(run.folder), ""], env=environment, check=True, timeout=60)
        proxy.settimeout(0.5)
        with pytest.raises(TimeoutError):
            proxy.accept()


CRASH = SESSION.replace(
    "tracker.finish()",
    """
import os, signal, subprocess, time
own = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
(core,) = [line.split()[0] for line in own.splitlines() if "wandb-core" in line]
os.kill(int(core), signal.SIGKILL)
time.sleep(0.5)
for step in range(2, 6):
    tracker.log(step, **{"train/loss": 1 / step})
    time.sleep(0.1)
tracker.finish()
os._exit(0)  # W&B's own exit hook complains about the process that we killed
""",
)


def test_figures_go_on_when_the_process_of_wandb_dies(run: Run) -> None:
    """Killed for memory, say: the run goes on, metrics.jsonl is whole, and one line of log says so."""
    plan("offline").save(run)
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(run.folder), ""], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("W&B stopped") == 1
    assert [row.step for row in history(run)] == [1, None, 2, 3, 4, 5]


def test_what_was_logged_before_a_kill_is_in_metrics_jsonl(run: Run) -> None:
    """A process that is killed outright loses no line."""
    plan("offline").save(run)
    code = SESSION.replace("tracker.finish()", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    done = subprocess.run([sys.executable, "-c", code, str(run.folder), ""], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [row.step for row in history(run)] == [1, None]


def test_importing_tracking_does_not_import_wandb() -> None:
    """The launcher reads histories on login nodes, where starting must be quick."""
    code = "import sys, finllm.tracking; sys.exit(int('wandb' in sys.modules or 'torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_tables_and_pictures_are_read_back_from_the_offline_run(run: Run) -> None:
    """Every cell of the report's tables, and each figure as PNG, stand in W&B's folder and are named by its history."""
    rows = [Example(f"x:{n}", "x", f"text {n}", LABELS[n % 3], "test", source=("a", "b")[n % 2]) for n in range(60)]
    shares = np.random.default_rng(0).dirichlet([1, 1, 1], 60)
    answers = [Answers(key, key, 1.0, predictions.of(rows, shares)) for key in ("tuned", "base")]
    scores = assessment.score(answers, 100, 0)
    tables = boards.tables(scores, answers)
    pictures = {chart.name: chart.png for chart in report.charts_of(scores, Facts())}
    tracker = tracking.start(run, plan(group="trials"), "evaluate")
    tracker.tables(tables)
    tracker.pictures(pictures)
    tracker.finish()
    assert [record.run_group for record in started(run)] == ["trials"]
    kept = {}
    for path in run.folder.glob("wandb/*run-*/files/media/table/**/*.table.json"):
        made = json.loads(path.read_text())
        kept[tuple(made["columns"])] = made["data"]
    assert set(kept) == {board.columns for board in tables.values()}
    found = kept[tables["test/x/predictions"].columns]
    assert len(found) == 60
    assert found[7][:6] == ["x:7", "text 7", None, "neutral", answers[0].predictions[7].predicted, found[7][5]]
    assert found[7][6:] == pytest.approx(answers[0].predictions[7].probabilities)
    system = dict(zip(tables["test/x/systems"].columns, kept[tables["test/x/systems"].columns][0], strict=True))
    assert system["macro_f1"] == pytest.approx(scores.parts[0].systems["tuned"].macro_f1.value)
    logged = {name for row in history_rows(run) for name in row}
    assert {f"tables/{name}" for name in tables} <= {name.split("._type")[0] for name in logged}
    images = list(run.folder.glob("wandb/*run-*/files/media/images/**/*.png"))
    assert len(images) == len(pictures) >= 4
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in images)


def test_runs_of_a_sweep_are_one_group(tmp_path: Path) -> None:
    """Named after the sweep, unless the recipe names a group itself."""
    run = create(tmp_path, "ranks-4")
    Sweep(tmp_path / "ranks", "demo.yaml", ("lora.rank",), (Cell("ranks-4", ("lora.rank=4",)),)).save()
    tracking.start(run, plan(), "train").finish()
    assert [record.run_group for record in started(run)] == ["ranks"]
