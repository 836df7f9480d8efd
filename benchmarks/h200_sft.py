"""Training of a Mistral-shaped model of random weights on one GPU: FinLLM's command, and TRL in the same run.

    python benchmarks/h200_sft.py --weights /dev/shm/mistral --tokenizer FOLDER --results benchmarks/results/h200_sft.json

Data are the training texts of PhraseBank's fixed split, LoRA has rank 16 on all linear layers, and a step 32 examples.
The weights are made on the GPU and written to --weights unless they are there; a recipe is then trained by the command,
three epochs from start to saved adapter, validation and checkpoints included. Each system runs in its own process.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from conditions import GFLOP_TRAINED, PEAK_TFLOP, conditions, limit, make_weights, write

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes/sft/mistral-7b-v0.1-phrasebank.yaml"
SYSTEMS = {
    "finllm": (),
    "finllm, low memory": ("train.gradient_checkpointing=true", "train.max_steps=45"),
    "trl 4x4": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 11},
    "trl 64": {"per_device_train_batch_size": 64, "gradient_checkpointing": False, "max_steps": 54,
               "train_sampling_strategy": "group_by_length"},
}  # fmt: skip
"""Overrides of the recipe, or arguments of TRL's trainer."""
WARM = {"trl 4x4": 3, "trl 64": 1}
"""Steps of TRL that are not counted. Grouped by length, it begins with the longest texts: the other 53 are an epoch."""


def by_command(weights: Path, overrides: tuple[str, ...], runs: Path) -> dict[str, Any]:
    """One run of the command: examples/s in the steady state, and seconds from start to saved adapter."""
    shutil.rmtree(runs, ignore_errors=True)
    command = [sys.executable, "-m", "finllm.train", str(RECIPE), f"model.name={weights}", "train.optimizer=adamw"]
    environment = {**os.environ, "FINLLM_RUNS": str(runs)}
    began = time.monotonic()
    done = subprocess.run(
        [*command, "tracking.wandb=disabled", *overrides],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    seconds = time.monotonic() - began
    if done.returncode != 0:
        return {"failed": (done.stdout + done.stderr)[-4000:]}
    run = runs / RECIPE.stem
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    paces = [line["train/examples_per_s"] for line in lines if "train/examples_per_s" in line]
    last = {name: value for line in lines for name, value in line.items()}
    return {
        "examples_per_s": round(statistics.median(paces[2:]), 1),
        "peak_gib": round(max(line.get("train/memory_gib", 0) for line in lines), 2),
        "seconds_command_to_adapter": round(seconds, 1),
        "seconds_training": round(last["train/seconds"], 1),
        "steps": max(line.get("step") or 0 for line in lines),
        "said": [line for line in done.stdout.splitlines() if not line.startswith("step ")][-12:],
        "paces": [round(pace) for pace in paces],
    }


def by_trl(weights: Path, arguments: dict[str, Any], warm: int) -> dict[str, Any]:
    """TRL's own trainer on NF4 weights with double quantisation."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from finllm import data, models
    from finllm.prompts import Prompter
    from finllm.recipe import load

    recipe = load(RECIPE, [f"model.name={weights}"])
    parts, _ = data.training_parts(recipe.data)
    loaded = models.load(recipe.model, dtype="bf16", device="cuda:0")
    prompter = Prompter(loaded.tokenizer, recipe.prompt)
    loaded.tokenizer.pad_token = loaded.tokenizer.pad_token or loaded.tokenizer.eos_token
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.monotonic())

    texts = [{"prompt": prompter.string(e.text), "completion": f" {e.label}"} for e in parts.train]
    usual = {"learning_rate": 2e-4, "bf16": True, "optim": "adamw_torch_fused", "logging_steps": 10, "report_to": []}
    trainer = SFTTrainer(
        model=loaded.model,
        args=SFTConfig(output_dir="/tmp/trl", save_strategy="no", **usual, **arguments),  # noqa: S108
        train_dataset=Dataset.from_list(texts),
        processing_class=loaded.tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    batch = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    steps = [after - before for before, after in pairwise(times[warm - 1 :])]
    return {
        "examples_per_s": round(batch / statistics.mean(steps), 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "steps": len(times),
        "arguments": {key: str(value) for key, value in arguments.items()},
    }


def one(name: str, weights: Path, runs: Path) -> dict[str, Any]:
    system = SYSTEMS[name]
    return by_trl(weights, system, WARM[name]) if isinstance(system, dict) else by_command(weights, system, runs)


def rows_of(found: dict[str, dict[str, Any]], common: dict[str, Any]) -> list[dict[str, Any]]:
    """The measurements with ratios: ours to each of TRL's, and to what the GPU could do at most."""
    rows = []
    for name, figures in found.items():
        speed = figures.get("examples_per_s")
        row = {"name": name, "peer": None, "ratio": None, **common, **figures}
        row["limit_ratio"] = round(speed / limit(GFLOP_TRAINED), 3) if speed else None
        rows.append(row)
    ours = found.get("finllm", {}).get("examples_per_s")
    for peer in ("trl 4x4", "trl 64"):
        theirs = found.get(peer, {}).get("examples_per_s")
        if ours and theirs:
            first = next(row for row in rows if row["name"] == "finllm")
            rows.append({**first, "name": f"finllm against {peer}", "peer": peer, "ratio": round(ours / theirs, 2)})
    return rows


def measured(results: Path) -> dict[str, dict[str, Any]]:
    """What an earlier call has measured: systems can be measured one by one."""
    if not results.is_file():
        return {}
    return {row["name"]: row for row in json.loads(results.read_text()) if row["name"] in SYSTEMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder of the model; made if it is not there")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer for a model that must be made")
    parser.add_argument("--runs", type=Path, default=Path("/tmp/h200_sft"))  # noqa: S108
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/h200_sft.json")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--timeout", type=int, default=150, help="seconds for one system")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    make_weights(asked.weights, asked.tokenizer)
    if asked.child:
        print("RESULT " + json.dumps(one(asked.child, asked.weights, asked.runs)), flush=True)
        return
    found = measured(asked.results)
    common = conditions(
        note=f"limit: {PEAK_TFLOP} TFLOP/s, {GFLOP_TRAINED} GFLOP a token; random weights; validation at steps' ends"
    )
    for name in asked.systems:
        again = [sys.executable, __file__, "--weights", str(asked.weights), "--runs", str(asked.runs), "--child", name]
        try:
            done = subprocess.run(again, capture_output=True, text=True, check=False, timeout=asked.timeout)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            found[name] = json.loads(lines[-1][7:]) if lines else {"failed": (done.stdout + done.stderr)[-3000:]}
        except subprocess.TimeoutExpired:
            found[name] = {"failed": f"over {asked.timeout} s"}
        print(json.dumps({"name": name, **found[name]}), flush=True)
        write(asked.results, rows_of(found, common))


if __name__ == "__main__":
    main()
