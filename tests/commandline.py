"""The command as tests start it, in a process of its own."""

import os
import subprocess
import sys

FINLLM = ("env", "--default-signal=HUP", sys.executable, "-P", "-m", "launch.cli")
"""SIGHUP as it is by default, also where tests run under nohup."""


def finllm(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs it to its end."""
    return subprocess.run(
        [*FINLLM, *arguments], input=stdin, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=180, check=False,
    )  # fmt: skip
