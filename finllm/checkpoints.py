"""Checkpoints that can be trusted: what a whole one holds is written down, and looked at before a run goes on from it."""

import hashlib
import json
import re
import shutil
from pathlib import Path

from finllm.files import write_text
from finllm.run import COMPLETE, Run

DAMAGED = "damaged-"
FULL_BYTES = 2**20
"""A disk with less than this left is full."""


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint complete, with the size and SHA-256 of each of its files."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE)
    listed = {str(path.relative_to(checkpoint)): [path.stat().st_size, _digest(path)] for path in files}
    write_text(checkpoint / COMPLETE, json.dumps(listed, indent=1) + "\n")


def fault(checkpoint: Path) -> str:
    """What keeps a run from going on from this checkpoint, or nothing."""
    marker = checkpoint / COMPLETE
    if not marker.is_file():
        return "was not written whole"
    try:
        listed = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"is damaged: {COMPLETE} cannot be read ({error})"
    if not isinstance(listed, dict):
        return f"is damaged: {COMPLETE} does not list its files"
    for name, (size, digest) in listed.items():
        path = checkpoint / name
        if not path.is_file():
            return f"is damaged: {name} is missing"
        if path.stat().st_size != size:
            return f"is damaged: {name} has {path.stat().st_size} bytes, and was written with {size}"
        if _digest(path) != digest:
            return f"is damaged: the contents of {name} have changed"
    return ""


def set_faulty_aside(run: Run) -> list[str]:
    """Take what cannot be gone on from out of the way, newest first, down to the first sound one; says what and why.

    One that was never complete is deleted, and a damaged one renamed.
    """
    said: list[str] = []
    numbered = {int(path.name.rpartition("-")[2]): path for path in run.checkpoints.glob("checkpoint-*")}
    for step in sorted(numbered, reverse=True):
        checkpoint = numbered[step]
        found = fault(checkpoint)
        if not found:
            if said:
                said.append(f"going on from {checkpoint.name}")
            return said
        said.append(f"{checkpoint.name} {found}")
        if (checkpoint / COMPLETE).exists():
            aside = checkpoint.with_name(DAMAGED + checkpoint.name)
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
        else:
            shutil.rmtree(checkpoint)
    return [*said, "starting from the beginning"] if said else said


def full_disk(run: Run, error: BaseException) -> str:
    """What to say of an error that means that the run's disk is full, which libraries tell in many ways; empty for others."""
    told = re.search("no space left|quota exceeded", str(error), re.IGNORECASE)
    if not isinstance(error, Exception) or not run.folder.is_dir():
        return ""
    if not told and shutil.disk_usage(run.folder).free >= FULL_BYTES:
        return ""
    said = f"{type(error).__name__}: {error}"
    return f"{run.folder}: the disk is full ({said}); free some, then `finllm resume` goes on from what is whole"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
