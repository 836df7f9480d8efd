"""The shape of the code: what imports what, and how large things are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "finllm").rglob("*.py"))
LAUNCHER = sorted((ROOT / "launch").rglob("*.py"))
LIGHT = [
    "plan",
    "recipe",
    "run",
    "machine",
    "errors",
    "example",
    "yamlfile",
    "faults",
    "progress",
    "data",
    "sweeps",
    "published",
]
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "sklearn", "pandas", "wandb", "bitsandbytes"}
VAGUE = {"utils", "util", "common", "helpers", "helper", "base", "misc", "manager", "core"}
SHADOWS = {"evaluate", "datasets", "types", "logging", "signal", "select"}
"""Modules that are started by their path would find these of ours before those that are meant."""


def imported_by(path: Path) -> set[str]:
    """The packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_is_code() -> None:
    """The tests below would pass with none."""
    assert ROOT / "finllm" / "plan.py" in LIBRARY
    assert ROOT / "launch" / "cli.py" in LAUNCHER
    assert imported_by(ROOT / "launch" / "cli.py") >= {"argparse", "finllm", "launch"}


@pytest.mark.parametrize("path", LIBRARY, ids=named)
def test_the_library_never_imports_the_launcher(path: Path) -> None:
    """One arrow: what runs where the GPU is does not know who started it."""
    assert not imported_by(path) & {"launch", "slurm", "tests", "benchmarks", "submitit", "streamlit"}


@pytest.mark.parametrize("path", LAUNCHER, ids=named)
def test_the_launcher_imports_nothing_heavy(path: Path) -> None:
    """Not even inside a function: it starts processes, and those compute."""
    assert not imported_by(path) & (HEAVY | {"tests", "benchmarks"})


def test_only_the_service_speaks_http_and_only_the_page_knows_streamlit() -> None:
    """Both need packages that are optional."""
    code = [*LIBRARY, *LAUNCHER]
    web = {path for path in code if imported_by(path) & {"fastapi", "starlette", "uvicorn", "prometheus_client"}}
    assert {path.parent for path in web} == {ROOT / "finllm" / "service"}
    pages = {path.stem for path in code if "streamlit" in imported_by(path)}
    assert pages == {"page", "page_table", "page_text", "served"}
    for name in ("batching", "reader"):  # what the page takes from the service
        assert ROOT / "finllm" / "service" / f"{name}.py" not in web


def test_deciding_needs_neither_torch_nor_transformers() -> None:
    """So a plan takes half a second, and a login node suffices."""
    modules = ", ".join(["launch.cli", "finllm", *(f"finllm.{name}" for name in LIGHT)])
    code = f"import sys, {modules}; print(*sorted({HEAVY} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == []


@pytest.mark.parametrize("path", [*LIBRARY, *LAUNCHER], ids=named)
def test_files_functions_and_names_stay_readable(path: Path) -> None:
    """At most 300 lines to a file and 60 to a function; a module says what is in it."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert path.stem not in VAGUE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 60, f"{node.name} has {lines} lines"


def test_nothing_started_by_its_path_shadows_what_it_imports() -> None:
    """The folder of a script comes first on the module path."""
    assert not {path.stem for path in LAUNCHER} & SHADOWS


def test_the_tether_imports_nothing_of_ours() -> None:
    """It is started by its path, without site-packages."""
    assert imported_by(ROOT / "launch" / "tether.py") <= sys.stdlib_module_names
