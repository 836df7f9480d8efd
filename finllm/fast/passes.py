"""The whole model: loss and gradients of a stream, or the log-probabilities of what it asks for."""

import torch
from torch import Tensor

from finllm.fast import layers
from finllm.fast.arithmetic import Heads, norm, norm_backward
from finllm.fast.layers import Kept, Setting
from finllm.fast.streams import Stream
from finllm.fast.weights import Decoder


def loss_and_gradients(decoder: Decoder, stream: Stream, share: Tensor, *, recompute: bool) -> Tensor:
    """Sum over the targets of -log p times `share`, a number on the device; sets decoder.gradients.

    With `recompute` a layer keeps only its input, and computes the rest again on the way back.
    """
    setting = _setting(decoder, stream)
    rows = stream.predicting.long()
    x = decoder.embedding[stream.ids]
    kept: list[Kept | Tensor] = []
    for number, layer in enumerate(decoder.layers):
        entered = x
        x, one = layers.forward(layer, decoder.unpacked(layer), x, setting, _rows(decoder, number, rows))
        kept.append(entered if recompute else one)
        del one
    loss, gradient = _head(decoder, x, stream.targets, share)
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
    setting, rows = _setting(decoder, stream, adapted=adapted), stream.predicting.long()
    x = decoder.embedding[stream.ids]
    for number, layer in enumerate(decoder.layers):
        x = layers.forward(layer, decoder.unpacked(layer), x, setting, _rows(decoder, number, rows))[0]  # keeps nothing
    hidden, _ = norm(x, decoder.norm, decoder.eps, 0)
    logits = _logits(hidden, decoder.head)
    return logits.index_select(1, choices) - logits.logsumexp(-1, keepdim=True)


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


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    if hidden.is_cuda:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    return (hidden @ head.T).to(torch.promote_types(hidden.dtype, torch.float32))
