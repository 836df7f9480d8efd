"""What differs where processes share out weights and what is trained: the accelerator, and saving whole weights."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from finllm import scoring
from finllm.fast.engine import pinned
from finllm.shared_prefix import IGNORED


class Shared:
    """For trainers: weights are saved whole and in fp32, in the ordinary format, however they are shared out.

    What Transformers' trainer does in every step although nobody needs it is left out.
    """

    args: Any
    accelerator: Any
    model: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool

    def create_accelerator_and_postprocess(self) -> None:
        """Accelerate as configured; it gives FSDP to GPUs alone, while gloo does it on a CPU, too."""
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        if self.args.use_cpu and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # noqa: SLF001 -- read as: not one
        super().create_accelerator_and_postprocess()  # type: ignore[misc]

    @property
    def weights_are_apart(self) -> bool:
        """Whether each process holds a part of the weights, and all take part in each pass."""
        if self.is_deepspeed_enabled:
            return bool(self.accelerator.state.deepspeed_plugin.zero_stage == 3)
        return bool(self.is_fsdp_enabled)

    def floating_point_ops(self, _inputs: dict[str, Any]) -> int:
        """0: for this figure, which nobody reads, Transformers would count all parameters in every pass."""
        return 0

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The trained weights, in PEFT's or Transformers' format; by the first process, all taking part."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        folder = Path(output_dir or self.args.output_dir)
        weights = whole(self.model)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            model = self.accelerator.unwrap_model(self.model)
            model.save_pretrained(str(folder), state_dict=weights)
            torch.save(self.args, folder / "training_args.bin")
        self.accelerator.wait_for_everyone()


def use_all_cores() -> None:
    """For steps that the host takes: torchrun gives each process one core, unless $OMP_NUM_THREADS says otherwise."""
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // beside))


def gather_by_layer(model: Any) -> None:
    """Tell ZeRO-3 to gather a decoder layer's weights at once, as FSDP does.

    Else it does so for each of the twenty modules in it, and the processor's part of a step outlasts the GPU's.
    """
    from deepspeed.utils import set_z3_leaf_modules

    layer = type(scoring.base_of(model).get_decoder().layers[0])
    set_z3_leaf_modules(model, [layer])
    model.enable_input_require_grads()  # else the first layer's weights would be gone before its adapters' gradients
    compute_again_without_hooks(layer)


def compute_again_without_hooks(layer: type[torch.nn.Module]) -> None:
    """Let checkpointing repeat a layer's `forward` alone, as Transformers 5.23 does; 5.17 repeats the whole call.

    ZeRO-3's hooks would run in it, gather the weights once more, and give none back before the pass has ended. The class
    itself is changed, for as long as the process lives, which trains under ZeRO-3 and does nothing else.
    """
    if layer.__call__ is torch.nn.Module.__call__:
        return
    forward = layer.forward

    def checkpointed(self: Any, *args: Any, **named: Any) -> Any:
        if not (self.gradient_checkpointing and self.training):
            return forward(self, *args, **named)
        return self._gradient_checkpointing_func(partial(forward, self, **named), *args)

    layer.forward, layer.__call__ = checkpointed, torch.nn.Module.__call__  # type: ignore[method-assign]


def whole(model: Any) -> dict[str, Tensor]:
    """The trained weights by name, in the host's memory; every process must ask for them."""
    model = getattr(model, "module", model)
    return {name: _whole(p).detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def _whole(parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        gathered: Tensor = parameter.full_tensor()
        return gathered
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_fp32_param

        master: Tensor = safe_get_full_fp32_param(parameter)
        return master
    return parameter


def over_all(counts: Sequence[int], device: torch.device) -> Sequence[Any]:
    """Sums over the processes; of several, on the device, without waiting for it."""
    if not dist.is_initialized():
        return counts
    sums = pinned(torch.tensor(counts, dtype=torch.float32)).to(device, non_blocking=True)
    dist.all_reduce(sums)
    return sums.unbind()


@contextmanager
def entered(model: Any) -> Iterator[None]:
    """While open, parts of a model can be called by themselves: FSDP gathers what is in no layer.

    It would gather that when the model as a whole is called; layers it gathers by themselves, one at a time.
    """
    units = [
        m for name, m in model.named_modules() if isinstance(m, FSDPModule) and not re.search(r"layers\.\d+$", name)
    ]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def log_probabilities(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Log-probabilities, (rows, longest - 1), of the learnt tokens of padded rows, 0 elsewhere: as by TRL's fused head.

    That reads the head's weights where they may not be; here the head is called, on the places that any row needs.
    """
    labels = inputs["labels"]
    targets = labels[:, 1:]
    places = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**rest, use_cache=False, logits_to_keep=places).logits  # (rows, places, vocabulary)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    found = -torch.nn.functional.cross_entropy(
        wide.flatten(0, 1), targets[:, places].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return found.new_zeros(targets.shape).index_copy(1, places, found.view(len(targets), -1))
