"""Fixtures that more than one test file needs."""

import gc
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from finllm.run import Run

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
model: {model}
data: {{name: table, path: {data}, split: split}}
lora: {{rank: 4, alpha: 8}}
train: {{method: sft, epochs: 2, global_batch: 8, micro_batch: 4, learning_rate: 1e-2, shared_prefix: "off"}}
tracking: {{wandb: disabled}}
"""
BERT_WORDS = ["profit", "fell", "rose", "was", "flat", "the", "a", "of", "net", "sales"]
WORDS = {"negative": "Losses", "neutral": "Meetings", "positive": "Profits"}


# Tests start a few hundred processes, which mostly import. These look for no garbage, and leave torch's compiler out: nothing of
# ours is compiled, but bitsandbytes would import it, 1.7 s each time.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "tests/site"), os.environ.get("PYTHONPATH")]))
os.environ["TORCHDYNAMO_DISABLE"] = "1"
gc.disable()  # while test files import torch and Transformers, whose million objects stay


def pytest_collection_finish() -> None:
    """Garbage is looked for again, not among what has been imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The public data sets, in $FINLLM_DATA or beside the checkout; a clone has none and skips, CI must have them."""
    folder = Path(os.environ.get("FINLLM_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "phrasebank").is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI needs the data sets, and {folder} does not hold them")
        pytest.skip(f"needs the public data sets; {folder} does not hold them")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama of random weights, and a tokenizer without a pad token, as Llama-3 has none."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from finllm.data.sample import Sample
    from finllm.recipe import Prompt

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    words = [Prompt().instruction, "Text: Sentiment: negative neutral positive"] * 50
    tokenizer.train_from_iterator([*words, *(e.text for e in Sample(name="sample").read()[:200])], trainer)
    folder = tmp_path_factory.mktemp("tiny")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT of random weights, which calls its outputs positive, negative, neutral, as FinBERT does."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("finbert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *BERT_WORDS]))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), model_max_length=24).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=15, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, id2label={0: "positive", 1: "negative", 2: "neutral"},
        label2id={"positive": 0, "negative": 1, "neutral": 2}, initializer_range=0.6,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def recipe(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven batches of eight that a tiny model can learn, one of them not full."""
    from finllm.data.sample import Sample

    folder = tmp_path_factory.mktemp("recipe")
    rows = []
    for i, example in enumerate(Sample(name="sample", kind="plain").read()[:64]):
        label = list(WORDS)[i % 3]
        text = f"{WORDS[label]} today. {example.text}"
        rows.append({"text": text, "label": label, "split": "train" if i < 52 else "valid" if i < 58 else "test"})
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(model=tiny_model, data=data))
    return path


@pytest.fixture(scope="session")
def train() -> Callable[..., Run]:
    """Trains a recipe in this process, in a new run folder of `runs`."""
    import signal

    from finllm import train as command

    def run(recipe: Path, runs: Path, *overrides: str) -> Run:
        before, command.RUNS = command.RUNS, runs
        try:
            assert command.main([str(recipe), *overrides]) == 0
        finally:
            command.RUNS = before
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
                signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        return Run(max(runs.iterdir(), key=lambda path: path.stat().st_mtime))

    return run


@pytest.fixture(scope="session")
def tiny_run(train: Callable[..., Run], recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run called `tiny` whose adapter has learnt something, evaluated."""
    from finllm import evaluate

    run = train(recipe, tmp_path_factory.mktemp("runs"), "train.epochs=8", "lora.rank=16", "lora.alpha=32")
    assert evaluate.main([str(run.folder)]) == 0
    return run


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """A headless Chromium of the system; CI installs Debian's, other machines without one skip.

    Of a module, not of the session: while it lives, this thread has a running event loop.
    """
    from playwright.sync_api import sync_playwright

    if _chromium() is None and os.environ.get("CI") == "true":
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        install = ["apt-get", "install", "-qq", "--yes", "--no-install-recommends", "chromium", "fonts-liberation"]
        subprocess.run(install, check=True, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    program = _chromium()
    if program is None:
        pytest.skip("needs Chromium; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def _chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` run where there is a CUDA device, and are skipped elsewhere."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
