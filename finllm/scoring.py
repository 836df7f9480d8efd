"""Log-probabilities of whole label strings after a prompt: what every prediction and every evaluation rests on.

The tokens that all prompts share go through the model once; each batch continues from their keys and values. Labels of
several tokens are a trie, scored in the same pass. Nothing is generated and nothing is parsed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finllm import last_layer
from finllm.fast.engine import Engine
from finllm.fast.support import unsupported
from finllm.progress import Steps
from finllm.shared_prefix import shared_length
from finllm.turns import ALONE, Turns

MOST_ON_CPU = 512
"""Tokens in one pass on a CPU, which gains nothing from more and pads more (docs/experiments.md)."""


@dataclass(frozen=True)
class Trie:
    """The labels as a tree of input tokens; a label's last token is never an input."""

    tokens: tuple[int, ...]
    """Input tokens after the prompt."""
    parents: tuple[int, ...]
    """Index of the token before; -1 is the prompt's last token."""
    paths: tuple[tuple[tuple[int, int], ...], ...]
    """For each label, the (input token or -1 for the prompt's last, next token) whose log-probabilities add up."""

    @property
    def depths(self) -> list[int]:
        """Distance of each token from the prompt's end, from 0."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent == -1 else depths[parent] + 1)
        return depths

    @property
    def ancestors(self) -> torch.Tensor:
        """(tokens, tokens) bool: what each token may attend to among the tree's tokens."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for i, parent in enumerate(self.parents):
            if parent != -1:
                seen[i] |= seen[parent]
        return seen


def trie(answers: Sequence[tuple[int, ...]]) -> Trie:
    """The tree of the answers' tokens."""
    tokens: list[int] = []
    parents: list[int] = []
    nodes: dict[tuple[int, ...], int] = {(): -1}
    for answer in answers:
        for length in range(1, len(answer)):
            start = answer[:length]
            if start not in nodes:
                nodes[start] = len(tokens)
                tokens.append(start[-1])
                parents.append(nodes[start[:-1]])
    paths = tuple(tuple((nodes[answer[:k]], answer[k]) for k in range(len(answer))) for answer in answers)
    return Trie(tuple(tokens), tuple(parents), paths)


def score(
    model: Any,
    prompts: Sequence[list[int]],
    answers: Sequence[tuple[int, ...]],
    *,
    batch_tokens: int,
    steps: Steps | None = None,
    engine: Engine | None = None,
    turns: Turns = ALONE,
) -> NDArray[np.float64]:
    """Log-probabilities, (prompts, answers) in nats, of each whole answer after each prompt.

    The result does not depend on `batch_tokens`, the most tokens in one pass, beyond rounding. An `engine` of the
    model is used, or made where there is a GPU for it. Of several processes that take `turns`, each has 0 in the rows of
    the others.
    """
    if not prompts:
        return np.zeros((0, len(answers)))
    tree = trie(answers)
    engine = engine or engine_of(model)
    if engine is not None and sees_all(model, max(map(len, prompts)) + max(map(len, answers))):
        return engine.log_probabilities(
            prompts, answers, batch_tokens=batch_tokens, adapted=_adapted(model), steps=steps, turns=turns
        )
    if device_of(base_of(model)).type == "cpu":
        batch_tokens = min(batch_tokens, MOST_ON_CPU)
    shared = shared_length(prompts)
    if not sees_all(model, max(map(len, prompts)) + max(map(len, answers))):
        if tree.tokens:
            return _token_by_token(model, prompts, answers, batch_tokens, steps, turns)
        shared = 0
    result = np.zeros((len(prompts), len(answers)))
    with torch.inference_mode():
        prefix = keys_and_values(model, prompts[0][:shared]) if shared else []
        lengths, extra = [len(p) - shared for p in prompts], len(tree.tokens)
        if turns.multiple > 1:
            tokens = sum(lengths) + extra * len(prompts)
            batch_tokens = min(batch_tokens, -(-tokens // turns.count(tokens, batch_tokens)))
        passes = list(batches_of(lengths, extra, batch_tokens))
        for turn in turns.of(passes):
            rows = _score_batch(model, prefix, [prompts[i] for i in turn.own], shared, tree)
            if turn.counts:
                result[turn.own] = rows.double().cpu().numpy()  # the one copy to the host
            if steps is not None:
                steps.add(sum(map(len, turn.all)))
    return result


def probabilities(log_probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows that sum to 1: the probability of each label given that the answer is one of them."""
    shifted = np.exp(log_probabilities - log_probabilities.max(axis=1, keepdims=True))
    normalised: NDArray[np.float64] = shifted / shifted.sum(axis=1, keepdims=True)
    return normalised


def engine_of(model: Any) -> Engine | None:
    """The hand-written passes, where there is a GPU and they know the model's layers."""
    on_gpu = device_of(base_of(model)).type == "cuda"
    return Engine(model) if on_gpu and unsupported(model) is None else None


def _adapted(model: Any) -> bool:
    """Whether a LoRA adapter is there and takes part."""
    return not any(getattr(module, "disable_adapters", None) is True for module in model.modules())


def _token_by_token(
    model: Any,
    prompts: Sequence[list[int]],
    answers: Sequence[tuple[int, ...]],
    batch_tokens: int,
    steps: Steps | None,
    turns: Turns,
) -> NDArray[np.float64]:
    """Scores without a tree of labels: each token of a label costs a pass over the prompts."""
    nexts: dict[tuple[int, ...], list[int]] = {}
    for answer in answers:
        for length, token in enumerate(answer):
            nexts.setdefault(answer[:length], []).append(token)
    log_p = {
        start: score(
            model,
            [[*p, *start] for p in prompts],
            [(token,) for token in tokens],
            batch_tokens=batch_tokens,
            steps=None if start else steps,
            turns=turns,
        )
        for start, tokens in nexts.items()
    }
    steps_of = [[(answer[:k], nexts[answer[:k]].index(token)) for k, token in enumerate(answer)] for answer in answers]
    return np.stack([sum(log_p[start][:, column] for start, column in path) for path in steps_of], axis=1)


def sees_all(model: Any, longest: int) -> bool:
    """Whether every layer looks back as far as the longest prompt: a cached prefix and a tree of labels need that."""
    config = base_of(model).config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return window is None or window >= longest


def base_of(model: Any) -> Any:
    """The model below PEFT's wrapping, with its adapters in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def device_of(base: Any) -> torch.device:
    """Where a model computes; its weights may be elsewhere, where FSDP keeps its parts in the host's memory."""
    mesh = getattr(next(base.parameters()), "device_mesh", None)
    if mesh is not None and mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return base.device  # type: ignore[no-any-return]


def batches_of(lengths: list[int], extra: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like length, each at most `batch_tokens` with padding (but at least one row)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * (lengths[index] + extra) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def keys_and_values(model: Any, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of the shared tokens, (1, heads, tokens, head size), for each layer."""
    from transformers import DynamicCache

    base = base_of(model)
    cache = DynamicCache(config=base.config)
    with autocast(base):
        base.get_decoder()(torch.tensor([ids], device=device_of(base)), past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _score_batch(
    model: Any,
    prefix: list[tuple[torch.Tensor, torch.Tensor]],
    prompts: list[list[int]],
    shared: int,
    tree: Trie,
) -> torch.Tensor:
    """Log-probabilities (rows, answers) of one batch, in fp32, on the model's device."""
    from transformers import DynamicCache

    base = base_of(model)
    device = device_of(base)
    rows, branch = len(prompts), len(tree.tokens)
    lengths = torch.tensor([len(p) - shared for p in prompts])
    longest = int(lengths.max())
    ids = torch.zeros(rows, longest + branch, dtype=torch.long)  # right padding; no row attends to it
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt) - shared] = torch.tensor(prompt[shared:])
    positions = (shared + torch.arange(longest + branch)).repeat(rows, 1)
    ids[:, longest:] = torch.tensor(tree.tokens, dtype=torch.long)
    positions[:, longest:] = shared + lengths[:, None] + torch.tensor(tree.depths, dtype=torch.long)
    mask = _mask(lengths, longest, shared, tree).to(device) if branch else None
    cache = DynamicCache(config=base.config)
    for layer, (keys, values) in enumerate(prefix):
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
    wanted = torch.cat([(lengths - 1)[:, None], longest + torch.arange(branch).expand(rows, -1)], dim=1)
    places = (wanted + (longest + branch) * torch.arange(rows)[:, None]).flatten().to(device)
    wanted = wanted.to(device)
    with autocast(base), last_layer.only(base, places):
        hidden = (
            base.get_decoder()(
                ids.to(device),
                position_ids=positions.to(device),
                attention_mask=mask,
                past_key_values=cache if prefix else None,
                use_cache=bool(prefix),
            ).last_hidden_state  # (rows, longest + branch, hidden)
        )
        hidden = hidden.gather(1, wanted[..., None].expand(-1, -1, hidden.shape[-1]))  # (rows, 1 + branch, hidden)
        logits = base.get_output_embeddings()(hidden).float()
    cap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    log_p = torch.log_softmax(logits, dim=-1)  # (rows, 1 + branch, vocabulary)
    return torch.stack([_sum_path(log_p, path) for path in tree.paths], dim=1)


def _sum_path(log_p: torch.Tensor, path: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Log-probability (rows,) of one answer from `log_p` (rows, 1 + tree tokens, vocabulary)."""
    total = torch.zeros(log_p.shape[0], device=log_p.device)
    for node, token in path:
        total = total + log_p[:, node + 1, token]
    return total


def _mask(lengths: torch.Tensor, longest: int, shared: int, tree: Trie) -> torch.Tensor:
    """(rows, 1, queries, keys) bool: prompts are causal; a tree token sees its prompt and its ancestors."""
    rows, branch = len(lengths), len(tree.tokens)
    seen = torch.zeros(rows, longest + branch, shared + longest + branch, dtype=torch.bool)
    seen[:, :, :shared] = True
    seen[:, :longest, shared : shared + longest] = torch.ones(longest, longest, dtype=torch.bool).tril()
    seen[:, longest:, shared : shared + longest] = (torch.arange(longest) < lengths[:, None])[:, None]
    seen[:, longest:, shared + longest :] = tree.ancestors
    return seen[:, None]


def autocast(base: Any) -> torch.autocast:
    """bf16 arithmetic where the weights are bf16 (LoRA adapters are fp32); none elsewhere."""
    kind = base.get_output_embeddings().weight.dtype
    return torch.autocast(device_of(base).type, dtype=torch.bfloat16, enabled=kind == torch.bfloat16)
