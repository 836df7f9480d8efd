"""Memory that a run needs, told from the model's shape before anything is loaded. docs/memory.md compares it with measured peaks.

Bytes a token and layer were derived from what autograd keeps of Transformers' Llama layers with PEFT's linear layers,
and agree with a count of the saved tensors to 1 % (tests/test_memory.py counts them).
"""

from finllm.holding import STEP, Setting, late_gradients, loading_bytes, stacks, state_bytes, targets, weight_bytes
from finllm.lengths import Batch
from finllm.recipe import FOUR_BIT
from finllm.shapes import Shape
from finllm.yamlfile import Spec

GIB = 2**30
CUDA_CONTEXT = 0.6 * GIB
"""The driver's context with the kernels of torch and cuBLAS, which torch does not count: assumed, not measured."""
CUDA_SLACK = 0.04
"""Of what comes and goes: blocks that the caching allocator holds and cannot use; assumed, not measured."""
CPU_BASE = 1.0 * GIB
"""Resident whatever the model: torch, Transformers, TRL and scikit-learn, and what glibc keeps of loading them."""
CPU_SLACK = 0.5
"""Of what comes and goes: freed blocks that glibc keeps. 0.2 in the demo's trainer, 0.6 in a bare loop over two steps."""
TILE = 32_768
"""Columns of the head that TRL computes at a time (trl/trainer/utils.py, add_fused_lm_head)."""


class Estimate(Spec):
    """GiB of one GPU, or resident memory of one CPU process, at the worst moment of a run."""

    weights: float
    """Of the base model, in the form in which they are held."""
    trained: float
    """Weights that are trained (or LoRA factors), their gradients, copies and optimizer states."""
    activations: float
    """What the backward pass needs of the largest micro-batch; or a scoring batch, or loading, where that needs more."""
    other: float
    """The device's context or the libraries, and what an allocator cannot use."""
    total: float
    tokens: int
    """Computed in the largest micro-batch."""
    limit: float | None = None
    """What may be filled; null where the machine's memory is not known."""

    @property
    def allocated(self) -> float:
        """What torch.cuda.max_memory_allocated counts."""
        return self.weights + self.trained + self.activations


def estimate(shape: Shape, how: Setting, batch: Batch | None, scored: Batch, limit: float | None = None) -> Estimate:
    """The peak of training on micro-batches up to `batch` and of scoring batches up to `scored`, or of scoring alone."""
    held = weight_bytes(shape, how)
    trained = state_bytes(shape, how) if how.trains else 0.0
    scoring = scoring_pass(shape, how, scored)
    passing = scoring if batch is None else max(training_pass(shape, how, batch), scoring)
    passing = max(passing, late_gradients(shape, how) if how.trains else 0.0)
    loading = loading_bytes(shape, how)
    if limit is None or loading <= limit * GIB:  # else it is loaded into the host's memory
        passing = max(passing, loading - held - trained)
    base, slack = (CUDA_CONTEXT, CUDA_SLACK) if how.device == "cuda" else (CPU_BASE, CPU_SLACK)
    other = base + slack * passing
    terms = [round(term / GIB, 3) for term in (held, trained, passing, other)]
    return Estimate(
        weights=terms[0],
        trained=terms[1],
        activations=terms[2],
        other=terms[3],
        total=round(sum(terms), 3),
        tokens=batch.tokens if batch else scored.tokens,
        limit=limit,
    )


def described(memory: Estimate, device: str) -> str:
    """The estimate in one line: `about 16.2 GiB on each GPU, of 71.3 that may be filled: weights 13.5, ...`."""
    limit = "" if memory.limit is None else f", of {memory.limit:.1f} that may be filled"
    return (
        f"about {memory.total:.1f} GiB on each {'GPU' if device == 'cuda' else 'process'}{limit}: "
        f"weights {memory.weights:.1f}, trained {memory.trained:.1f}, activations {memory.activations:.1f}, "
        f"other {memory.other:.1f}; {memory.tokens:,} tokens at a time"
    )


def training_pass(shape: Shape, how: Setting, batch: Batch) -> float:
    """Bytes that come and go with the largest micro-batch, at the beginning of its backward pass."""
    layer = kept_by_hand(shape, how, batch) if how.hand_written else kept_by_autograd(shape, how, batch)
    stream = how.size if how.hand_written or how.lora else 4  # fp32 weights make the residual stream fp32
    entered = stream * shape.hidden * batch.tokens
    kept = shape.layers * entered + layer if how.checkpointing else shape.layers * layer
    return kept + 3 * entered + _going_back(shape, how, batch) + _head(shape, how, batch)


def kept_by_autograd(shape: Shape, how: Setting, batch: Batch) -> float:
    """Bytes that autograd keeps of one layer."""
    e, tokens = how.size, batch.tokens
    adapted = set(shape.linears) if how.lora is None else {n for n in shape.linears if targets(how.lora, n)}
    cast = how.dtype == "bf16" and (how.lora is None or not (how.quantization in FOUR_BIT and not how.dequantize))
    norms = (
        2 * 4 * shape.hidden * (1 if how.lora else 2)
    )  # the input in fp32; the normalised one where gains are trained
    inputs = 0
    for names in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        # PEFT casts the input of a dense layer to fp32 and autocast back, once for each layer: as many copies, as with
        # weights in fp32. bitsandbytes' layers leave it as it is; then attention's own output serves o_proj.
        readers = sum(name in adapted for name in names)
        alone = names == ("o_proj",) and not (cast and how.lora) and not _on_padded_rows(how, batch)
        copies = (readers if cast else min(readers, 1)) if not alone else 0
        inputs += copies * shape.linears[names[0]][0]
    mlp = 3 * shape.intermediate  # gate, its silu, up
    rank = sum(how.lora.rank for _ in adapted) if how.lora else 0
    each = norms + e * (inputs + mlp + rank) + 4 * shape.heads
    return each * tokens + _kept_by_attention(shape, how, batch)


def _on_padded_rows(how: Setting, batch: Batch) -> bool:
    """Whether a stream's attention pads the rows: without bf16 there is no kernel for segments."""
    return bool(batch.shared) and (how.device == "cpu" or how.dtype == "fp32")


def _kept_by_attention(shape: Shape, how: Setting, batch: Batch) -> float:
    """Bytes of queries, keys, values and output that attention keeps."""
    e, queries, keys = how.size, shape.queries, shape.keys
    if not batch.shared:  # with a mask, Transformers repeats the key heads on a GPU
        heads = 2 * queries if how.device == "cuda" else 2 * keys
        return float(e * batch.tokens * (2 * queries + heads))
    if not _on_padded_rows(how, batch):  # finllm.shared_prefix.on_segments
        return float(e * (2 * queries * batch.tokens + 2 * keys * batch.keys))
    # on_padded_rows: rows and their keys padded; of the instruction's pass whole tensors, since slices are views
    wide = queries if how.device == "cuda" else keys
    padded = batch.rows * batch.longest
    rows = 2 * queries * padded + 2 * wide * (padded + batch.rows * batch.shared)
    return float(e * (rows + batch.tokens * (queries + 2 * wide) + batch.shared * queries))


def kept_by_hand(shape: Shape, how: Setting, batch: Batch) -> float:
    """Bytes that finllm.fast.layers.Kept holds of one layer: inputs of stacks with their product with the first factor."""
    numbers = (
        2 * shape.hidden  # x, middle
        + (shape.queries + 2 * shape.keys)  # qkv
        + 2 * shape.intermediate  # gate and up
        + sum(inputs + width for inputs, _, width in stacks(shape, how.lora))  # both norms' outputs, attended, gated
    )
    return float((how.size * numbers + 4 * (shape.heads + 2)) * batch.tokens)


def _going_back(shape: Shape, how: Setting, batch: Batch) -> float:
    """Bytes of gradients on the way through one feed-forward block, and of a weight unpacked for it."""
    e = how.size
    if how.hand_written:  # into gated (with its rank), gate and up take the place of what was kept
        return e * batch.tokens * (shape.intermediate + 3 * shape.hidden + STEP)
    cast = 4 * shape.intermediate if e == 2 and not how.four_bit else 0  # PEFT's fp32 copy of down_proj's input
    unpacked = e * shape.hidden * shape.intermediate if how.quantization != "none" and not how.dequantize else 0
    return float(batch.tokens * (e * (4 * shape.intermediate + 2 * shape.hidden) + cast) + unpacked)


def _head(shape: Shape, how: Setting, batch: Batch) -> float:
    """Bytes of logits of the answers, with their softmax and gradient, in fp32."""
    if how.hand_written:
        return batch.answers * shape.vocabulary * (4 + 4 + how.size)
    if how.device == "cpu" and batch.shared:
        return 3 * 4 * batch.answers * shape.vocabulary
    rows = batch.answers if how.device == "cuda" else batch.tokens  # TRL's head leaves rows out on a GPU only
    return 3 * 4 * min(rows, 4096) * min(TILE, shape.vocabulary)


def scoring_pass(shape: Shape, how: Setting, batch: Batch) -> float:
    """Bytes that come and go with a batch of prompts that are scored: no gradients, one layer at a time."""
    e = how.size
    logits = 2 * 4 * batch.rows * shape.vocabulary
    if scored_by_hand(shape, how):
        return kept_by_hand(shape, how, batch) + e * shape.hidden * batch.tokens + logits
    caches = 2 * e * shape.layers * shape.keys * (batch.tokens + batch.rows * batch.shared)
    block = batch.tokens * (e * (4 * shape.intermediate + 4 * shape.hidden) + 4 * shape.intermediate * (e == 2))
    return float(caches + block + logits)


def scored_by_hand(shape: Shape, how: Setting) -> bool:
    """Whether finllm.scoring uses the hand-written passes: on every GPU, for the models that they know."""
    known = how.quantization == "none" or how.dequantize or how.quantization == "nf4"
    return how.device == "cuda" and shape.kind in HAND_WRITTEN_KINDS and known and how.dtype == "bf16"


HAND_WRITTEN_KINDS = frozenset({"llama", "mistral"})
"""Types of models whose layers finllm.fast knows, as in finllm.fast.support, which needs torch."""
