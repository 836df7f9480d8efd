"""The loss of preferences, of the log-probabilities of both answers: the same for the model's own passes and ours."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

MEASURED = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
)  # fmt: skip
"""What is told of a step besides its loss, as TRL names it; means over pairs."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Which loss, in TRL's words."""

    kind: Literal["sigmoid", "robust", "hinge", "ipo", "apo_zero", "sft"] = "sigmoid"
    beta: float = 0.1
    sft_weight: float = 0.0
    """Of the cross-entropy of the chosen answers, a mean over their tokens."""


@dataclass(frozen=True, slots=True)
class Judged:
    """The loss of a batch, and what is told of it."""

    loss: Tensor
    measured: Tensor
    """(1 + MEASURED,): the number of pairs, and sums over them."""


def judge(spec: Loss, log_p: Tensor, figures: Tensor, learnt: tuple[int, int]) -> Judged:
    """The batch's part in the mean loss of a whole step, which has `learnt` pairs and tokens in chosen answers.

    `log_p` (2 x pairs) are those of the chosen answers, then of the rejected; `figures` are those of pairs.FIGURES.
    """
    reference, tokens, smoothing, live = figures[:2], figures[2:4], figures[4], figures[5]
    sequences = log_p.view(2, -1)  # (chosen and rejected, pairs)
    chosen, rejected = ratios = sequences - reference
    sft = -(sequences[0] * live).sum() / learnt[1]
    if spec.kind == "sft":
        loss = sft
    else:
        loss = (_losses(spec, ratios, tokens, smoothing) * live).sum() / learnt[0]
        loss = loss + spec.sft_weight * sft if spec.sft_weight else loss
    with torch.no_grad():
        rewards = spec.beta * ratios
        told = [rewards[0], rewards[1], (chosen > rejected).to(log_p.dtype), rewards[0] - rewards[1], *sequences]
        measured = torch.stack([live.sum(), *((one * live).sum() for one in told)])
    return Judged(loss, measured)


def _losses(spec: Loss, ratios: Tensor, tokens: Tensor, smoothing: Tensor) -> Tensor:
    """The loss of each pair, of log ratios to the reference, (2, pairs)."""
    chosen, rejected = ratios
    apart = spec.beta * (chosen - rejected)
    if spec.kind == "sigmoid":  # arXiv 2305.18290, equation 7; with smoothing, cDPO
        return -(1 - smoothing) * logsigmoid(apart) - smoothing * logsigmoid(-apart)
    if spec.kind == "robust":  # arXiv 2403.00409, equation 9
        return (smoothing * logsigmoid(-apart) - (1 - smoothing) * logsigmoid(apart)) / (1 - 2 * smoothing)
    if spec.kind == "hinge":  # arXiv 2305.10425
        return torch.relu(1 - apart)
    if spec.kind == "ipo":  # arXiv 2310.12036, equation 17, by token as TRL has it
        means = ratios / tokens
        return (means[0] - means[1] - 1 / (2 * spec.beta)) ** 2
    return 1 - torch.sigmoid(spec.beta * chosen) + torch.sigmoid(spec.beta * rejected)  # arXiv 2408.06266, equation 7
