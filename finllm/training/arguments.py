"""The plan in the words of Transformers' and TRL's arguments."""

from typing import Any

from trl import DPOConfig, SFTConfig

from finllm.methods import Dpo
from finllm.plan import Plan, steps_of, steps_per_epoch
from finllm.recipe import BY_DEEPSPEED
from finllm.run import Run

OPTIMIZERS = {
    ("adamw", "cuda"): "adamw_torch_fused",  # also of states in the hosts' memory: nine times as fast as unfused
    ("adamw", "cpu"): "adamw_torch",
    ("paged_adamw_32bit", "cuda"): "paged_adamw_32bit",
    ("paged_adamw_8bit", "cuda"): "paged_adamw_8bit",
    ("adamw_8bit", "cuda"): "adamw_bnb_8bit",
}


def arguments(run: Run, plan: Plan, rows: int, *, validates: bool, engine: bool) -> SFTConfig | DPOConfig:
    """Arguments of the recipe's method."""
    spec = plan.recipe.train
    shared = _shared(run, plan, rows, validates=validates, engine=engine)
    made: SFTConfig | DPOConfig
    if isinstance(spec, Dpo):
        beside = {"loss_type": [spec.loss, "sft"], "loss_weights": [1.0, spec.sft_weight]} if spec.sft_weight else {}
        made = DPOConfig(**shared, **{"loss_type": [spec.loss], **beside}, beta=spec.beta)
    else:
        made = SFTConfig(**shared, dataset_kwargs={"skip_prepare_dataset": True})
    if made.n_gpu > 1:  # one process of several GPUs that it can see: Transformers would use all, by DataParallel
        made._n_gpu = 1  # noqa: SLF001
    return made


def _shared(run: Run, plan: Plan, rows: int, *, validates: bool, engine: bool) -> dict[str, Any]:
    """Arguments for training on `rows` examples; everything that a recipe says has its place here.

    With an engine, checkpointing is its own affair.
    """
    spec = plan.recipe.train
    assert spec is not None, plan.name
    total = steps_of(spec, rows)
    checkpointing = plan.gradient_checkpointing and not engine
    every = max(1, min(total, round(steps_per_epoch(spec, rows) / spec.evals_per_epoch)))
    return {
        "output_dir": str(run.checkpoints),
        "max_steps": total,
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": spec.schedule,
        "warmup_steps": round(spec.warmup_share * total),
        "weight_decay": spec.weight_decay,
        "max_grad_norm": spec.max_grad_norm,
        "optim": OPTIMIZERS[spec.optimizer, plan.device],
        "seed": spec.seed,
        "bf16": plan.dtype == "bf16",
        "use_cpu": plan.device == "cpu" and plan.strategy not in BY_DEEPSPEED,
        "ddp_backend": "gloo" if plan.device == "cpu" and plan.strategy != "single" else None,
        "ddp_find_unused_parameters": False if plan.strategy == "ddp" else None,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": plan.strategy == "zero3"} if checkpointing else None,
        "eval_strategy": "steps" if validates else "no",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": spec.keep_checkpoints,
        "load_best_model_at_end": validates,
        "metric_for_best_model": "eval_loss" if validates else None,
        "greater_is_better": False if validates else None,
        "logging_strategy": "steps",
        "logging_steps": 1 if plan.device == "cpu" else max(1, min(10, total // 30)),  # to log is to wait for the GPU
        "logging_nan_inf_filter": False,  # a broken loss must be seen
        "disable_tqdm": True,
        "report_to": [],
        "remove_unused_columns": False,
        "max_length": None,
    }
