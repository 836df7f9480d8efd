"""What code and which libraries a run is made with."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

PACKAGES = (
    "finllm", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "scikit-learn", "wandb",
)  # fmt: skip


def commit() -> str:
    """The git commit that this code stands at, `+changes` where files differ, or empty outside a checkout."""
    root = Path(__file__).parent.parent
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return ""
    return head + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False, timeout=20
        )
    except FileNotFoundError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on, as installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": sys.version.split()[0], **found}
