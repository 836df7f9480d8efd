"""Scoring of prompts by a Mistral-shaped model of random weights on one GPU, and where the time of a step goes.

    python benchmarks/h200_scoring.py --weights /dev/shm/mistral --results benchmarks/results/h200_scoring.json

Prompts are the training texts of PhraseBank's fixed split; a score is the log-probability of each of the three labels.
The peer is Transformers' forward on 64 padded prompts at a time. `score` makes our passes anew each time unless they are
given, as evaluation and SentimentPredictor do; the limit counts every prompt's tokens. --profile adds the kernels of a
training step.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from conditions import GFLOP_SCORED, PEAK_TFLOP, SHARED, conditions, limit, make_weights, seconds_of, write

ROOT = Path(__file__).parent.parent
LONGER = "finllm, adapter on, labels of three tokens, passes made before"
RECIPE = ROOT / "recipes/sft/mistral-7b-v0.1-phrasebank.yaml"


def padded(model: Any, prompts: list[list[int]], tokens: list[int], size: int = 64) -> Any:
    """Log-probabilities by plain forward passes on padded prompts, in order of length."""
    import torch

    found: dict[int, Any] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            longest = max(len(prompts[i]) for i in batch)
            ids = torch.tensor([prompts[i] + [0] * (longest - len(prompts[i])) for i in batch]).cuda()
            last = torch.tensor([len(prompts[i]) - 1 for i in batch]).cuda()
            hidden = model.get_base_model().model(ids, use_cache=False).last_hidden_state
            logits = model.get_base_model().lm_head(hidden[torch.arange(len(batch)).cuda(), last]).float()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder of the model; made if it is not there")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer for a model that must be made")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/h200_scoring.json")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="add the kernels of a training step")
    asked = parser.parse_args()
    make_weights(asked.weights, asked.tokenizer)

    import torch

    from finllm import data, models, scoring
    from finllm.prompts import Prompter
    from finllm.recipe import load
    from finllm.training.batches import encode

    recipe = load(RECIPE, [f"model.name={asked.weights}", "model.quantization=none"])
    assert recipe.lora is not None
    parts, _ = data.training_parts(recipe.data)
    loaded = models.load(recipe.model, dtype="bf16", device="cuda:0")
    model = models.with_adapter(loaded.model, recipe.lora, 0).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)  # an adapter that does something
    prompter = Prompter(loaded.tokenizer, recipe.prompt)
    rows = encode(parts.train, prompter)
    prompts = [row.prompt for row in rows]
    answers = [prompter.answers[label] for label in ("negative", "neutral", "positive")]
    tokens = [answer[0] for answer in answers]
    slow = padded(model, prompts[:512], tokens)
    times = {"transformers, 64 padded prompts, adapter on": seconds_of(lambda: padded(model, prompts[:512], tokens), 1)}
    common = conditions(note=f"limit: {PEAK_TFLOP} TFLOP/s, {GFLOP_SCORED} GFLOP a token; random weights, bf16")
    budget = recipe.evaluation.batch_tokens
    fast = scoring.score(model, prompts, answers, batch_tokens=budget)
    agreement = {
        "largest_difference_nats": round(float(abs(fast[:512] - slow).max()), 4),
        "same_argmax": float((fast[:512].argmax(1) == slow.argmax(1)).mean()),
    }
    counts = {"transformers, 64 padded prompts, adapter on": 512}
    torch.cuda.reset_peak_memory_stats()
    for name, seconds in ours(model, prompts, answers, budget, asked.repetitions).items():
        counts[name], times[name] = len(prompts), seconds
    peer = (
        counts["transformers, 64 padded prompts, adapter on"] / times["transformers, 64 padded prompts, adapter on"][0]
    )
    most = limit(GFLOP_SCORED, sum(map(len, prompts)) / len(prompts) - SHARED, budget // 36)
    table = []
    for name, seconds in times.items():
        speed = counts[name] / statistics.median(seconds)
        table.append({
            "name": name, "examples_per_s": round(speed, 1), "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
            "peer": None if name.startswith("transformers") else "transformers, 64 padded prompts, adapter on",
            "ratio": None if name.startswith("transformers") else round(speed / peer, 2),
            "limit_ratio": None if name == LONGER else round(speed / most, 3), **agreement, **common,
        })  # fmt: skip
        print(json.dumps(table[-1]), flush=True)
    write(asked.results, table)
    if asked.profile:
        print("\n".join(profile(model.train(), rows)), flush=True)


if __name__ == "__main__":
    main()
