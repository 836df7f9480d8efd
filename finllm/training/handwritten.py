"""Whether the hand-written passes train this model, and how much they keep in memory: asked of model and GPU."""

from collections.abc import Sequence
from typing import Any

import torch

from finllm.errors import RunError
from finllm.fast.engine import Engine, ready
from finllm.fast.streams import pack
from finllm.fast.support import unsupported
from finllm.plan import Plan
from finllm.recipe import FOUR_BIT
from finllm.shared_prefix import attending, shared_length
from finllm.training.batches import Row, meta
from finllm.training.sharing import SHORTEST

TOLERANCE = {torch.bfloat16: 0.25, torch.float32: 1e-3}
"""Largest difference of log-probabilities, in nats, from those that the model computes by itself on two rows."""
MULTIPLE = {"cpu": 1, "cuda": 64}
"""Tokens of a stream are a multiple of this: what a tensor core multiplies at once."""
SPARE_SHARE = 0.1
"""Of the GPU's memory, left to the allocator and to others."""


def engine(model: Any, rows: Sequence[Row], plan: Plan, *, is_main: bool) -> Engine | None:
    """The passes that train this model, or None where they cannot; raises RunError if the recipe asks for them."""
    if not plan.hand_written:
        return None
    assert plan.recipe.train is not None, plan.name
    why = _unsuited(model, rows)
    if why is None:
        made, said = _made(model, rows, plan)
        error = _difference(made, model, rows)
        if error <= TOLERANCE[made.decoder.kind]:
            if is_main:
                print(f"hand-written passes: {said}", flush=True)
            return made
        why = f"they compute log-probabilities that differ by {error:.2g} nats"
    if plan.recipe.train.hand_written == "on":
        raise RunError(f"train.hand_written is on, but {why}; write auto")
    if is_main:
        print(f"hand-written passes off: {why}", flush=True)
    return None


def _unsuited(model: Any, rows: Sequence[Row]) -> str | None:
    shared = shared_length([row.prompt for row in rows])
    if shared < SHORTEST:
        return f"the prompts have only {shared} tokens in common at their beginning, and {SHORTEST} are needed"
    config = model.get_base_model().config.get_text_config()
    window, longest = getattr(config, "sliding_window", None), max(len(r.prompt) + len(r.answer) for r in rows)
    if window is not None and window < longest:
        return f"the longest row has {longest} tokens, and the model's window {window}"
    return unsupported(model)


def unpack_if_roomy(model: Any, rows: Sequence[Row], plan: Plan, *, is_main: bool) -> None:
    """Dequantise a base model's 4-bit weights, the same values, if the GPU has room for them and for activations.

    Only where the plan could not estimate memory; else it has decided. A recipe that sets train.gradient_checkpointing
    asks for little memory, so that its weights stay in 4 bits.
    """
    assert plan.recipe.train is not None, plan.name
    packed_weights = plan.recipe.model.quantization in FOUR_BIT and not plan.dequantize
    decided = plan.memory is not None or plan.recipe.train.gradient_checkpointing is True
    if not plan.hand_written or not packed_weights or decided:
        return
    linear = sum(m.in_features * m.out_features for m in model.model.layers.modules() if hasattr(m, "in_features"))
    if _room() > 2 * linear + _kept_bytes(model.config.get_text_config(), rows, plan.micro_batch):
        model.dequantize()
        if is_main:
            print("4-bit weights dequantised once: the same values, and the GPU has room for them", flush=True)


def _made(model: Any, rows: Sequence[Row], plan: Plan) -> tuple[Engine, str]:
    """The passes, with activations kept as the plan says, or where it could not tell, as there is room; and the choice."""
    assert plan.recipe.train is not None, plan.name
    asked = plan.recipe.train.gradient_checkpointing if plan.memory is None else plan.gradient_checkpointing
    if not isinstance(asked, bool):
        config = model.get_base_model().config.get_text_config()
        asked = plan.device == "cuda" and _room() < _kept_bytes(config, rows, plan.micro_batch)
    return Engine(model, recompute=asked), f"activations {'computed again' if asked else 'kept'}"


def _room() -> float:
    """Bytes that the GPU has left to fill."""
    free, whole = torch.cuda.mem_get_info()
    return free - SPARE_SHARE * whole


def _kept_bytes(config: Any, rows: Sequence[Row], micro_batch: int) -> float:
    """Memory for the activations of the largest likely micro-batch: rows of mean length, half as many again."""
    shared = shared_length([row.prompt for row in rows])
    mean = sum(len(row.prompt) + len(row.answer) - shared for row in rows) / len(rows)
    tokens = shared + 1.5 * micro_batch * mean
    each: int = config.num_hidden_layers * (6 * config.hidden_size + 3 * config.intermediate_size)
    return 2.0 * tokens * each


def _difference(made: Engine, model: Any, rows: Sequence[Row]) -> float:
    """Largest difference of the log-probabilities of the first answer tokens, from the model's own."""
    some = rows[:2]
    tokens = sorted({row.answer[0] for row in some})
    training = model.training
    model.eval()
    own = []
    device = made.decoder.device
    with attending(model, streams=False), torch.inference_mode():
        for row in some:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=made.decoder.kind == torch.bfloat16):
                logits = model(torch.tensor([row.prompt], device=device), use_cache=False).logits[0, -1]
            own.append(logits.float().log_softmax(-1)[tokens].cpu())
    model.train(training)
    found = made.log_probabilities([row.prompt for row in some], [(t,) for t in tokens], batch_tokens=10**6)
    return float((torch.tensor(found) - torch.stack(own)).abs().max())


def packed(rows: Sequence[Row | None], *, shared: int, device: str) -> dict[str, Any]:
    """A micro-batch as a stream, ready to be copied; `stream` is None where there are no rows."""
    real = [row for row in rows if row is not None]
    stream = None
    if real:
        prompts, answers = [row.prompt for row in real], [row.answer for row in real]
        stream = ready(pack(prompts, answers, shared=shared, multiple=MULTIPLE[device]))
    return {"stream": stream, "meta": {**meta(real), "targets": sum(len(row.answer) for row in real)}}
