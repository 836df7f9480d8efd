"""How to train: what a recipe says under `train`, one type for each method."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from finllm.data.preferences import PairSource
from finllm.data.spec import AbsolutePath
from finllm.yamlfile import Spec, listed

Share = Annotated[float, Field(ge=0, le=1)]


class Training(Spec):
    """What every training method needs."""

    epochs: float = Field(default=3, gt=0)
    """Passes over the training part; 0.5 is half of one."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps although epochs are left; null is never."""
    global_batch: int = Field(default=16, ge=1)
    """Examples in one optimizer step, over all GPUs; micro-batch and accumulation follow from it."""
    micro_batch: int | Literal["auto"] = "auto"
    """Examples in one forward pass on one GPU."""
    learning_rate: float = Field(default=2e-4, gt=0, lt=1)
    """The highest, after warm-up. Shipped recipes have 2e-4 for 7B and 8B models, 4.5e-4 to 2e-3 for SmolLM2-135M."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """How the learning rate goes on after warm-up: to 0, or as it is."""
    warmup_share: Share = 0.03
    """Share of all steps in which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW (arXiv 1711.05101), on all that is trained."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """A longer gradient is scaled down to this norm."""
    optimizer: Literal["adamw", "paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit"] = "adamw"
    """adamw keeps its state on the device; the paged ones of bitsandbytes move it to host memory (GPU only)."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Compute activations again in the backward pass: slower, much less memory. auto: where memory needs it."""
    shared_prefix: Literal["auto", "on", "off"] = "auto"
    """Compute the tokens that all prompts begin with once for a micro-batch; auto: wherever that is exact."""
    hand_written: Literal["auto", "on", "off"] = "auto"
    """Use FinLLM's own forward and backward passes, on GPUs in bf16; auto: wherever they know the model's layers."""
    seed: int = Field(default=42, ge=0)
    """Order of the examples, initial adapters, dropout."""
    evals_per_epoch: int = Field(default=1, ge=1)
    """Validation loss is measured, and a checkpoint written, so often."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after so many validations without a better loss; null is never."""
    keep_checkpoints: int = Field(default=2, ge=2)
    """The best and the newest are always among them."""

    @model_validator(mode="after")
    def _agrees(self) -> "Training":
        if isinstance(self.micro_batch, int) and self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}; write auto, or a number from 1")
        if isinstance(self.micro_batch, int) and self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch is {self.global_batch}, which micro_batch {self.micro_batch} does not divide; "
                f"try global_batch {-(-self.global_batch // self.micro_batch) * self.micro_batch}"
            )
        return self


class Explanations(Spec):
    """Learn the reason for a label too, where an example gives one; the label comes first, so its score stays the same.

    A step's loss is the mean of its tokens' losses by these weights.
    """

    label_weight: float = Field(default=1.0, gt=0)
    """Of each token of a label, and of the end of sequence behind one that is not explained."""
    explanation_weight: float = Field(default=0.1, gt=0)
    """Of each token of an explanation; there are about 25 of them to one of a label."""
    max_tokens: int = Field(default=96, ge=8)
    """Of an explanation, beyond prompt.max_tokens; a longer one is cut, and its end not learnt."""


class Sft(Training):
    """Supervised fine-tuning: cross-entropy on the label's tokens and the end of sequence."""

    method: Literal["sft"]
    explanations: Explanations | None = None
    """Learn explanations too; null learns labels alone. `{}` takes the usual weights."""


Smoothing = Annotated[float, Field(ge=0, lt=0.5)]
SMOOTHED = ("sigmoid", "robust")
"""Losses that know the probability that a pair is the wrong way round."""


class Dpo(Training):
    """Direct preference optimisation (arXiv 2305.18290) on pairs of answers; a row of a batch is a pair."""

    method: Literal["dpo"]
    epochs: float = Field(default=1, gt=0)
    """Passes over the pairs; 0.5 is half of one."""
    learning_rate: float = Field(default=5e-6, gt=0, lt=1)
    """The highest, after warm-up."""
    pairs: Annotated[
        tuple[PairSource, ...],
        BeforeValidator(listed, json_schema_input_type=str | PairSource | tuple[str | PairSource, ...]),
    ] = Field(min_length=1)
    """One source of pairs or several; there is no default."""
    init: AbsolutePath | None = None
    """The SFT run whose adapter is trained on, and is the reference; null: a new adapter, and the base model."""
    loss: Literal["sigmoid", "robust", "hinge", "ipo", "apo_zero", "sft"] = "sigmoid"
    """sigmoid is DPO's own (with label smoothing, cDPO's); all are as in TRL. sft is cross-entropy of the chosen alone."""
    beta: float = Field(default=0.1, gt=0)
    """How dear it is to leave the reference; higher stays nearer. For ipo, its tau."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy of the chosen answers beside it (RPO, arXiv 2404.19733)."""
    label_smoothing: Smoothing = 0.0
    """Probability that a pair is the wrong way round."""
    band_smoothing: dict[str, Smoothing] = Field(default={})
    """The same for texts of a band of annotator agreement, such as `{"66-75": 0.3}`."""

    @model_validator(mode="after")
    def _smooths(self) -> "Dpo":
        if self.loss not in SMOOTHED and (self.label_smoothing or any(self.band_smoothing.values())):
            raise ValueError(f"loss {self.loss} has no label smoothing; write 0, or one of {', '.join(SMOOTHED)}")
        if self.loss == "sft" and self.sft_weight:
            raise ValueError("loss is sft already, so sft_weight must be 0")
        return self
