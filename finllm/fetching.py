"""How far a download is, by what has arrived on the disk: the programs that fetch tell nobody but a terminal."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from finllm.progress import steps
from finllm.run import Run

EVERY_SECONDS = 0.5
MB = 1_000_000


@contextmanager
def shown(stage: str, folder: Path, total_bytes: Callable[[], int], run: Run | None) -> Iterator[None]:
    """Count the megabytes that arrive below `folder` while the body lasts; `total_bytes` is asked once, 0 is unknown.

    Nothing is counted before something has arrived, so that what is at hand already is just `stage`.
    """
    before, ended = _size(folder), threading.Event()

    def count() -> None:
        total, counter = 0, None
        with contextlib.ExitStack() as stack:
            while not ended.wait(EVERY_SECONDS):
                arrived = _size(folder) - before
                if arrived < MB:
                    continue
                if counter is None:
                    total = total_bytes() // MB
                    counter = stack.enter_context(steps(stage, total, "MB", run))
                counter.at(min(arrived // MB, total or arrived // MB))

    thread = threading.Thread(target=count, name="finllm-fetching", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _size(folder: Path) -> int:
    """Bytes of all files below a folder; what vanishes meanwhile counts as nothing."""
    total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, file)).st_size  # noqa: PTH118 - a link counts as itself
    return total


def hub_folder(model: str) -> Path:
    """Where huggingface_hub keeps the files of a model."""
    from huggingface_hub import constants, file_download

    return Path(constants.HF_HUB_CACHE) / file_download.repo_folder_name(repo_id=model, repo_type="model")


def hub_bytes(model: str, revision: str | None) -> int:
    """Of the weights that Transformers takes from the hub; 0 where the hub does not say."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=10).siblings or []
    except Exception:  # noqa: BLE001 - only for show: what is wrong with the hub, the download itself will say
        return 0
    sizes = {file.rfilename: file.size or 0 for file in files}
    for beginning, end in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        found = [size for name, size in sizes.items() if name.startswith(beginning) and name.endswith(end)]
        if found:
            return sum(found)
    return 0
