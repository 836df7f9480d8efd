"""`finllm export`: a trained run as files for other programs, and on the hub."""

import os
import sys
from pathlib import Path
from typing import Literal

from finllm.errors import RunError
from finllm.run import find
from launch.endings import DONE, FAILED
from launch.place import WAITING


def export(
    *,
    run: str,
    runs: Path,
    form: Literal["merged", "adapter", "gguf"],
    to: Path | None,
    push: str | None,
    converter: Path | None,
    yes: bool,
) -> int:
    """Write a trained run as files, check them against its own answers, and upload them where asked."""
    found = find(run, runs)
    os.environ.setdefault("OMP_WAIT_POLICY", WAITING)  # read when torch is imported
    from finllm import export as exporting
    from finllm import upload

    if push is not None:
        if not yes and not sys.stdin.isatty():
            raise RunError("--push asks before it uploads, and there is no terminal to ask at; add --yes")
        upload.refuse_early(push)
    target = (to or found.folder / "export" / form).absolute()
    try:
        made = exporting.export(found, form, target, converter=converter)
    except exporting.AnswersDifferError as error:
        print(f"finllm: {error}", file=sys.stderr)
        return FAILED
    print(made.folder, exporting.said(made.check), sep="\n")
    if push is None:
        return DONE
    if not yes and not _agreed(made.folder, push, upload.endpoint()):
        print(f"not uploaded; later: hf upload {push} {made.folder}")
        return DONE
    print(f"uploaded: {upload.push(made.folder, push)}")
    return DONE


def _agreed(folder: Path, repo: str, endpoint: str) -> bool:
    """Whether the person at the terminal wants the upload; everything but y and yes is no."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(
        f"\n{size / 1e6:,.0f} MB go to {endpoint}/{repo}: a new repository is private, an existing one stays as it is."
    )
    print(f"Read {folder / 'README.md'} first: it names the licences of the base model and of the data.")
    try:
        return input("Upload? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
