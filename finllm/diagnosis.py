"""What one check of a machine has found, and how it travels from the process that checks to the one that shows."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

State = Literal["ok", "warning", "wrong", "absent"]
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
"""Names of environment variables whose values are never shown."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    what: str
    state: State
    """`absent`: not here, or not checked, and `found` says which."""
    found: str
    mend: str = ""
    """A command, or what to do; empty where nothing needs mending."""


@dataclass(frozen=True)
class Started:
    """That a check has begun: should its process hang or die, this is the one to blame."""

    checking: str


def line(said: Finding | Started) -> str:
    """As one line of JSON, without secrets."""
    return json.dumps({key: without_secrets(value) for key, value in asdict(said).items()})


def read(lines: Iterable[str]) -> Iterator[Finding | Started]:
    """What `line` wrote; other lines, and one that was cut, are passed over."""
    for text in lines:
        try:
            fields = json.loads(text)
            yield Started(**fields) if "checking" in fields else Finding(**fields)
        except (ValueError, TypeError):
            continue


def without_secrets(text: str) -> str:
    """The text, with the values of secret environment variables taken out: libraries quote headers in their errors."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8:  # a shorter one is a switch, such as `true`
            text = text.replace(value, f"${name}")
    return text


def first_line(error: BaseException) -> str:
    """The kind of an error and the beginning of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
