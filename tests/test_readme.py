"""README says nothing that is not so: its commands parse, its paths exist."""

import re
import shlex
from pathlib import Path

import pytest

from launch import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(
    r"^(?:finllm|make|python|accelerate launch) .*$",
    "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)),
    re.MULTILINE,
)


def test_readme_has_commands() -> None:
    """The two of a newcomer, and real use."""
    assert {"make demo", "make test"} <= {" ".join(line.split()[:2]) for line in COMMANDS}
    assert sum(line.startswith("finllm ") for line in COMMANDS) >= 5


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("finllm launch")])
def test_every_launch_in_readme_can_be_planned(
    line: str, capsys: pytest.CaptureFixture[str], shared_data: Path
) -> None:
    """The recipe exists, the overrides are right; planned for a GPU, as the recipes of 7B models need one."""
    assert shared_data.is_dir()
    words = [word for word in shlex.split(line, comments=True)[1:] if word != "--detach"]
    assert cli.main([*words, "--dry-run", "resources.gpu=a100-80gb"]) == 0
    assert "finllm.train" in capsys.readouterr().out


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("finllm")])
def test_every_command_in_readme_parses(line: str) -> None:
    """Verbs and options are those of the command."""
    parsed, rest = cli.build_parser().parse_known_args(shlex.split(line, comments=True)[1:])
    assert parsed.verb
    assert all("=" in word for word in rest)


def test_make_has_the_targets_that_readme_names() -> None:
    """`make demo`, `make test`, `make check`."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make ([a-z]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_path_in_readme_exists() -> None:
    """Links, and the tree with a line for each folder."""
    tree = re.search(r"```text\n(recipes/.*?)```", README, re.DOTALL)
    assert tree is not None
    folders = re.findall(r"^( *)([a-z]+)/ ", tree[1], re.MULTILINE)
    assert len(folders) >= 8
    for indent, folder in folders:
        assert (ROOT / ("finllm" if indent else "") / folder).is_dir(), folder
    for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
