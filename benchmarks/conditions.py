"""What the GPU benchmarks share: the model that they measure, what its arithmetic takes, and where they ran."""

import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

GFLOP_TRAINED = 28.17
"""A token forward and backward through 6.98 G weights of the layers without checkpointing: 4 FLOP each, LoRA 6."""
GFLOP_SCORED = 13.96
"""A token forward: 2 FLOP for each weight of the layers."""
PEAK_TFLOP = 790
"""An 8192 x 8192 x 8192 bf16 matrix product on one H200 with random data."""
SHARED, OWN = 26, 36.9
"""Tokens of the instruction, and on average of a training example behind it (SmolLM2's tokenizer)."""
SHAPE = {
    "vocab_size": 49_152, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32_768, "sliding_window": None,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Mistral-7B-v0.1 with the vocabulary of the tokenizer that is at hand."""


def limit(gflop: float, own: float = OWN, examples: int = 32) -> float:
    """Examples a second at most, `examples` of them to one instruction."""
    return 1000 * PEAK_TFLOP / (gflop * (own + SHARED / examples))


TINY = {**SHAPE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2}  # fmt: skip
"""Two layers, to see whether a benchmark runs at all."""


def make_tiny(folder: Path, tokenizer: Path | None) -> None:
    """A folder with a model of two layers in fp32, made on the CPU, unless it is there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig

    from finllm import embedded

    if (folder / "config.json").is_file():
        return
    torch.manual_seed(0)
    AutoTokenizer.from_pretrained(tokenizer or embedded.folder()).save_pretrained(folder)
    AutoModelForCausalLM.from_config(MistralConfig(**TINY)).save_pretrained(folder)


def make_weights(folder: Path, tokenizer: Path | None, shape: dict[str, Any] = SHAPE) -> None:
    """A folder with a model of the shape, its random weights in bf16, and the tokenizer, unless it is there."""
    if (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file():
        return
    if tokenizer is None:
        raise SystemExit(f"{folder} holds no model; give --tokenizer to make one")
    apart = multiprocessing.get_context("spawn").Process(target=_make, args=(folder, tokenizer, shape))
    apart.start()  # so that this process holds nothing of the GPU
    apart.join()
    if apart.exitcode:
        raise SystemExit(f"{folder} could not be made")


def _make(folder: Path, tokenizer: Path, shape: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(MistralConfig(**shape))
    torch.set_default_dtype(torch.float32)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="5GB")


def first_gpu() -> list[str]:
    """Arguments by which nvidia-smi speaks of the GPU that this process calls its first."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    return [f"--id={visible or 0}"]


def conditions(note: str = "") -> dict[str, Any]:
    """Hardware, versions and date of a measurement."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader", *first_gpu()]
    has_gpu = shutil.which(query[0]) is not None
    gpu = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() if has_gpu else "no GPU"
    packages = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"hardware": gpu, "versions": versions, "date": datetime.now(UTC).date().isoformat(), "note": note}


def results(given: Path | None, name: str, *, tiny: bool) -> Path | None:
    """Where results go: where the caller says, else beside those that are quoted; of a tiny model nowhere."""
    return given or (None if tiny else Path(__file__).parent / "results" / name)


def write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """The rows as a file of JSON; nothing without a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def seconds_of(work: Any, repetitions: int) -> list[float]:
    """Seconds of each repetition, the GPU waited for where there is one."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    found = []
    for _ in range(repetitions):
        wait()
        began = time.monotonic()
        work()
        wait()
        found.append(time.monotonic() - began)
    return found
