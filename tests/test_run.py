"""Run folders: names, states, checkpoints, and the time that is left."""

from pathlib import Path

import pytest

from finllm import train
from finllm.errors import RunError
from finllm.files import read_json, write_json
from finllm.plan import Plan
from finllm.progress import steps
from finllm.run import COMPLETE, Progress, Run, State, create, find


def test_two_runs_of_one_name_get_two_folders(tmp_path: Path) -> None:
    """The second is numbered."""
    assert [create(tmp_path / "runs", "a").name for _ in range(3)] == ["a", "a-2", "a-3"]


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "a b", "ü"])
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    """Before anything is made."""
    with pytest.raises(RunError, match="is no name for a run"):
        create(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()


def test_a_run_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    """A folder without a plan is no run."""
    create(tmp_path, "empty")
    (create(tmp_path, "real").plan).write_text("{}")
    assert find("real", tmp_path).folder == find(str(tmp_path / "real"), Path("elsewhere")).folder
    with pytest.raises(RunError, match=r"no run 'empty' in .*; there are: real"):
        find("empty", tmp_path)


def test_only_whole_checkpoints_count_the_newest_last(tmp_path: Path) -> None:
    """By number, not by letter; without the marker a checkpoint was cut short."""
    run = create(tmp_path, "run")
    for step in (100, 20, 3):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    (run.checkpoints / "checkpoint-other").mkdir()
    for step in (100, 20):
        (run.checkpoints / f"checkpoint-{step}" / COMPLETE).touch()
    assert [path.name for path in run.complete_checkpoints()] == ["checkpoint-20", "checkpoint-100"]


def test_state_and_progress_are_read_back_as_written(tmp_path: Path) -> None:
    """And are None before they are."""
    run = create(tmp_path, "run")
    assert State.of(run) is None
    assert Progress.of(run) is None
    state, progress = State("failed", pid=3, pid_started=1.5, error="ü"), Progress("training", 3, 9, loss=0.5)
    state.save(run)
    progress.save(run)
    assert State.of(run) == state
    assert Progress.of(run) == progress
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".")]


def test_a_missing_file_says_whose_it_is(tmp_path: Path) -> None:
    """With the folder that was taken for a run."""
    with pytest.raises(RunError, match=r"plan.json is missing; is .* a run folder"):
        read_json(Run(tmp_path).plan)


def test_a_plan_of_another_version_is_refused_in_words(tmp_path: Path) -> None:
    """With the file, the keys, and what to do; not with a traceback."""
    write_json(Run(tmp_path).plan, {"name": "old"})
    with pytest.raises(RunError, match=r"plan.json is not as this version .*recipe: Field required.* launch its"):
        Plan.of(Run(tmp_path))


@pytest.mark.parametrize(
    ("progress", "left"),
    [
        (Progress("training", 0, 10, seconds=5), None),
        (Progress("training", 5, 0, seconds=5), None),
        (Progress("training", 5, 10, seconds=10), 10),
        (Progress("training", 12, 10, seconds=10), 0),
        (Progress("training", 6, 10, seconds=4, first=4), 8),
        (Progress("training", 4, 10, seconds=4, first=4), None),
    ],
    ids=["not begun", "no end known", "half", "beyond the end", "resumed", "resumed, not begun"],
)
def test_the_time_left_follows_the_pace_of_this_attempt(progress: Progress, left: float | None) -> None:
    """Steps of an earlier attempt took none of its time."""
    assert progress.seconds_left == left


def test_progress_is_in_the_run_folder_while_a_stage_lasts(tmp_path: Path) -> None:
    """From its start, and to its end, also when it fails."""
    run = create(tmp_path, "run")

    def fail() -> None:
        with steps("counting", 10, "row", run) as counter:
            assert Progress.of(run) == Progress("counting", 0, 10, "row")
            counter.begin_at(4)
            counter.add(3, loss=0.25)
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        fail()
    after = Progress.of(run)
    assert after is not None
    assert (after.done, after.first, after.loss, after.unit) == (7, 4, 0.25, "row")


def test_the_first_process_that_fails_says_why(tmp_path: Path) -> None:
    """What others say then came of it; only that memory ran out is a better reason, since something is done about it."""
    run = create(tmp_path, "run")
    assert train._note(run, "ValueError: the cause", "")
    assert not train._note(run, "RuntimeError: connection closed by peer", "")
    assert (Progress.of(run) or Progress("")).error == "ValueError: the cause"
    assert train._note(run, "out of memory", "out of memory")
    assert not train._note(run, "ValueError: more", "")
    assert (Progress.of(run) or Progress("")).error == "out of memory"
