"""Our own code as it stands at submission: a job that waits a day runs what was submitted, not what was edited since."""

import shutil
import subprocess
from pathlib import Path

import finllm
import launch
from finllm.data.places import CHECKOUT
from finllm.errors import RunError
from finllm.files import write_text

PACKAGES = (finllm, launch)
CHANGES = "changes.diff"


def take(folder: Path) -> None:
    """Copy the packages into `folder`, anew where it exists, with the differences to the commit beside them."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        for package in PACKAGES:
            source = Path(str(package.__file__)).parent
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    except OSError as error:
        raise RunError(f"{folder}: the code cannot be copied here ({error}); free some disk, or give --runs") from error
    if differences := _differences():
        write_text(folder / CHANGES, differences)


def _differences() -> str:
    """What the packages differ by from the commit that the plan names; empty outside a checkout."""
    command = ["git", "-C", str(CHECKOUT), "diff", "HEAD", "--", *(package.__name__ for package in PACKAGES)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout if answer.returncode == 0 else ""
