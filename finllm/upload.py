"""Uploading an exported model to the Hugging Face hub, or to whatever $HF_ENDPOINT names."""

import re
from pathlib import Path

from finllm.errors import RunError


def refuse_early(repo: str) -> None:
    """Raise RunError where an upload to `repo` cannot succeed; contacts nothing."""
    from huggingface_hub import constants, get_token

    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", repo, re.ASCII):
        raise RunError(f"--push {repo}: is no name of a repository; write NAME or OWNER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise RunError("--push needs the network, but HF_HUB_OFFLINE is set; unset it")
    if get_token() is None:
        raise RunError("--push needs a token that may write: `hf auth login` stores one, or set $HF_TOKEN")


def endpoint() -> str:
    """Where uploads go."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def push(folder: Path, repo: str) -> str:
    """Upload every file of `folder` as one commit; returns the address.

    A repository that does not exist is made, private; one that exists stays as visible as it is.
    """
    from huggingface_hub import HfApi

    # Of whichever HTTP library this version of the client uses: httpx or httpx2.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # imported there, not declared

    api = HfApi(library_name="finllm")
    try:
        made = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Upload a model trained by FinLLM")
    except (HTTPError, ValueError, OSError) as error:
        first = str(error).strip().split("\n")[0]
        raise RunError(
            f"{repo} could not be uploaded to {endpoint()}: {first}\n"
            f"The files are in {folder}; check the token's rights and the network, then `hf upload {repo} {folder}`"
        ) from error
    return str(made)
