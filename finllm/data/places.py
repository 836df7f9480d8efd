"""Where the files of a data set are: the recipe's path, $FINLLM_DATA, ../shared/data beside the checkout, the hub."""

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

from finllm.errors import DataError

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class HubFiles:
    """Files of a data set repository on the Hugging Face hub."""

    repo: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return f"https://huggingface.co/datasets/{self.repo} ({', '.join(self.files)})"


def locate(name: str, path: Path | None, needed: tuple[str, ...], get: str, hub: HubFiles | None = None) -> Path:
    """A folder that holds all `needed` files, or a zip file; `get` says how to come by them.

    A `path` is the only place looked at. Raises DataError that lists every place looked at.
    """
    tried: list[str] = []
    for place in [path] if path else _usual(name, tried):
        fault = _fault(place, needed)
        if fault is None:
            return place
        tried.append(f"{place}: {fault}")
    if hub and not path:
        fetched = _fetch(hub, tried)
        if fetched is not None:
            return fetched
    looked = "\n".join(f"  {line}" for line in tried)
    raise DataError(f"the data set {name} is not at hand; looked at\n{looked}\n{get}")


def read(place: Path, file: str) -> bytes:
    """The bytes of `file` in a folder, or of the file of that name wherever it is in a zip file."""
    if place.is_dir():
        return (place / file).read_bytes()
    with zipfile.ZipFile(place) as archive:
        return archive.read(next(member for member in archive.namelist() if _named(member, file)))


def _usual(name: str, tried: list[str]) -> list[Path]:
    beside = CHECKOUT.parent / "shared" / "data" / name
    folder = os.environ.get("FINLLM_DATA")
    if folder:
        return [Path(folder).expanduser().absolute() / name, beside]
    tried.append(f"$FINLLM_DATA/{name}: FINLLM_DATA is not set")
    return [beside]


def _fault(place: Path, needed: tuple[str, ...]) -> str | None:
    """Why the needed files cannot be read at this place; None where they can."""
    if place.is_dir():
        present = {file.name for file in place.iterdir()}
    elif zipfile.is_zipfile(place):
        with zipfile.ZipFile(place) as archive:
            present = {file for file in needed if any(_named(member, file) for member in archive.namelist())}
    else:
        return "neither a folder nor a zip file" if place.exists() else "does not exist"
    missing = [file for file in needed if file not in present]
    return f"has no {', '.join(missing)}" if missing else None


def _named(member: str, file: str) -> bool:
    # A zip made on a Mac holds a second, empty-looking entry for each file in __MACOSX.
    return member.rsplit("/", 1)[-1] == file and not member.startswith("__MACOSX")


def _fetch(hub: HubFiles, tried: list[str]) -> Path | None:
    """The fetched zip file, or the folder of the fetched files; None, and why, where the hub cannot be had."""
    import httpx
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    # Read here as well as in huggingface_hub, which looks at it only once, when it is imported.
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}
    try:
        paths = [
            Path(hf_hub_download(hub.repo, file, repo_type="dataset", local_files_only=offline)) for file in hub.files
        ]
    except (OSError, httpx.HTTPError, HfHubHTTPError) as error:
        why = (
            "not in the cache, and not asked because HF_HUB_OFFLINE is set"
            if offline
            else f"{type(error).__name__}: {error}".split("\n")[0]
        )
        tried.append(f"{hub}: {why}")
        return None
    return paths[0] if zipfile.is_zipfile(paths[0]) else paths[0].parent
