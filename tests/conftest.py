"""Fixtures that more than one test file needs."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The public data sets, in $FINLLM_DATA or beside the checkout; a clone has none and skips, CI must have them."""
    folder = Path(os.environ.get("FINLLM_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "phrasebank").is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI needs the data sets, and {folder} does not hold them")
        pytest.skip(f"needs the public data sets; {folder} does not hold them")
    return folder
