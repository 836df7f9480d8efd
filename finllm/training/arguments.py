"""The plan in the words of Transformers' and TRL's arguments."""

from trl import SFTConfig

from finllm.plan import Plan, steps_of, steps_per_epoch
from finllm.run import Run

OPTIMIZERS = {
    ("adamw", "cuda"): "adamw_torch_fused",
    ("adamw", "cpu"): "adamw_torch",
    ("paged_adamw_32bit", "cuda"): "paged_adamw_32bit",
    ("paged_adamw_8bit", "cuda"): "paged_adamw_8bit",
    ("adamw_8bit", "cuda"): "adamw_bnb_8bit",
}


def arguments(run: Run, plan: Plan, rows: int, *, validates: bool, engine: bool) -> SFTConfig:
    """Arguments for training on `rows` examples; everything that a recipe says has its place here.

    With an engine, checkpointing is its own affair.
    """
    spec = plan.recipe.train
    assert spec is not None, plan.name
    total = steps_of(spec, rows)
    checkpointing = plan.gradient_checkpointing and not engine
    every = max(1, min(total, round(steps_per_epoch(spec, rows) / spec.evals_per_epoch)))
    return SFTConfig(
        output_dir=str(run.checkpoints),
        max_steps=total,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.schedule,
        warmup_steps=round(spec.warmup_share * total),
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        optim=OPTIMIZERS[spec.optimizer, plan.device],
        seed=spec.seed,
        bf16=plan.dtype == "bf16",
        use_cpu=plan.device == "cpu",
        ddp_backend="gloo" if plan.device == "cpu" and plan.processes > 1 else None,
        ddp_find_unused_parameters=False if plan.processes > 1 else None,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        eval_strategy="steps" if validates else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=spec.keep_checkpoints,
        load_best_model_at_end=validates,
        metric_for_best_model="eval_loss" if validates else None,
        greater_is_better=False if validates else None,
        logging_strategy="steps",
        logging_steps=1 if plan.device == "cpu" else max(1, min(10, total // 30)),  # to log is to wait for the GPU
        logging_nan_inf_filter=False,  # a broken loss must be seen
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
