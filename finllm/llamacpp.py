"""GGUF files, written by llama.cpp's own converter, which the user brings, and read back by Transformers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

from finllm.errors import RunError
from finllm.models import Loaded

SCRIPT = "convert_hf_to_gguf.py"
VARIABLE = "LLAMA_CPP"
TYPES = {"bf16": "bf16", "fp32": "f32"}
"""What the converter calls our types of weights."""
LAST_LINES = 5


def find_converter(given: Path | None) -> tuple[str, ...]:
    """The command of llama.cpp's converter: `given`, else of $LLAMA_CPP, else on the PATH; raises RunError without one.

    Both may name the script or the folder that it stands in.
    """
    variable = os.environ.get(VARIABLE)
    named = given or (Path(variable) if variable else None)
    if named is None:
        found = shutil.which(SCRIPT)
        if found is None:
            raise RunError(
                f"GGUF files are written by llama.cpp's {SCRIPT}, which is not on the PATH. Get llama.cpp "
                f"(git clone https://github.com/ggml-org/llama.cpp), then give --converter or ${VARIABLE} its folder"
            )
        named = Path(found)
    script = named / SCRIPT if named.is_dir() else named
    if not script.is_file():
        source = "--converter" if given else f"${VARIABLE}"
        raise RunError(f"{source} is {named}, where there is no {SCRIPT}; give the folder of llama.cpp")
    return (sys.executable, str(script)) if script.suffix == ".py" else (str(script),)


def convert(tool: tuple[str, ...], model: Path, target: Path, dtype: Literal["bf16", "fp32"]) -> None:
    """Write the model folder as one GGUF file of the same type of weights; raises RunError with the converter's words."""
    command = [*tool, str(model), "--outfile", str(target), "--outtype", TYPES[dtype]]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0 or not target.is_file():
        said = "\n".join((answer.stderr or answer.stdout).strip().splitlines()[-LAST_LINES:])
        raise RunError(
            f"llama.cpp's converter ended with status {answer.returncode}:\n{said}\n"
            "It may not know this kind of model, or lack a package: see requirements.txt beside it"
        )


def load(file: Path, tokenizer: Path, *, dtype: Literal["bf16", "fp32"], device: str) -> Loaded:
    """The model of a GGUF file, with the tokenizer of the folder that it was made from."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=kind)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RunError(f"{file.name} cannot be read back to be checked: {error}") from error
    return Loaded(model.to(device).eval(), AutoTokenizer.from_pretrained(tokenizer))
