"""Files that a reader finds whole, whenever it looks and whatever the disk does."""

import errno
import json
import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from finllm.errors import RunError


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the whole new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not _written_over(path, text.encode()):
            raise


def _written_over(path: Path, text: bytes) -> bool:
    """Put a text in the place of the one before, which needs no room on a full disk; False where it is too long.

    Readers see one of the two, since it is one call. Spaces fill what is left of a longer text.
    """
    try:
        with path.open("r+b", buffering=0) as file:
            before = os.fstat(file.fileno())
            fits = len(text) <= before.st_blocks * 512
            return fits and file.write(text.ljust(before.st_size)) >= len(text)
    except OSError:
        return False


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file; raises RunError where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing; is {path.parent} a run folder?") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); restore it, or start the run anew") from error


M = TypeVar("M", bound=BaseModel)


def read_model(path: Path, model: type[M]) -> M:
    """The JSON file as `model`; raises RunError where it is missing, damaged, or of another version of FinLLM."""
    try:
        return model.model_validate(read_json(path))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3])
        raise RunError(
            f"{path} is not as this version of FinLLM writes it ({faults}); use the version that made the run, or "
            "launch its recipe.yaml anew"
        ) from error
