"""Runs the passes on a device without waiting for it: loss and gradients of streams, log-probabilities of answers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from finllm.fast import bushes, passes
from finllm.fast.pairs import Pairs
from finllm.fast.passes import Objective
from finllm.fast.streams import Stream
from finllm.fast.weights import Decoder
from finllm.progress import Steps
from finllm.shared_prefix import shared_length
from finllm.turns import ALONE, Turns

MOST_TOKENS = 8192
"""In one scoring pass: an H200 is as fast with these as with four times as many, which take four times the memory."""


class Engine:
    """The hand-written passes over one model."""

    def __init__(self, model: Any, *, recompute: bool = False) -> None:
        """Raises RunError where the model is of another shape; `recompute` keeps only the input of each layer."""
        self.decoder = Decoder(model)
        self.recompute = recompute

    def loss_and_gradients(self, stream: Stream, share: float | Tensor) -> Tensor:
        """Sum of -log p of the targets times `share`, on the device; adds to the gradients of the LoRA factors."""
        self.decoder.keep_adopted()
        with torch.no_grad():
            self.decoder.refresh()
            loss = passes.loss_and_gradients(
                self.decoder,
                self._moved(stream),
                torch.as_tensor(share, dtype=torch.float32, device=self.decoder.device),
                recompute=self.recompute,
            )
        self.decoder.give_gradients()
        return loss

    def preference_gradients(self, pairs: Pairs, objective: Objective) -> Tensor:
        """The objective of the answers' log-probabilities, on the device; adds to the gradients of the LoRA factors."""
        self.decoder.keep_adopted()
        with torch.no_grad():
            self.decoder.refresh()
            loss = passes.preference_gradients(
                self.decoder, self._on_device(pairs), objective, recompute=self.recompute
            )
        self.decoder.give_gradients()
        return loss

    def log_probabilities_of_pairs(self, pairs: Pairs) -> Tensor:
        """Log-probabilities, (2 x pairs,) in nats on the device, of the chosen answers, then of the others."""
        self.decoder.keep_adopted()
        with torch.no_grad():
            self.decoder.refresh()
            return passes.log_probabilities_of_pairs(self.decoder, self._on_device(pairs))

    def _on_device(self, pairs: Pairs) -> Pairs:
        table = pairs.table.to(self.decoder.device, non_blocking=True)
        return replace(pairs, stream=self._moved(pairs.stream), table=table)

    def clip(self, most: float) -> Tensor:
        """Add up the gradients of all processes, and scale them down to a norm of at most `most`; returns it before."""
        gradients = self.decoder.master_gradients
        if dist.is_initialized():
            dist.all_reduce(gradients)
        norm: Tensor = gradients.norm()
        gradients.mul_((most / (norm + 1e-6)).clamp(max=1.0))  # as torch.nn.utils.clip_grad_norm_
        return norm

    def _moved(self, stream: Stream) -> Stream:
        return replace(stream, numbers=stream.numbers.to(self.decoder.device, non_blocking=True))

    def log_probabilities(
        self,
        prompts: Sequence[list[int]],
        answers: Sequence[Sequence[int]],
        *,
        batch_tokens: int,
        adapted: bool = True,
        steps: Steps | None = None,
        turns: Turns = ALONE,
    ) -> NDArray[np.float64]:
        """Log-probabilities, (prompts, answers) in nats, of each whole answer after each prompt, in one pass.

        Of several processes that take `turns`, each has 0 in the rows of the others.
        """
        self.decoder.keep_adopted()
        shared, asked = shared_length(prompts), bushes.answers_of(answers)
        instruction, grown = prompts[0][:shared], bushes.grow(prompts, asked, shared=shared)
        sizes = [bush.tokens for bush in grown]
        tokens, most = sum(sizes), min(batch_tokens, MOST_TOKENS) - shared - max(sizes)
        choices = torch.tensor(asked.choices, device=self.decoder.device)
        found: list[Tensor] = []
        rows: list[int] = []
        result = np.zeros((len(prompts), len(answers)))
        with torch.inference_mode():
            if adapted:
                self.decoder.refresh()
            for turn in turns.of(bushes.batches_of(grown, turns.count(tokens, most))):
                stream = self._moved(ready(bushes.pack(instruction, turn.own, multiple=64)))
                found.append(passes.log_probabilities(self.decoder, stream, choices, adapted=adapted))
                rows += [row for bush in turn.own for row in bush.rows]
                if steps is not None:
                    steps.add(sum(len(bush.rows) for batch in turn.all for bush in batch))
            if not found:  # more processes than passes
                return result
            picks = torch.tensor(asked.picks, device=self.decoder.device)
            picked = torch.cat(found).view(len(rows), -1).index_select(1, picks)
            taken = picked.double().cpu().numpy()  # the one copy to the host
        result[rows] = np.add.reduceat(taken, asked.bounds, axis=1)
        return result


def ready(stream: Stream) -> Stream:
    """The stream in memory from which a GPU copies while the CPU goes on."""
    return replace(stream, numbers=pinned(stream.numbers))


def pinned(tensor: Tensor) -> Tensor:
    """The tensor in such memory; as it is where there is no GPU."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
