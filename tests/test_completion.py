"""`finllm completion`: what a shell offers at TAB, asked of a real bash."""

import subprocess
from pathlib import Path

import pytest

from launch import cli, completion

DRIVE = r"""
source finllm.bash
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
function=$(complete -p finllm | sed 's/.*-F \([^ ]*\).*/\1/')
$function finllm "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script, two runs and a recipe."""
    folder = tmp_path_factory.mktemp("shell")
    (folder / "finllm.bash").write_text(completion.script("bash"))
    (folder / "my.yaml").write_text("")
    for run in ("first", "second"):
        (folder / "runs" / run).mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("finllm la", ["launch"]),
        ("finllm exp", ["explain", "export"]),
        ("finllm launch sft/smollm2-135m-phr", ["sft/smollm2-135m-phrasebank"]),
        ("finllm launch my", ["my.yaml"]),
        ("finllm launch my.yaml --dry", ["--dry-run"]),
        ("finllm logs f", ["first"]),
        ("finllm export first --format g", ["gguf"]),
        ("finllm status first s", ["second"]),
        ("finllm completion ", ["bash", "zsh"]),
    ],
)
def test_bash_offers_what_fits(line: str, offered: list[str], shell: Path) -> None:
    """Verbs, options, choices, shipped recipes and one's own, runs of the folder at hand."""
    answer = subprocess.run(
        ["bash", "-c", DRIVE, "bash", *line.split(" ")], cwd=shell, capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert sorted(answer.stdout.split()) == offered


def test_each_shell_gets_its_script(capsys: pytest.CaptureFixture[str]) -> None:
    """With every verb of the command in it, and functions that both shells define alike."""
    for shell in completion.SHELLS:
        assert cli.main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert all(verb in script for verb in cli.build_parser().verbs.choices)
        assert script.count("_finllm_runs") >= 5
