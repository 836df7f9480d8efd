"""Scoring of prompts by a Mistral-shaped model of random weights on one GPU, and where the time of a step goes.

    python benchmarks/h200_scoring.py --weights /dev/shm/mistral --results benchmarks/results/h200_scoring.json
    python benchmarks/h200_scoring.py --tiny --prompts 64 --results /tmp/scoring.json     # also on a CPU, to try it out

Prompts are the training texts of PhraseBank's fixed split; a score is the log-probability of each of the three labels.
The peer is Transformers' forward on 64 padded prompts at a time. `score` makes our passes anew each time unless they are
given, as evaluation and SentimentPredictor do; the limit counts every prompt's tokens. --profile adds the kernels of a
training step.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from conditions import (
    GFLOP_SCORED,
    PEAK_TFLOP,
    SHARED,
    conditions,
    limit,
    make_tiny,
    make_weights,
    results,
    seconds_of,
    write,
)

ROOT = Path(__file__).parent.parent
PADDED = 512
"""Prompts that the peer scores."""
PEER = "transformers, 64 padded prompts, adapter on"
LONGER = "finllm, adapter on, labels of three tokens, passes made before"
RECIPE = ROOT / "recipes/sft/mistral-7b-v0.1-phrasebank.yaml"


def padded(model: Any, prompts: list[list[int]], tokens: list[int], size: int = 64) -> Any:
    """Log-probabilities by plain forward passes on padded prompts, in order of length."""
    import torch

    found: dict[int, Any] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    device = model.device
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16):
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            longest = max(len(prompts[i]) for i in batch)
            ids = torch.tensor([prompts[i] + [0] * (longest - len(prompts[i])) for i in batch], device=device)
            last = torch.tensor([len(prompts[i]) - 1 for i in batch], device=device)
            hidden = model.get_base_model().model(ids, use_cache=False).last_hidden_state
            logits = model.get_base_model().lm_head(hidden[torch.arange(len(batch), device=device), last]).float()
            found |= dict(zip(batch, logits.log_softmax(-1)[:, tokens].cpu(), strict=True))
    return torch.stack([found[i] for i in range(len(prompts))]).numpy()


def profile(model: Any, rows: list[Any]) -> list[str]:
    """Milliseconds of each kernel in one training step, the longest first."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    from finllm.fast.engine import Engine
    from finllm.shared_prefix import shared_length
    from finllm.training.handwritten import packed

    engine = Engine(model)
    shared = shared_length([row.prompt for row in rows])
    batches = [packed(rows[i : i + 32], shared=shared, device="cuda") for i in range(0, 320, 32)]

    def step(batch: dict[str, Any]) -> None:
        engine.loss_and_gradients(batch["stream"], 1 / 64)
        engine.clip(1.0)
        model.zero_grad(set_to_none=True)

    for batch in batches[:4]:
        step(batch)
    whole = seconds_of(lambda: [step(batch) for batch in batches], 2)
    with recording(activities=[ProfilerActivity.CUDA]) as record:
        for batch in batches[:4]:
            step(batch)
        torch.cuda.synchronize()
    kernels = sorted(record.key_averages(), key=lambda k: -k.self_device_time_total)
    total = sum(k.self_device_time_total for k in kernels) / 4e3
    lines = [f"{min(whole) * 100:.1f} ms a pass of 32 examples on the clock, {total:.1f} ms in kernels"]
    return lines + [f"{k.self_device_time_total / 4e3:7.2f} ms {k.count / 4:5.0f} x {k.key[:90]}" for k in kernels[:40]]


def ours(
    model: Any, prompts: list[list[int]], answers: list[tuple[int, ...]], budget: int, repetitions: int
) -> dict[str, list[float]]:
    """Seconds of each repetition of scoring all prompts, after one that does not count."""
    import torch

    from finllm import scoring

    engine = scoring.engine_of(model)
    longer = [(*answer, *answers[0], *answer) for answer in answers]  # each with two beginnings of its own
    found = {}
    for name, off, asks, kept in (
        ("finllm, adapter on", False, answers, None),
        ("finllm, adapter off", True, answers, None),
        ("finllm, adapter on, passes made before", False, answers, engine),
        (LONGER, False, longer, engine),
    ):

        def work(off: bool = off, asks: list[tuple[int, ...]] = asks, kept: Any = kept) -> None:
            with model.disable_adapter() if off else torch.no_grad():
                scoring.score(model, prompts, asks, batch_tokens=budget, engine=kept)

        work()
        found[name] = seconds_of(work, repetitions)
    return found


def prepared(weights: Path, count: int | None) -> tuple[Any, list[Any], list[tuple[int, ...]], int]:
    """The model with an adapter that does something, rows, labels, and the tokens of a batch."""
    import torch

    from finllm import data, models
    from finllm.example import LABELS
    from finllm.prompts import Prompter
    from finllm.recipe import load
    from finllm.training.batches import encode

    recipe = load(RECIPE, [f"model.name={weights}", "model.quantization=none"])
    assert recipe.lora is not None
    parts, _ = data.training_parts(recipe.data)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    loaded = models.load(recipe.model, dtype="bf16", device=device)
    model = models.with_adapter(loaded.model, recipe.lora, 0).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    prompter = Prompter(loaded.tokenizer, recipe.prompt)
    answers = [prompter.answers[label] for label in LABELS]
    return model, encode(parts.train[:count], prompter), answers, recipe.evaluation.batch_tokens


def measured(
    model: Any, prompts: list[list[int]], answers: list[tuple[int, ...]], budget: int, repetitions: int
) -> list[dict[str, Any]]:
    """A row for each way of scoring."""
    import torch

    from finllm import scoring

    on_gpu = torch.cuda.is_available()
    some, tokens = prompts[:PADDED], [answer[0] for answer in answers]
    slow = padded(model, some, tokens)
    seconds = {PEER: seconds_of(lambda: padded(model, some, tokens), 1)}
    fast = scoring.score(model, prompts, answers, batch_tokens=budget)[: len(some)]
    agreement = {
        "largest_difference_nats": round(float(abs(fast - slow).max()), 4),
        "same_argmax": float((fast.argmax(1) == slow.argmax(1)).mean()),
    }
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds |= ours(model, prompts, answers, budget, repetitions)
    speed = {n: (len(some) if n == PEER else len(prompts)) / statistics.median(s) for n, s in seconds.items()}
    most = limit(GFLOP_SCORED, sum(map(len, prompts)) / len(prompts) - SHARED, budget // 36)
    common = conditions(note=f"limit: {PEAK_TFLOP} TFLOP/s, {GFLOP_SCORED} GFLOP a token; random weights, bf16")
    return [
        {
            "name": name, "examples_per_s": round(pace, 1),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if on_gpu else None,
            "peer": None if name == PEER else PEER, "ratio": None if name == PEER else round(pace / speed[PEER], 2),
            "limit_ratio": None if name == LONGER else round(pace / most, 3), **agreement, **common,
        }
        for name, pace in speed.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder of the model; made if it is not there")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer for a model that must be made")
    parser.add_argument("--results", type=Path, help="else results/h200_scoring.json, of --tiny none")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--prompts", type=int, help="score so many; else all training texts")
    parser.add_argument("--tiny", action="store_true", help="random weights of two layers, also without a GPU")
    parser.add_argument("--profile", action="store_true", help="add the kernels of a training step")
    asked = parser.parse_args()
    asked.results = results(asked.results, "h200_scoring.json", tiny=asked.tiny)
    if asked.weights is None and not asked.tiny:
        parser.error("--weights is needed, but for --tiny")
    asked.weights = asked.weights or Path(tempfile.gettempdir()) / "finllm-tiny-mistral"
    (make_tiny if asked.tiny else make_weights)(asked.weights, asked.tokenizer)
    model, rows, answers, budget = prepared(asked.weights, asked.prompts)
    table = measured(model, [row.prompt for row in rows], answers, budget, asked.repetitions)
    write(asked.results, table)
    print(*map(json.dumps, table), sep="\n", flush=True)
    if asked.profile:
        print("\n".join(profile(model.train(), rows)), flush=True)


if __name__ == "__main__":
    main()
