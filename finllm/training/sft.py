"""Supervised fine-tuning: TRL's trainer with our batches, loss on answer tokens only, and validation by the scorer."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from trl import SFTTrainer

from finllm import last_layer
from finllm.example import Example
from finllm.fast.engine import Engine
from finllm.prompts import Prompter
from finllm.recipe import Recipe
from finllm.shared_prefix import IGNORED
from finllm.training import batches, handwritten, sharded
from finllm.training.batches import EpochLoader, Row
from finllm.training.sharded import Shared
from finllm.training.watching import LossWatch, OnValidation, validated

Collate = Callable[[Sequence[Row | None]], dict[str, Any]]
"""Makes a batch of rows: batches.pad, or batches.stream."""


class Sft(Shared, SFTTrainer):  # type: ignore[misc]  # TRL ships no types
    """TRL's SFTTrainer, less its host synchronisations, with an order of examples that any machine repeats."""

    pad, stream, packed = staticmethod(batches.pad), staticmethod(batches.stream), staticmethod(handwritten.packed)

    def __init__(
        self,
        *,
        rows: Sequence[Row],
        collate: Collate,
        losses: LossWatch,
        validation: OnValidation | None,
        engine: Engine | None = None,
        **trl: Any,
    ) -> None:
        """With an engine, its hand-written passes take the place of the model's own."""
        self._rows, self._collate, self._losses, self._validation = rows, collate, losses, validation
        self._engine = engine
        lengths = {"input_ids": [[0]] * len(rows), "labels": [[0]] * len(rows)}  # TRL counts these; ours are loaded
        super().__init__(
            train_dataset=Dataset.from_dict(lengths),
            eval_dataset=Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]}) if validation else None,
            data_collator=collate,
            **trl,
        )
        for parameter in self.model.parameters():
            if parameter.requires_grad:  # TRL makes the adapters of a quantised model bf16, too coarse for Adam's steps
                parameter.data = parameter.data.float()

    @staticmethod
    def encode(examples: Sequence[Example], prompter: Prompter, recipe: Recipe) -> list[Row]:
        """The examples as rows."""
        return batches.encode(examples, prompter, recipe)

    def get_train_dataloader(self) -> EpochLoader:
        """Our own order; the trainer moves the tensors to the device."""
        return batches.loader(self._rows, self._collate, self)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The batches of one optimizer step and their targets, counted without waiting for the GPU."""
        if self._engine is None:
            both: tuple[list[Any], Any] = super().get_batch_samples(epoch_iterator, num_batches, device)
            return both
        found = list(islice(epoch_iterator, num_batches))
        (count,) = sharded.over_all([sum(batch["meta"]["targets"] for batch in found)], self.accelerator.device)
        return found, count

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """What the step's loss is divided by: its learnt tokens, or the sum of their weights, over all processes."""
        if self._rows[0].weights is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        total = sum(batch["meta"]["weights"].sum() for batch in batch_samples if "weights" in batch["meta"])
        here = torch.as_tensor(total, dtype=torch.float32, device=device)
        return self.accelerator.gather(here).sum()

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward pass of one micro-batch; returns its share of the step's loss."""
        if self._engine is None:
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        if inputs["stream"] is None:  # the end of an epoch can leave a pass without examples
            return torch.zeros((), device=self.args.device)
        loss = self._engine.loss_and_gradients(inputs["stream"], 1 / num_items_in_batch)
        self._losses.add(loss, inputs["meta"])
        whole: torch.Tensor = loss * self.accelerator.num_processes
        return whole

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        """All gradients are one tensor, if the engine made them."""
        if self._engine is None:
            norm: torch.Tensor = super()._clip_grad_norm(model)
            return norm
        return self._engine.clip(self.args.max_grad_norm)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Mean cross-entropy of the answer tokens of the whole optimizer step, over all processes."""
        assert not return_outputs, "validation goes through the scorer, which needs no outputs of this"
        meta = inputs.pop("meta")
        loss = _sum_of_losses(model, inputs, meta.get("weights"), fused=not self.weights_are_apart) / num_items_in_batch
        self._losses.add(loss, meta)
        whole: torch.Tensor = loss * self.accelerator.num_processes  # DDP averages over processes; the count is of all
        return whole

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """No card beside the checkpoints: TRL's knows nothing of data and results."""

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validation by label scoring: the figures that choose the best checkpoint."""
        return validated(self, self._validation)


def _sum_of_losses(
    model: Any, inputs: dict[str, Any], weights: torch.Tensor | None, *, fused: bool = True
) -> torch.Tensor:
    """Cross-entropy in nats, summed over the learnt tokens of a batch; the head runs on the rows that predict them.

    `weights` are those of the learnt tokens, in their order; None is 1 for all. TRL's head is `fused` where it can be.
    """
    labels = inputs["labels"]
    if len(labels) == 1 and (
        labels.device.type == "cpu" or not fused
    ):  # TRL's fused head leaves rows out on a GPU only
        predicting = (labels[0, 1:] != IGNORED).nonzero().squeeze(1)
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        with last_layer.only(model, predicting):
            logits = model(**rest, use_cache=False, logits_to_keep=predicting).logits[0]  # (answer tokens, vocabulary)
        losses = torch.nn.functional.cross_entropy(logits.float(), labels[0, predicting + 1], reduction="none")
        return losses.sum() if weights is None else losses @ weights
    log_p = (  # (rows, longest - 1), 0 where nothing is learnt
        model(**inputs, use_cache=False, fused_lm_head=True).log_probs
        if fused
        else sharded.log_probabilities(model, inputs)
    )
    total: torch.Tensor = log_p.sum() if weights is None else log_p[labels[:, 1:] != IGNORED] @ weights
    return -total
