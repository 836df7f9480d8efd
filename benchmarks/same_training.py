"""Our trainer and TRL's own, set up for the same run: model, adapter, seed, settings, and order of the examples."""

import tempfile
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from finllm import models
from finllm.data.sample import Sample
from finllm.example import Example
from finllm.models import Loaded
from finllm.prompts import Prompter
from finllm.recipe import Lora, Prompt
from finllm.shared_prefix import IGNORED
from finllm.training.batches import GlobalBatches, Row, encode, stream
from finllm.training.sft import Sft
from finllm.training.watching import LossWatch

STEP = 16
"""Examples in an optimizer step."""
SEED = 42
LORA = Lora(rank=16, alpha=32)


def examples(count: int) -> list[Example]:
    """The first training sentences of the shipped sample."""
    return [e for e in Sample(name="sample").read() if e.split == "train"][:count]


def adapted(loaded: Loaded) -> Any:
    """The model with fresh adapters, the same for both."""
    return models.with_adapter(loaded.model, LORA, SEED).train()


def settings(steps: int, **own: Any) -> SFTConfig:
    """What both have in common: fp32, AdamW at 1e-3 falling to 0, every step's loss logged, nothing saved."""
    return SFTConfig(
        output_dir=tempfile.mkdtemp(prefix="finllm-benchmark-"),
        max_steps=steps,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        seed=SEED,
        bf16=False,  # both in fp32, so that losses can be compared
        use_cpu=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **own,
    )


def ours(loaded: Loaded, given: Sequence[Example], steps: int, callbacks: Sequence[Any]) -> Sft:
    """FinLLM's trainer on streams; train it inside `shared_prefix.attending(trainer.model)`."""
    return Sft(
        model=adapted(loaded),
        processing_class=loaded.tokenizer,
        args=settings(
            steps,
            per_device_train_batch_size=STEP,
            gradient_checkpointing=False,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
        ),
        rows=encode(given, Prompter(loaded.tokenizer, Prompt())),
        collate=stream,
        losses=LossWatch(given),
        validation=None,
        callbacks=list(callbacks),
    )


def trls(
    loaded: Loaded, given: Sequence[Example], steps: int, callbacks: Sequence[Any], *, micro_batch: int, **own: Any
) -> SFTTrainer:
    """TRL's trainer with its own tokenisation, collator and loss on prompt and completion, all else its defaults.

    Raises AssertionError if TRL makes other tokens or labels of the texts than we do.
    """
    rows = in_order(encode(given, Prompter(loaded.tokenizer, Prompt())), steps)
    prompter = Prompter(loaded.tokenizer, Prompt())
    texts = [
        {"prompt": prompter.string(given[row.index].text), "completion": f" {given[row.index].label}"} for row in rows
    ]
    trainer = SFTTrainer(
        model=adapted(loaded),
        processing_class=loaded.tokenizer,
        args=settings(
            steps,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=STEP // micro_batch,
            train_sampling_strategy="sequential",  # the rows stand in our order
            **own,
        ),
        train_dataset=Dataset.from_list(texts),
        callbacks=list(callbacks),
    )
    for row, made in zip(rows, trainer.train_dataset, strict=True):
        expected = [*row.prompt, *row.answer]
        assert made["input_ids"] == expected, (made["input_ids"], expected)
        assert made["labels"] == [IGNORED] * len(row.prompt) + row.answer, made
    return trainer


def in_order(rows: Sequence[Row], steps: int) -> list[Row]:
    """The rows of all steps, as our trainer takes them, epoch after epoch."""
    assert len(rows) % STEP == 0, len(rows)
    order = GlobalBatches(
        [row.tokens for row in rows], micro_batch=STEP, accumulation=1, rank=0, processes=1, seed=SEED
    )
    taken: list[Row] = []
    epoch = 0
    while len(taken) < steps * STEP:
        order.set_epoch(epoch)
        taken += [rows[index] for batch in order for index in batch]
        epoch += 1
    return taken[: steps * STEP]
