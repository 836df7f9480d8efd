"""Direct preference optimisation: TRL's trainer with our pairs, on prompts computed once, and a reference computed before.

The reference is the policy before its first step. Its log-probabilities are all that is ever needed of it, so they are
computed once; neither a second model nor TRL's second adapter, which some versions of Transformers restore instead of
the policy, is kept.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from datasets import Dataset
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from finllm import last_layer
from finllm.errors import RunError
from finllm.fast import pairs as fast_pairs
from finllm.fast.engine import Engine, pinned, ready
from finllm.training import batches, pairs, sharded
from finllm.training.handwritten import MULTIPLE
from finllm.training.pairs import PairRow
from finllm.training.preferring import MEASURED, Loss, judge
from finllm.training.sharded import Shared
from finllm.training.watching import LossWatch, OnValidation, validated

REFERENCE = "ref"
"""TRL's name for the adapter that it copies."""


class Dpo(Shared, DPOTrainer):  # type: ignore[misc]  # TRL ships no types
    """TRL's DPOTrainer, with the loss of whole steps, an order of pairs that any machine repeats, and no copy of anything."""

    loss_is_scaled_for_ga = True
    pad, stream, encode = staticmethod(pairs.pad), staticmethod(pairs.stream), staticmethod(pairs.encode)

    def __init__(
        self,
        *,
        rows: Sequence[PairRow],
        collate: Any,
        losses: LossWatch,
        validation: OnValidation | None,
        engine: Engine | None = None,
        **trl: Any,
    ) -> None:
        """With an engine, its hand-written passes take the place of the model's own."""
        self._rows, self._collate, self._engine = list(rows), collate, engine
        self._losses, self._validation = losses, validation
        self._loss = loss_of(trl["args"])
        self._measured: Tensor | None = None
        before = {name: p.data for name, p in trl["model"].named_parameters() if p.requires_grad}
        nothing = Dataset.from_dict({"prompt_ids": [[0]] * len(rows)})
        super().__init__(
            train_dataset=nothing, eval_dataset=nothing if validation else None, data_collator=collate, **trl
        )
        if REFERENCE in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter(REFERENCE)
        for name, parameter in self.model.named_parameters():
            if name in before:  # TRL makes the adapters of a quantised model bf16: another policy than its reference
                parameter.data = before[name].float()

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        """As it is: the pairs are tokens already."""
        return dataset

    def train(self, *arguments: Any, **named: Any) -> Any:
        """All steps, after the reference has been asked."""
        self._rows = self._with_reference()
        return super().train(*arguments, **named)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The policy of a checkpoint; raises RunError where another adapter, or none, was restored."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:  # its parameters are parts of several
            refuse_another_policy(self.model, Path(resume_from_checkpoint))

    def _with_reference(self) -> list[PairRow]:
        """The pairs with their log-probabilities under the model as it is, each process having asked for its share."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine, size = self._rows[rank::processes], self.args.per_device_train_batch_size
        given = (self._collate(mine[start : start + size]) for start in range(0, len(mine), size))
        training = self.model.training
        self.model.eval()  # checkpointing is for backward passes
        with torch.no_grad(), self.compute_loss_context_manager():
            found = [self._log_probabilities(self.model, batch).view(2, -1) for batch in given]
        self.model.train(training)
        shares = torch.cat(found, dim=1).T.tolist() if found else []
        gathered: list[Any] = [shares]
        if processes > 1:
            gathered = [None] * processes
            dist.all_gather_object(gathered, shares)
        rows = list(self._rows)
        for other, part in enumerate(gathered):
            for row, (chosen, rejected) in zip(range(other, len(rows), processes), part, strict=True):
                rows[row] = replace(rows[row], reference=(chosen, rejected))
        return rows

    def get_train_dataloader(self) -> batches.EpochLoader:
        """Our own order; the trainer moves the tensors to the device."""
        return batches.loader(self._rows, self._collate, self)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, _device: Any) -> tuple[list[Any], Any]:
        """The batches of one optimizer step, and the number of its pairs and their chosen tokens, over all processes."""
        found = list(islice(epoch_iterator, num_batches))
        counts = [sum(one) for one in zip(*(batch["meta"]["learnt"] for batch in found), strict=True)] or [0, 0]
        return found, tuple(sharded.over_all(counts, self.accelerator.device))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward pass of one micro-batch; returns its share of the step's loss."""
        if self._engine is None:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        if inputs["stream"] is None:  # the end of an epoch can leave a pass without pairs
            return torch.zeros((), device=self.args.device)
        figures = inputs["figures"].to(self.args.device, non_blocking=True)
        objective = partial(self._objective, figures=figures, learnt=num_items_in_batch)
        loss = self._engine.preference_gradients(inputs["stream"], objective)
        self._losses.add(loss, inputs["meta"])
        whole: Tensor = loss * self.accelerator.num_processes
        return whole

    def _objective(self, log_p: Tensor, *, figures: Tensor, learnt: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The loss of log-probabilities, and what flows back into them."""
        with torch.enable_grad():
            leaf = log_p.detach().requires_grad_()
            judged = judge(self._loss, leaf, figures.to(leaf.dtype), learnt)
            (into,) = torch.autograd.grad(judged.loss, leaf)
        self._note(judged.measured)
        return judged.loss.detach(), into

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Mean loss of the pairs of the whole optimizer step, over all processes."""
        assert not return_outputs, "validation goes through the scorer, which needs no outputs of this"
        judged = judge(self._loss, self._log_probabilities(model, inputs), inputs["figures"], num_items_in_batch)
        self._note(judged.measured)
        if inputs["meta"]["rows"]:
            self._losses.add(judged.loss, inputs["meta"])
        whole: Tensor = judged.loss * self.accelerator.num_processes  # DDP averages over processes; counts are of all
        return whole

    def _log_probabilities(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Of both answers of each pair, (2 x pairs,) in nats, the chosen ones first."""
        if self._engine is not None:
            return self._engine.log_probabilities_of_pairs(batch["stream"])
        return log_probabilities(model, self._prepare_inputs(batch), fused=not self.weights_are_apart)

    def _note(self, measured: Tensor) -> None:
        self._measured = measured if self._measured is None else self._measured + measured

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With what was measured of the pairs since the last time, as means; only here is the device waited for."""
        if self._measured is not None and "loss" in logs:
            sums = self.accelerator.reduce(self._measured)
            count, *rest = sums.tolist()
            logs |= {name: value / count for name, value in zip(MEASURED, rest, strict=True)}
            self._measured = None
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: Any) -> Tensor:
        """All gradients are one tensor, if the engine made them."""
        if self._engine is None:
            norm: Tensor = super()._clip_grad_norm(model)
            return norm
        return self._engine.clip(self.args.max_grad_norm)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """No card beside the checkpoints: TRL's knows nothing of data and results."""

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validation by label scoring: the figures that choose the best checkpoint."""
        return validated(self, self._validation)

    @staticmethod
    def packed(rows: Sequence[PairRow | None], *, shared: int, device: str) -> dict[str, Any]:
        """A micro-batch for the hand-written passes; `stream` is None where there are no pairs."""
        given = pairs.real(rows)
        batch: dict[str, Any] = {"stream": None, "figures": None, "meta": pairs.meta(given)}
        if not given:
            return batch
        reading = pairs.read(given, shared)
        made = fast_pairs.pack(
            [row.prompt for row in given],
            [(row.chosen, row.rejected) for row in given],
            (reading.predicting, reading.table),
            shared=shared,
            multiple=MULTIPLE[device],
        )
        made = replace(made, stream=ready(made.stream), table=pinned(made.table))
        return {**batch, "stream": made, "figures": pinned(pairs.figures(given))}


def refuse_another_policy(model: Any, checkpoint: Path) -> None:
    """Raise RunError where the adapter in memory is not that of the checkpoint; says nothing of models without one.

    Transformers 5.19 to 5.21 restore the last adapter of a checkpoint that holds several, and say nothing.
    """
    saved = checkpoint / "adapter_model.safetensors"
    if not saved.is_file():
        return
    found = get_peft_model_state_dict(model)
    differ = [
        name
        for name, value in load_file(saved).items()
        if not torch.equal(found[name].cpu(), value.to(found[name].dtype))
    ]
    if differ:
        raise RunError(
            f"{checkpoint}: Transformers {transformers.__version__} did not restore the policy ({len(differ)} of "
            f"{len(found)} weights differ, the first is {differ[0]}); install 5.23 or newer, then `finllm resume`"
        )


def loss_of(arguments: DPOConfig) -> Loss:
    """TRL's arguments as the loss that they ask for: one kind, perhaps with `sft` beside it."""
    kind, *others = arguments.loss_type
    first, *weights = arguments.loss_weights or [1.0] * len(arguments.loss_type)
    assert others in ([], ["sft"]), others
    assert first == 1.0, arguments.loss_weights
    return Loss(kind, arguments.beta, sum(weights))


def log_probabilities(model: Any, batch: dict[str, Any], *, fused: bool = True) -> Tensor:
    """Of both answers of each pair, (2 x pairs,) in nats, by the model's own passes over rows or a stream."""
    inputs = batch["inputs"]
    if "read" not in batch:
        if not fused:
            return sharded.log_probabilities(model, inputs).sum(dim=1)
        found: Tensor = model(**inputs, use_cache=False, fused_lm_head=True).log_probs.sum(dim=1)
        return found
    places, tokens, sequences = batch["read"]
    predicting = batch["predicting"]
    with last_layer.only(model, predicting):
        logits = model(**inputs, use_cache=False, logits_to_keep=predicting).logits[0]  # (places, vocabulary)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p: Tensor = wide.log_softmax(-1)[places, tokens]
    return log_p.new_zeros(2 * batch["figures"].shape[1]).index_add(0, sequences, log_p)
