"""The whole model: loss and gradients of a stream, or the log-probabilities of what it asks for."""

from collections.abc import Callable

import torch
from torch import Tensor

from finllm.fast import layers
from finllm.fast.arithmetic import Heads, norm, norm_backward
from finllm.fast.layers import Kept, Setting
from finllm.fast.pairs import Pairs
from finllm.fast.streams import Stream
from finllm.fast.weights import Decoder

MOST_READ = 1024
"""Places whose logits are held at once: of answers of many tokens there are several for each prompt."""
Head = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Of the last layer's output where something is predicted: the loss, and what flows back into that output."""
Objective = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Of the log-probabilities of sequences: the loss, and what flows back into them."""


def loss_and_gradients(decoder: Decoder, stream: Stream, share: Tensor, *, recompute: bool) -> Tensor:
    """Sum over the targets of -log p times `share`, a number on the device; sets decoder.gradients.

    With `recompute` a layer keeps only its input, and computes the rest again on the way back.
    """
    return _through(decoder, stream, lambda x: _head(decoder, x, stream.targets, share), recompute=recompute)


def preference_gradients(decoder: Decoder, pairs: Pairs, objective: Objective, *, recompute: bool) -> Tensor:
    """The objective of the answers' log-probabilities, (2 x pairs,) in nats; sets decoder.gradients."""
    return _through(decoder, pairs.stream, lambda x: _head_of_pairs(decoder, x, pairs, objective), recompute=recompute)


def _through(decoder: Decoder, stream: Stream, head: Head, *, recompute: bool) -> Tensor:
    """The head's loss, after all layers forward and backward."""
    setting = _setting(decoder, stream)
    rows = stream.predicting.long()
    x = decoder.embedding[stream.ids]
    kept: list[Kept | Tensor] = []
    for number, layer in enumerate(decoder.layers):
        entered = x
        x, one = layers.forward(layer, decoder.unpacked(layer), x, setting, _rows(decoder, number, rows))
        kept.append(entered if recompute else one)
        del one
    loss, gradient = head(x)
    for number in reversed(range(len(decoder.layers))):
        layer, needed = decoder.layers[number], _rows(decoder, number, rows)
        matrices = decoder.unpacked(layer)
        own = kept.pop()
        if isinstance(own, Tensor):
            _, own = layers.forward(layer, matrices, own, setting, needed)
        into = layers.backward(layer, matrices, own, gradient, setting, needed, first=number == 0)
        if into is not None:
            gradient = into
    return loss


def log_probabilities(decoder: Decoder, stream: Stream, choices: Tensor, *, adapted: bool) -> Tensor:
    """Log-probabilities, (places that predict, choices) in nats, of the token ids `choices`."""
    hidden, _ = norm(_read(decoder, stream, adapted=adapted), decoder.norm, decoder.eps, 0)
    parts = (_logits(part, decoder.head) for part in hidden.split(MOST_READ))
    return torch.cat([part.index_select(1, choices) - part.logsumexp(-1, keepdim=True) for part in parts])


def log_probabilities_of_pairs(decoder: Decoder, pairs: Pairs) -> Tensor:
    """Log-probabilities, (2 x pairs,) in nats, of the chosen answers, then of the others."""
    hidden, _ = norm(_read(decoder, pairs.stream), decoder.norm, decoder.eps, 0)
    return pairs.summed(_logits(hidden, decoder.head).log_softmax(-1))


def _read(decoder: Decoder, stream: Stream, *, adapted: bool = True) -> Tensor:
    """The last layer's output where something is predicted; keeps nothing."""
    setting, rows = _setting(decoder, stream, adapted=adapted), stream.predicting.long()
    x = decoder.embedding[stream.ids]
    for number, layer in enumerate(decoder.layers):
        x = layers.forward(layer, decoder.unpacked(layer), x, setting, _rows(decoder, number, rows))[0]
    return x


def _rows(decoder: Decoder, number: int, rows: Tensor) -> Tensor | None:
    """In the last layer, what follows attention is needed only where something is predicted."""
    return rows if number == len(decoder.layers) - 1 else None


def _setting(decoder: Decoder, stream: Stream, *, adapted: bool = True) -> Setting:
    heads = Heads(decoder.heads, decoder.key_heads, decoder.head_size, *decoder.tables(stream.tokens))
    return Setting(stream, heads, decoder.eps, adapted)


def _head(decoder: Decoder, x: Tensor, targets: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and what flows back into the last layer's output, (rows, size)."""
    hidden, inverse = norm(x, decoder.norm, decoder.eps, 0)
    log_p = _logits(hidden, decoder.head).log_softmax(-1)
    wanted = targets.long()[:, None]
    found = log_p.gather(1, wanted)
    loss = -found.sum() * share
    into_logits = log_p.exp_().scatter_add_(1, wanted, -torch.ones_like(found)).mul_(share)
    into_hidden = into_logits.to(hidden.dtype) @ decoder.head
    return loss, norm_backward(into_hidden, x, decoder.norm, inverse, torch.zeros_like(x))


def _head_of_pairs(decoder: Decoder, x: Tensor, pairs: Pairs, objective: Objective) -> tuple[Tensor, Tensor]:
    """The objective, and what flows back into the last layer's output; d log p_i / d logit_j is [i = j] - p_j."""
    hidden, inverse = norm(x, decoder.norm, decoder.eps, 0)
    log_p = _logits(hidden, decoder.head).log_softmax(-1)
    loss, into_sequences = objective(pairs.summed(log_p))
    places, tokens, sequences = pairs.table.long()
    into = into_sequences.index_select(0, sequences).to(log_p.dtype)
    whole = log_p.new_zeros(len(log_p)).index_add_(0, places, into)
    into_logits = log_p.exp_().mul_(-whole[:, None]).index_put_((places, tokens), into, accumulate=True)
    into_hidden = into_logits.to(hidden.dtype) @ decoder.head
    return loss, norm_backward(into_hidden, x, decoder.norm, inverse, torch.zeros_like(x))


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    if hidden.is_cuda:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    return (hidden @ head.T).to(torch.promote_types(hidden.dtype, torch.float32))
