"""DPO of a Mistral-shaped model of random weights on one GPU: FinLLM's command, and TRL's DPOTrainer in the same run.

    python benchmarks/h200_dpo.py --weights /dev/shm/mistral --results benchmarks/results/h200_dpo.json

Pairs are the training texts of PhraseBank's fixed split, the label over another label, both one word; LoRA has rank 16
on all linear layers, the reference is the base model. The weights are made on the GPU and written to --weights unless
they are there. Each system runs in its own process. `--tiny` does the same with a model of two layers, also on a CPU.
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

from conditions import GFLOP_TRAINED, OWN, PEAK_TFLOP, conditions, limit, make_tiny, make_weights, results, write

ROOT = Path(__file__).parent.parent
SYSTEMS: dict[str, tuple[str, ...] | dict[str, Any]] = {
    "finllm": (),
    "finllm, the model's own passes": ("train.hand_written=off", "train.max_steps=60"),
    "finllm, low memory": ("train.gradient_checkpointing=true", "train.max_steps=60"),
    "trl 16": {"per_device_train_batch_size": 16, "max_steps": 12},
    "trl 16, reference before": {"per_device_train_batch_size": 16, "max_steps": 20, "precompute_ref_log_probs": True,
                                 "gradient_checkpointing": False},
}  # fmt: skip
"""Overrides of the recipe, or arguments of TRL's trainer: its defaults, and the best that it has for this."""
WARM = 3
"""Steps of TRL that are not counted."""
RECIPE = """\
extends: [{root}/recipes/base/qlora.yaml, {root}/recipes/base/dpo.yaml]
model: {{name: {weights}, quantization: {quantization}}}
data: phrasebank
train: {{epochs: 3, evals_per_epoch: 1, optimizer: adamw, pairs: {{name: file, path: {pairs}}}}}
tracking: {{wandb: disabled}}
"""
OTHER = {"negative": "neutral", "neutral": "positive", "positive": "neutral"}


def recipe_of(weights: Path, folder: Path, *, tiny: bool) -> Path:
    """The recipe, with its pairs beside it."""
    from finllm import data
    from finllm.data.phrasebank import PhraseBank

    folder.mkdir(parents=True, exist_ok=True)
    parts, _ = data.training_parts([PhraseBank(name="phrasebank")])
    pairs = ({"prompt": e.text, "chosen": e.label, "rejected": OTHER[e.label]} for e in parts.train)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    quantization = "none" if tiny else "nf4"
    text = RECIPE.format(root=ROOT, weights=weights, quantization=quantization, pairs=folder / "pairs.jsonl")
    (folder / "h200-dpo.yaml").write_text(text, encoding="utf-8")
    return folder / "h200-dpo.yaml"


def by_command(recipe: Path, overrides: tuple[str, ...], runs: Path) -> dict[str, Any]:
    """One run of the command: pairs/s in the steady state, and seconds from start to saved adapter."""
    shutil.rmtree(runs, ignore_errors=True)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "finllm.train", str(recipe), *overrides],
        cwd=ROOT, env={**os.environ, "FINLLM_RUNS": str(runs)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    seconds = time.monotonic() - began
    if done.returncode != 0:
        return {"failed": (done.stdout + done.stderr)[-4000:]}
    lines = [json.loads(line) for line in (runs / recipe.stem / "metrics.jsonl").read_text().splitlines()]
    paces = [line["train/examples_per_s"] for line in lines if "train/examples_per_s" in line]
    last = {name: value for line in lines for name, value in line.items()}
    return {
        "pairs_per_s": round(statistics.median(paces[2:]), 1),
        "peak_gib": round(max(line.get("train/memory_gib", 0) for line in lines), 2),
        "seconds_command_to_adapter": round(seconds, 1),
        "seconds_training": round(last["train/seconds"], 1),
        "steps": max(line.get("step") or 0 for line in lines),
        "losses": [round(line["train/loss"], 4) for line in lines if "train/loss" in line][:3],
        "said": [line for line in done.stdout.splitlines() if not line.startswith("step ")][-12:],
        "paces": [round(pace) for pace in paces],
    }


def by_trl(recipe: Path, arguments: dict[str, Any], *, tiny: bool) -> dict[str, Any]:
    """TRL's own trainer on NF4 weights with double quantisation, its reference the base model."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from finllm import models
    from finllm.prompts import Prompter
    from finllm.recipe import load

    read = load(recipe)
    on_gpu = torch.cuda.is_available()
    loaded = models.load(read.model, dtype="bf16" if on_gpu else "fp32", device="cuda:0" if on_gpu else "cpu")
    prompter = Prompter(loaded.tokenizer, read.prompt)
    loaded.tokenizer.pad_token = loaded.tokenizer.pad_token or loaded.tokenizer.eos_token
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.monotonic())

    pairs = [json.loads(line) for line in recipe.with_name("pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [
        {"prompt": prompter.string(p["prompt"]), "chosen": f" {p['chosen']}", "rejected": f" {p['rejected']}"}
        for p in (pairs[:80] if tiny else pairs)
    ]
    usual = {"learning_rate": 2e-5, "bf16": on_gpu, "use_cpu": not on_gpu, "logging_steps": 10, "report_to": [],
             "optim": "adamw_torch_fused" if on_gpu else "adamw_torch", "max_length": None, "beta": 0.3}  # fmt: skip
    trainer = DPOTrainer(
        model=loaded.model,
        args=DPOConfig(output_dir="/tmp/trl", save_strategy="no", **usual, **arguments),  # noqa: S108
        train_dataset=Dataset.from_list(rows),
        processing_class=loaded.tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    steps = [after - before for before, after in pairwise(times[WARM - 1 :])]
    return {
        "pairs_per_s": round(trainer.args.per_device_train_batch_size / statistics.mean(steps), 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "steps": len(times),
        "arguments": {key: str(value) for key, value in arguments.items()},
    }


def rows_of(found: dict[str, dict[str, Any]], common: dict[str, Any]) -> list[dict[str, Any]]:
    """The measurements with ratios: ours to each of TRL's, and to what the GPU could do at most."""
    rows = []
    for name, figures in found.items():
        speed = figures.get("pairs_per_s")
        row = {"name": name, "peer": None, "ratio": None, **common, **figures}
        row["limit_ratio"] = round(speed / limit(GFLOP_TRAINED, OWN + 1), 3) if speed else None
        rows.append(row)
    ours = found.get("finllm", {}).get("pairs_per_s")
    for peer in (name for name in SYSTEMS if name.startswith("trl")):
        theirs = found.get(peer, {}).get("pairs_per_s")
        if ours and theirs:
            first = next(row for row in rows if row["name"] == "finllm")
            rows.append({**first, "name": f"finllm against {peer}", "peer": peer, "ratio": round(ours / theirs, 2)})
    return rows


def one(name: str, recipe: Path, runs: Path, *, tiny: bool) -> dict[str, Any]:
    system = SYSTEMS[name]
    if isinstance(system, dict):
        return by_trl(recipe, {**system, "max_steps": WARM + 2} if tiny else system, tiny=tiny)
    return by_command(recipe, (*system, *(["train.max_steps=12"] if tiny else [])), runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder of the model; made if it is not there")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of the tokenizer for a model that must be made; else SmolLM2's"
    )
    parser.add_argument("--runs", type=Path, default=Path("/tmp/h200_dpo"))  # noqa: S108
    parser.add_argument("--results", type=Path, help="else results/h200_dpo.json, of --tiny none")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--timeout", type=int, default=150, help="seconds for one system")
    parser.add_argument("--tiny", action="store_true", help="two layers, twelve steps: does all of this run?")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.results = results(asked.results, "h200_dpo.json", tiny=asked.tiny)
    if asked.child:
        recipe = asked.runs.parent / f"{asked.runs.name}-recipe" / "h200-dpo.yaml"
        print("RESULT " + json.dumps(one(asked.child, recipe, asked.runs, tiny=asked.tiny)), flush=True)
        return
    from finllm import embedded

    tokenizer = asked.tokenizer or embedded.folder()
    (make_tiny if asked.tiny else make_weights)(asked.weights, tokenizer)
    recipe_of(asked.weights, asked.runs.parent / f"{asked.runs.name}-recipe", tiny=asked.tiny)
    found: dict[str, dict[str, Any]] = {}
    common = conditions(
        note=f"limit: {PEAK_TFLOP} TFLOP/s, {GFLOP_TRAINED} GFLOP a token; random weights; one-word answers"
    )
    again = [sys.executable, __file__, *sys.argv[1:]]
    for name in asked.systems:
        try:
            done = subprocess.run(
                [*again, "--child", name], capture_output=True, text=True, check=False, timeout=asked.timeout
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            found[name] = json.loads(lines[-1][7:]) if lines else {"failed": (done.stdout + done.stderr)[-3000:]}
        except subprocess.TimeoutExpired:
            found[name] = {"failed": f"over {asked.timeout} s"}
        print(json.dumps({"name": name, **found[name]}), flush=True)
        write(asked.results, rows_of(found, common))


if __name__ == "__main__":
    main()
