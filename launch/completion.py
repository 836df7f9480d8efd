"""`finllm completion SHELL`: a script that completes the command's words, without starting Python at each TAB."""

import argparse
from pathlib import Path
from typing import Any

from launch import shipped
from launch.endings import DONE

SHELLS = ("bash", "zsh")
RUNS = dict.fromkeys(SHELLS, "_finllm_runs")
RECIPES = dict.fromkeys(SHELLS, "_finllm_recipes")
PREAMBLE = {
    "bash": """\
_finllm_runs() {{
  compgen -W "$(command ls "${{FINLLM_RUNS:-runs}}" 2>/dev/null)" -- "$1"
  compgen -d -- "$1"
}}
_finllm_recipes() {{
  compgen -W "{recipes}" -- "$1"
  compgen -f -X '!*.yaml' -- "$1"
  compgen -d -- "$1"
}}""",
    "zsh": """\
_finllm_runs() {{
  compadd -- ${{FINLLM_RUNS:-runs}}/*(/N:t)
  _files -/
}}
_finllm_recipes() {{
  compadd -- {recipes}
  _files -g '*.yaml'
}}""",
}
"""Runs are looked up at each TAB; shipped recipes are those of the installation that wrote the script."""


def completion(*, shell: str) -> int:
    """The script that teaches a shell the command's words."""
    print(script(shell))
    return DONE


def script(shell: str) -> str:
    """For one of SHELLS."""
    import shtab

    from launch.cli import build_parser

    parser = build_parser()
    for verb in parser.verbs.choices.values():
        _teach(verb, shtab.FILE, shtab.DIRECTORY)
    preamble = PREAMBLE[shell].format(recipes=" ".join(shipped.names()))
    written: str = shtab.complete(parser, shell=shell, preamble=preamble)
    return written


def _teach(verb: argparse.ArgumentParser, file: Any, directory: Any) -> None:
    """Say of each argument what can stand there."""
    for action in verb._actions:  # noqa: SLF001 - as shtab itself does
        known: Any = None
        if action.dest in ("run", "names"):
            known = RUNS
        elif action.dest == "recipe":
            known = RECIPES
        elif action.type is Path:
            known = directory if action.metavar in ("DIR", "FOLDER") else file
        if known is not None:
            action.complete = known  # type: ignore[attr-defined]  # how shtab is told
