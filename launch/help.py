"""The first screen of the command: every verb, in groups, and examples."""

import argparse
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    Verbs: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - argparse names it no other way
else:
    Verbs = object

GROUPS = {
    "run": ("launch", "status", "logs", "cancel", "resume"),
    "measure": ("evaluate", "report"),
    "use": ("predict", "explain", "serve", "demo", "export"),
    "recipes": ("recipes", "check", "schema"),
    "machine": ("doctor", "completion"),
}
USAGE = "usage: finllm COMMAND [...]        finllm COMMAND --help tells the rest"


class Screen(argparse.ArgumentParser):
    """A parser of verbs whose help groups them; the verbs' own parsers are ordinary."""

    verbs: Verbs

    def verbs_as(self, **keys: Any) -> Verbs:
        """Where verbs are added."""
        self.verbs = self.add_subparsers(parser_class=argparse.ArgumentParser, **keys)
        return self.verbs

    def format_help(self) -> str:
        """Usage, verbs by group, and the epilog as it stands."""
        return "\n".join([USAGE, "", self.description or "", "", *grouped(self.verbs), "", self.epilog or ""])


def grouped(verbs: Verbs) -> list[str]:
    """A line for each verb, with the name of the group before its first."""
    about = {action.dest: action.help or "" for action in verbs._get_subactions()}  # noqa: SLF001 - argparse tells it nowhere else
    width = max(map(len, about)) + 2
    placed = {name for names in GROUPS.values() for name in names}
    groups = {**GROUPS, "other": tuple(name for name in about if name not in placed)}
    lines = []
    for group, names in groups.items():
        here = [name for name in names if name in about]
        lines += [f"{group if name == here[0] else '':9}{name:{width}}{about[name]}" for name in here]
    return lines
