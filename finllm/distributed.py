"""How the processes of a run are started: the configuration files of Accelerate and DeepSpeed.

Deciding imports no torch.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finllm.errors import RecipeError
from finllm.files import read_json
from finllm.recipe import BY_DEEPSPEED, FOUR_BIT, Strategy
from finllm.run import Run

if TYPE_CHECKING:
    from finllm.plan import Plan

ACCELERATE = "accelerate.commands.launch"
"""The module behind `accelerate launch`; that command also imports what its other ones need, 1.5 s."""
LIVE_LAYERS = 2
"""Layers of which zero3 holds all weights at a time: the one that is computed, and the next."""


def started(processes: int) -> Strategy:
    """How `accelerate launch` has started this process and its siblings."""
    if by_deepspeed():
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if file:
            stage = str(read_json(Path(file)).get("zero_optimization", {}).get("stage", 0))
        if stage not in ("2", "3"):
            raise RecipeError(f"DeepSpeed is configured with ZeRO stage {stage}; FinLLM knows 2 and 3")
        return "zero2" if stage == "2" else "zero3"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        if os.environ.get("FSDP_VERSION") != "2":
            raise RecipeError("Accelerate is configured for FSDP 1; set `fsdp_version: 2` in its fsdp_config")
        return "fsdp"
    return "ddp" if processes > 1 else "single"


def by_deepspeed() -> bool:
    """Whether DeepSpeed starts the processes."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def processes() -> Any:
    """Accelerate's state of this process and its siblings."""
    import torch
    from accelerate import PartialState

    if torch.cuda.is_available():
        return PartialState()
    if by_deepspeed():
        return _deepspeed_on_cpu()
    return PartialState(cpu=True)  # without it, processes would not know each other, and each train alone


def _deepspeed_on_cpu() -> Any:
    """The same where DeepSpeed starts processes that have no GPU: over gloo."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    import deepspeed
    from accelerate import PartialState
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False  # it would be compiled, which takes minutes
    return PartialState(backend="gloo")


def accelerate_yaml(plan: "Plan", run: Run) -> str:
    """Accelerate's configuration file, complete, so that the user's default file changes nothing."""
    # DeepSpeed decides by itself whether there is a GPU, and its own file says in which precision it computes.
    zero = plan.strategy in BY_DEEPSPEED
    lines: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": _TYPES[plan.strategy],
        **({} if zero else {"mixed_precision": "bf16" if plan.dtype == "bf16" else "no"}),
        "num_machines": plan.nodes,
        "machine_rank": 0,
        "main_process_port": 0,  # a free one, so that two runs can share a machine; of several nodes, in the command
        "num_processes": plan.processes,
        "use_cpu": plan.device == "cpu" and not zero,
        "rdzv_backend": "static" if plan.nodes == 1 else "c10d",
        "same_network": True,
        "main_training_function": "main",
        "debug": False,
    }
    if plan.strategy == "fsdp":
        lines["fsdp_config"] = _fsdp(plan)
    if zero:
        lines["deepspeed_config"] = {
            "deepspeed_config_file": str(run.deepspeed),
            "deepspeed_multinode_launcher": "standard",
            "zero3_init_flag": False,
        }
    # Accelerate reads YAML 1.1, of which JSON values are a part: a bare no would be false.
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items())


_TYPES = {
    "single": "NO",
    "ddp": "MULTI_GPU",  # with use_cpu it is gloo
    "fsdp": "FSDP",
    "zero2": "DEEPSPEED",
    "zero3": "DEEPSPEED",
}


def _fsdp(plan: "Plan") -> dict[str, Any]:
    """Torch's FSDP2, a unit for each decoder layer; checkpoints in parts, which any number of processes can read."""
    return {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_offload_params": plan.recipe.distributed.offload,
    }


def _layer_numbers(plan: "Plan") -> int | None:
    """Numbers of one block as zero3 counts them: 4-bit weights are packed into numbers of the arithmetic's type."""
    if plan.layer_parameters is None or plan.dequantize or plan.recipe.model.quantization not in FOUR_BIT:
        return plan.layer_parameters
    return plan.layer_parameters // {"bf16": 4, "fp32": 8}[plan.dtype]


def deepspeed_config(plan: "Plan") -> dict[str, Any]:
    """DeepSpeed's configuration; what is `auto` follows from the trainer's arguments."""
    stage = int(plan.strategy[-1])
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
    }
    if plan.recipe.distributed.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": plan.device == "cuda"}
    if stage == 3:
        layer = _layer_numbers(plan)
        live = LIVE_LAYERS * layer if layer else 10**9
        zero |= {
            "stage3_prefetch_bucket_size": layer or "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live,
        }
        if plan.recipe.distributed.offload:
            zero["offload_param"] = {"device": "cpu", "pin_memory": plan.device == "cuda"}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own AdamW, the same on every device and without a compiler
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
