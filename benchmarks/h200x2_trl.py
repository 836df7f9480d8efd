"""One process of TRL's trainer on a run that h200x2.py has planned, which starts it under the run's configuration of Accelerate.

Prints its pace and peak as JSON behind the word RESULT.
"""

import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any


def main() -> None:
    """One process of TRL's trainer on a bf16 base, without checkpointing, with the run's recipe and micro-batch."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from finllm import data, distributed, models
    from finllm.plan import Plan
    from finllm.prompts import Prompter
    from finllm.run import Run

    processes = distributed.processes()
    folder = Path(sys.argv[1])
    plan = Plan.of(Run(folder))
    each = plan.recipe.train.global_batch // plan.processes
    parts, _ = data.training_parts(plan.recipe.data)
    on_cpu = plan.device == "cpu"
    device = models.device_of(plan.device, processes.local_process_index)
    loaded = models.load(plan.recipe.model, dtype=plan.dtype, device=device)  # before TRL tells Transformers of ZeRO-3
    settings = SFTConfig(
        output_dir=str(folder / "trl"), save_strategy="no", report_to=[], logging_steps=1000, learning_rate=2e-4,
        per_device_train_batch_size=each, max_steps=plan.steps, bf16=not on_cpu, gradient_checkpointing=False,
        use_cpu=on_cpu and plan.strategy in ("ddp", "fsdp"), ddp_backend="gloo" if on_cpu else None,
        optim="adamw_torch", disable_tqdm=True,
    )  # fmt: skip
    prompter = Prompter(loaded.tokenizer, plan.recipe.prompt)
    loaded.tokenizer.pad_token = loaded.tokenizer.pad_token or loaded.tokenizer.eos_token
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.monotonic())

    trainer = SFTTrainer(
        model=loaded.model,
        args=settings,
        train_dataset=Dataset.from_list(
            [{"prompt": prompter.string(e.text), "completion": f" {e.label}"} for e in parts.train]
        ),
        processing_class=loaded.tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()
    if processes.is_main_process:
        steps = [after - before for before, after in pairwise(times[len(times) // 4 :])]
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        pace = each * processes.num_processes / statistics.mean(steps)
        print("RESULT " + json.dumps({"examples_per_s": round(pace, 1), "peak_gib": round(peak, 2)}), flush=True)


if __name__ == "__main__":
    main()
