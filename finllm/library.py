"""`finllm.train(recipe)` and `finllm.evaluate(run)`: modules that can be called.

The names belong to the modules that `python -m finllm.train RUN` and `python -m finllm.evaluate RUN` start; importing
one would replace a function of the same name in the package. So the modules themselves take the call.
"""

import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from finllm.recipe import Recipe
from finllm.run import Run, find

if TYPE_CHECKING:
    from finllm.scores import Scores


class Train(ModuleType):
    """Trains a recipe in this process."""

    RUNS: Path

    def __call__(
        self, recipe: Recipe | str | Path, *overrides: str, name: str | None = None, runs: str | Path | None = None
    ) -> Run:
        """The run of a recipe (a Recipe, or a YAML file with `key=value` changes), trained to its end on one device.

        It is called `name`, else as the file, and stands in `runs`, else $FINLLM_RUNS or `runs`. Given the folder of a
        run that ended early, that run goes on from its last checkpoint. Raises FinllmError where it cannot be done.
        """
        from finllm.train import train

        return train(recipe, overrides, name, runs)


class Evaluate(ModuleType):
    """Scores a trained run in this process."""

    def __call__(self, run: Run | str | Path) -> "Scores":
        """Scores of every system that the run's recipe names; predictions and report are left in its folder.

        `run` may be its name or folder. Raises FinllmError where it has not been trained.
        """
        from finllm import models
        from finllm.evaluate import evaluate

        models.quiet_libraries()
        found = run if isinstance(run, Run) else find(str(run), Path(os.environ.get("FINLLM_RUNS", "runs")))
        return evaluate(found)
