"""Peak memory of our own ways to train and score, beside what the plan says before anything is loaded.

    python benchmarks/h200_memory.py --weights /dev/shm/mistral --tokenizer FOLDER
    python benchmarks/h200_memory.py --tiny --steps 2 --results /tmp/memory.json     # the same on a CPU, to try it out

Each setting runs alone in a process of its own, a few steps on PhraseBank's training texts with validation at the end. The
estimate is the plan's, for the largest micro-batch of the whole run; `estimate_here_gib` is the same with activations in
proportion to the largest micro-batch that these steps had (too low where scoring, not training, needs the most). Measured is torch.cuda.max_memory_allocated, which the
estimate without its `other` is about; beside it what torch has reserved, and what nvidia-smi says is in use.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conditions import conditions, first_gpu, make_tiny, make_weights, results, write

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes/sft/mistral-7b-v0.1-phrasebank.yaml"
ALLOWED = 0.15


@dataclass(frozen=True)
class Way:
    """Overrides of the recipe, and the form of weights where the plan would choose another on a GPU of this size."""

    overrides: tuple[str, ...] = ()
    dequantize: bool | None = None
    trains: bool = True


KEPT, AGAIN = "train.gradient_checkpointing=false", "train.gradient_checkpointing=true"
OWN_PASSES, PADDED, BF16 = "train.hand_written=off", "train.shared_prefix=off", "model.quantization=none"
WAYS = {
    "shipped recipe": Way(),
    "low memory: by hand, NF4, computed again": Way((AGAIN,)),
    "by hand, dequantised, 8 at a time": Way((KEPT, "train.micro_batch=8")),
    "by hand, NF4, kept": Way((KEPT,), dequantize=False),
    "stream, bf16, kept": Way((KEPT, BF16, OWN_PASSES)),
    "stream, bf16, computed again": Way((AGAIN, BF16, OWN_PASSES)),
    "stream, NF4, kept": Way((KEPT, OWN_PASSES), dequantize=False),
    "stream, NF4, computed again": Way((AGAIN, OWN_PASSES)),
    "padded rows, bf16, kept": Way((KEPT, BF16, OWN_PASSES, PADDED, "train.micro_batch=16")),
    "padded rows, NF4, computed again": Way((AGAIN, OWN_PASSES, PADDED, "train.micro_batch=16")),
    "scoring alone, bf16": Way((BF16,), trains=False),
    "scoring alone, NF4": Way((), dequantize=False, trains=False),
}


def planned(way: Way, weights: Path, folder: Path, *, steps: int, tiny: bool) -> Any:
    """The run and its plan, with the way's choices in place of the plan's own."""
    from finllm import data, machine
    from finllm.learnt import counted
    from finllm.plan import decide
    from finllm.recipe import load
    from finllm.run import State, create

    more = (f"model.name={weights}", "train.optimizer=adamw", "tracking.wandb=disabled", "evaluation.base=false")
    wanted = [*more, *(("model.quantization=none",) if tiny else ()), *way.overrides]
    recipe = load(RECIPE, wanted)
    if not way.trains:
        recipe = recipe.model_copy(update={"train": None})
    run = create(folder, "memory")
    rows, texts = counted(recipe, data.read_parts(recipe.data))
    plan = decide(recipe, here=machine.here(), rows=rows, texts=texts, folder=run.folder, source=str(RECIPE))
    if not tiny and way.dequantize is not None:
        plan = forced(plan, dequantize=way.dequantize)
    if recipe.train is not None:  # after the estimate, which is of the whole run
        train = recipe.train.model_copy(update={"max_steps": steps})
        changed = plan.recipe.model_copy(update={"train": train})
        plan = plan.model_copy(update={"recipe": changed, "steps": steps})
    plan.save(run)
    State("created").save(run)
    return run, plan


def forced(plan: Any, *, dequantize: bool) -> Any:
    """The plan with another form of weights, and the estimate for it."""
    from finllm.fitting import FILLED_SHARE, Fit, Place, measured
    from finllm.shapes import shape_of

    place = Place(
        device=plan.device, name=plan.gpu, dtype=plan.dtype, processes=1, strategy=plan.strategy, offload=False,
        memory_gib=plan.memory.limit / FILLED_SHARE,
        shape=shape_of(plan.recipe.model), texts=plan.texts, scored_texts=max(plan.rows.validation, plan.rows.test),
        hand_written=plan.hand_written,
    )  # fmt: skip
    choice = Fit(plan.micro_batch, plan.gradient_checkpointing, dequantize, plan.batch_tokens)
    found = measured(plan.recipe, place, choice)
    changes = {"dequantize": dequantize, "memory": found.memory}
    return plan.model_copy(update={**changes, "batch_tokens": found.batch_tokens})


def trained(run: Any) -> int:
    """Train as planned; returns the tokens of the largest micro-batch."""
    from finllm import training
    from finllm.train import train
    from finllm.training import sft

    largest = 0

    class Counting(sft.Sft):
        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
            nonlocal largest
            stream = inputs.get("stream")
            largest = max(largest, stream.tokens if stream is not None else inputs["input_ids"].numel())
            return super().training_step(model, inputs, *rest, **more)

    training.METHODS["sft"] = Counting
    train(run.folder)
    return largest


def scored(plan: Any) -> int:
    """Score the training texts as planned; returns the tokens of a full batch."""
    from finllm import data, models, scoring
    from finllm.example import LABELS
    from finllm.prompts import Prompter

    place = models.device_of(plan.device)
    loaded = models.load(plan.recipe.model, dtype=plan.dtype, device=place, dequantize=plan.dequantize)
    prompter = Prompter(loaded.tokenizer, plan.recipe.prompt)
    examples = data.read_parts(plan.recipe.data).train[: 64 if plan.device == "cpu" else None]
    prompts = [p.ids for p in prompter.render([e.text for e in examples], [e.target for e in examples])]
    answers = [prompter.answers[label] for label in LABELS]
    scoring.score(loaded.model, prompts, answers, batch_tokens=plan.batch_tokens)
    tokens: int = plan.memory.tokens
    return tokens


def in_use() -> float | None:
    """GiB of the first GPU, as nvidia-smi says; other processes' count too."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", *first_gpu()]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    said = done.stdout.strip()
    return round(float(said) / 1024, 2) if said.replace(".", "").isdigit() else None


def one(name: str, weights: Path, steps: int, *, tiny: bool) -> dict[str, Any]:
    """The estimate and the measurement of one setting, in this process."""
    import torch

    from finllm import models

    models.quiet_libraries()
    way = WAYS[name]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run, plan = planned(way, weights, Path(folder), steps=steps, tiny=tiny)
        tokens = trained(run) if way.trains else scored(plan)
    said = plan.memory
    on_gpu = torch.cuda.is_available()
    here = said.activations * tokens / said.tokens
    if on_gpu:
        estimate, measured = said.allocated, torch.cuda.max_memory_allocated() / 2**30
        reserved: float | None = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        used = in_use()
    else:
        estimate, measured = said.total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        reserved = used = None
    near = estimate - said.activations + here
    return {
        "name": name, "estimate_gib": round(estimate, 2), "estimate_here_gib": round(near, 2),
        "measured_gib": round(measured, 2), "ratio": round(estimate / measured, 3),
        "ratio_here": round(near / measured, 3), "within": abs(estimate / measured - 1) <= ALLOWED,
        "estimate_total_gib": round(said.total, 2), "reserved_gib": reserved, "nvidia_smi_gib": used,
        "tokens_planned": said.tokens, "tokens_here": tokens, "micro_batch": plan.micro_batch,
        "checkpointing": plan.gradient_checkpointing, "dequantize": plan.dequantize,
        "hand_written": plan.hand_written, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def child(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own says of one setting."""
    again = [sys.executable, __file__, "--weights", str(asked.weights), "--steps", str(asked.steps), "--child", name]
    environment = {**os.environ, "WANDB_MODE": "disabled"}
    try:
        done = subprocess.run(
            [*again, *(["--tiny"] if asked.tiny else [])],
            capture_output=True, text=True, check=False, timeout=asked.timeout, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"name": name, "failed": f"over {asked.timeout} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found: dict[str, Any] = (
        json.loads(lines[-1][7:]) if lines else {"name": name, "failed": (done.stdout + done.stderr)[-3000:]}
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder of the model; made if it is not there")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer for a model that must be made")
    parser.add_argument("--tiny", action="store_true", help="two layers, not quantised, also without a GPU")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each setting")
    parser.add_argument("--settings", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME")
    parser.add_argument("--timeout", type=int, default=60, help="seconds for one setting")
    parser.add_argument("--results", type=Path, help="else results/h200_memory.json, of --tiny none")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.results = results(asked.results, "h200_memory.json", tiny=asked.tiny)
    if asked.weights is None:
        if not asked.tiny:
            parser.error("--weights is needed, but for --tiny")
        asked.weights = Path(tempfile.gettempdir()) / "finllm-tiny-mistral"
    if asked.child:
        print("RESULT " + json.dumps(one(asked.child, asked.weights, asked.steps, tiny=asked.tiny)), flush=True)
        return
    (make_tiny if asked.tiny else make_weights)(asked.weights, asked.tokenizer)
    common = conditions(note=f"{asked.steps} steps of 32 examples; random weights; one process at a time")
    rows = []
    for name in asked.settings:
        rows.append({**child(name, asked), **common})
        print(json.dumps({key: value for key, value in rows[-1].items() if key not in common}), flush=True)
        write(asked.results, rows)


if __name__ == "__main__":
    main()
