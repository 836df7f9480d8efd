"""`finllm.train` and `finllm.evaluate` called from Python, as a notebook does."""

import gc
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import finllm
from finllm import models
from finllm.errors import RecipeError, RunError
from finllm.journal import history
from finllm.plan import Plan
from finllm.recipe import load
from finllm.run import Progress

SHORT = ("train.epochs=1", "evaluation.bootstrap_draws=100", "evaluation.baselines=[majority]")


def losses(run: finllm.Run) -> list[float]:
    return [row.numbers["train/loss"] for row in history(run) if "train/loss" in row.numbers]


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> finllm.Run:
    """A run that Python trained."""
    return finllm.train(recipe, *SHORT, name="mine", runs=tmp_path_factory.mktemp("runs"))


def test_a_recipe_is_trained_as_the_command_trains_it(
    run: finllm.Run, train: Callable[..., finllm.Run], recipe: Path, tmp_path: Path
) -> None:
    """The same losses in a folder of the same kind; the caller's signals are left alone."""
    assert (run.name, Plan.of(run).overrides) == ("mine", SHORT)
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    by_command = losses(train(recipe, tmp_path, *SHORT))
    assert losses(run) == by_command
    assert len(by_command) == 7


def test_scores_come_back_and_stand_in_the_folder(run: finllm.Run) -> None:
    """As an object with the figures of the report; the run is found by its folder too."""
    scores = finllm.evaluate(run)
    assert scores == finllm.Scores.of(run)
    assert {"tuned", "base", "majority"} <= {system.key for system in scores.systems}
    assert 0 <= scores.parts[0].systems["tuned"].accuracy.value <= 1
    assert run.report.is_file()
    assert finllm.evaluate(str(run.folder)).parts == scores.parts
    answer = finllm.SentimentPredictor(run.folder).predict("Profits today.")
    assert answer["confidence"] == max(answer["probabilities"].values())


def test_a_recipe_made_in_python_is_trained(run: finllm.Run, recipe: Path, tmp_path: Path) -> None:
    """It needs no file, and the run can be repeated from its own folder."""
    made = load(recipe, ["train.max_steps=2"])
    own = finllm.train(made, runs=tmp_path)
    assert (own.name, Plan.of(own).recipe) == ("run", made)
    assert losses(own) == losses(run)[:2]
    assert load(Path(Plan.of(own).source)) == made


def test_a_run_that_ended_early_goes_on_from_its_checkpoint(recipe: Path, tmp_path: Path) -> None:
    """Given its folder: no step is done again, and the weights are saved."""
    run = finllm.train(recipe, *SHORT, runs=tmp_path)
    run.adapter.rename(tmp_path / "elsewhere")
    again = finllm.train(run.folder)
    assert again.folder == run.folder
    assert run.adapter.is_dir()
    assert len(losses(run)) == 7


def test_what_cannot_be_trained_is_raised(recipe: Path, tmp_path: Path) -> None:
    """Not printed: a file that is not there, nothing to train, changes to an object; the folder keeps why a run failed."""
    with pytest.raises(RecipeError, match=r"none\.yaml"):
        finllm.train(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="there is nothing to train"):
        finllm.train(load(recipe, ["train=null"]), runs=tmp_path)
    with pytest.raises(RecipeError, match="only a file can be overridden"):
        finllm.train(load(recipe), "train.epochs=1", runs=tmp_path)
    with pytest.raises(RunError, match="cannot be loaded"):
        finllm.train(recipe, f"model.name={tmp_path / 'none'}", name="lost", runs=tmp_path)
    progress = Progress.of(finllm.Run(tmp_path / "lost"))
    assert progress is not None
    assert (progress.outcome, "cannot be loaded" in progress.error) == ("failed", True)
    with pytest.raises(RunError, match="no run 'absent'"):
        finllm.evaluate("absent")


def test_the_names_are_callable_however_they_were_imported() -> None:
    """Before and after the modules behind `python -m` are imported; importing the package alone loads nothing heavy."""
    code = (
        "import sys, finllm; light = set(sys.modules); assert callable(finllm.train); import finllm.train, finllm.evaluate;"
        "from finllm import train; from finllm.evaluate import evaluate;"
        "assert train is finllm.train and callable(train) and callable(train.main) and callable(evaluate);"
        "print(*sorted(light & {'torch', 'transformers', 'pydantic', 'numpy'}))"
    )
    answer = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "\n", "")
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        finllm.trian  # noqa: B018


@pytest.mark.parametrize("on", [True, False])
def test_importing_leaves_the_garbage_collector_as_it_was(*, on: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        with models.importing():
            assert not gc.isenabled()
        assert gc.isenabled() is on
        with pytest.raises(ImportError), models.importing():
            raise ImportError
        assert gc.isenabled() is on
    finally:
        (gc.enable if before else gc.disable)()
        gc.unfreeze()
