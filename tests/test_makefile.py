"""`make install`: once, and again only where something is broken; Python and pip are stand-ins that note their calls."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = """#!/bin/sh
case "$*" in
  "-c import sys;"*) test ! -e too-old ;;
  --version) echo "Python 3.9.1" ;;
  "-m venv .venv") echo venv >>calls; test ! -e no-venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip --version") test ! -e .venv/no-pip ;;
  "-m pip install "*) echo install >>calls; test ! -e offline ;;
  "-m pip check --quiet") test ! -e .venv/conflict ;;
  "-c import torch,"*) test ! -e .venv/half-copied ;;
  *) echo "not expected: $*" >&2; exit 9 ;;
esac
"""

Make = Callable[[], tuple[int, str, list[str]]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Runs `make install` in a checkout; gives the status, what was said, and what Python and pip were asked to do."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run() -> tuple[int, str, list[str]]:
        (tmp_path / "calls").write_text("")
        words = ["make", "install", f"PYTHON={python}"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
        return done.returncode, done.stdout + done.stderr, (tmp_path / "calls").read_text().split()

    return run


def test_it_installs_once(make: Make) -> None:
    """The second time nothing is made and nothing is fetched."""
    status, _, calls = make()
    assert (status, calls) == (0, ["venv", "install"])
    assert make()[::2] == (0, [])


def test_changed_packages_are_installed_into_what_is_there(make: Make, tmp_path: Path) -> None:
    """Other constraints: pip alone, in the same environment."""
    make()
    (tmp_path / "constraints.txt").write_text("torch==9.9\n")
    os.utime(tmp_path / ".venv" / ".complete", (0, 0))
    assert make()[::2] == (0, ["install"])


def test_an_environment_that_works_outlives_a_failure_of_pip(make: Make, tmp_path: Path) -> None:
    """Without a network it stays as it was, and the next `make` tries again."""
    make()
    os.utime(tmp_path / ".venv" / ".complete", (0, 0))
    (tmp_path / ".venv" / "precious").touch()
    (tmp_path / "offline").touch()
    assert make()[0] != 0
    assert (tmp_path / ".venv" / "precious").exists()
    (tmp_path / "offline").unlink()
    assert make()[::2] == (0, ["install"])


@pytest.mark.parametrize(
    ("broken", "said", "expected"),
    [
        ("no-pip", "is broken; making it anew", ["venv", "install"]),
        ("conflict", "is incomplete; making it anew", ["install", "venv", "install"]),
        ("half-copied", "is incomplete; making it anew", ["install", "venv", "install"]),
    ],
)
def test_a_half_made_environment_is_mended(
    make: Make, tmp_path: Path, broken: str, said: str, expected: list[str]
) -> None:
    """One that was interrupted has no stamp: what still works is kept, else it is made anew."""
    make()
    (tmp_path / ".venv" / ".complete").unlink()
    (tmp_path / ".venv" / broken).touch()
    status, output, calls = make()
    assert (status, calls) == (0, expected)
    assert said in output
    assert make()[::2] == (0, [])


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("too-old", "FinLLM needs Python 3.11 or newer"),
        ("no-venv", "apt-get install python3-venv"),
        ("offline", "pip has failed"),
    ],
)
def test_what_cannot_be_installed_is_explained_and_tried_again(
    make: Make, tmp_path: Path, fault: str, said: str
) -> None:
    """No stamp is left, so that the next `make` begins where this one failed."""
    (tmp_path / fault).touch()
    status, output, _ = make()
    assert status != 0
    assert said in output
    (tmp_path / fault).unlink()
    assert make()[0] == 0
