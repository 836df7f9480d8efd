"""Base models, adapters, and what an adapter must remember to be used again."""

import gc
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from finllm import embedded, fetching
from finllm.errors import RunError
from finllm.files import write_json
from finllm.recipe import FOUR_BIT, Lora, Model, Prompt
from finllm.run import Run
from finllm.yamlfile import Spec

CARD = "finllm.json"
"""Stands beside the adapter's weights: base model and prompt, without which the adapter means nothing."""


class Card(Spec):
    """What belongs to trained weights."""

    base: Model
    prompt: Prompt
    trained: Literal["adapter", "all weights"]
    explains: bool = False
    """They have learnt explanations too; else their base writes better ones."""
    commit: str = ""

    def save(self, folder: Path) -> None:
        """Write the card beside the weights."""
        write_json(folder / CARD, self.model_dump(mode="json"))

    @classmethod
    def of(cls, folder: Path) -> "Card":
        """The card in a folder of weights; raises RunError where there is none."""
        try:
            return cls.model_validate_json((folder / CARD).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunError(f"{folder} has no {CARD}: it was not trained by FinLLM, or is incomplete") from error
        except ValidationError as error:
            raise RunError(f"{folder / CARD} is not of this version of FinLLM: {error}") from error


@dataclass(frozen=True)
class Loaded:
    """A model on its device, with its tokenizer."""

    model: Any
    tokenizer: Any


def device_of(device: Literal["cuda", "cpu"], local_rank: int = 0) -> str:
    """The device of this process."""
    return f"cuda:{local_rank}" if device == "cuda" else "cpu"


def load(
    spec: Model,
    *,
    dtype: Literal["bf16", "fp32"],
    device: str,
    dequantize: bool = False,
    apart: bool = False,
    run: Run | None = None,
) -> Loaded:
    """The base model in the form the recipe asks for, frozen; raises RunError where it cannot be had.

    `dequantize` turns 4-bit weights back into `dtype` once, instead of in every pass: the same values, so the same
    function, for more memory and less time. Weights that shall be taken `apart` are stored as numbers that FSDP and
    ZeRO-3 can divide. `run` is told how far a download is.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_libraries()
    place = str(embedded.folder(run=run)) if spec.name == embedded.NAME else spec.name
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    try:
        with _fetching(spec, place, run):
            tokenizer = AutoTokenizer.from_pretrained(place, revision=spec.revision)
            model = AutoModelForCausalLM.from_pretrained(
                place,
                revision=spec.revision,
                dtype=kind,
                attn_implementation=spec.attention,
                quantization_config=_quantization(spec, kind, apart=apart),
                device_map={"": device},
            )
    except (OSError, ValueError, ImportError) as error:
        raise RunError(_why_not(spec, error)) from error
    if dequantize and spec.quantization in FOUR_BIT:
        model.dequantize()
    return Loaded(model.eval().requires_grad_(requires_grad=False), tokenizer)


def _fetching(spec: Model, place: str, run: Run | None) -> AbstractContextManager[None]:
    """Shows how far a run's download from the hub is; without a run huggingface_hub shows it in the terminal."""
    if run is None or Path(place).is_dir():
        return nullcontext()
    stage, total = f"fetching {place}", partial(fetching.hub_bytes, place, spec.revision)
    return fetching.shown(stage, fetching.hub_folder(place), total, run)


def _quantization(spec: Model, kind: Any, *, apart: bool) -> Any:
    from transformers import BitsAndBytesConfig

    if spec.quantization in FOUR_BIT:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=spec.quantization,
            bnb_4bit_use_double_quant=spec.double_quantization,
            bnb_4bit_compute_dtype=kind,
            bnb_4bit_quant_storage=kind if apart else None,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if spec.quantization == "int8" else None


def _why_not(spec: Model, error: Exception) -> str:
    """What kept a model from being loaded, and what to do about it."""
    words = str(error).strip().splitlines() or [type(error).__name__]
    if "gated" in str(error) or "401" in str(error) or "403" in str(error):
        advice = f"ask for access on its page, then `hf auth login` ({spec.name} is gated)"
    elif Path(spec.name).is_dir():
        advice = f"the folder must hold config.json, weights in safetensors, and a tokenizer; it holds {_listing(spec)}"
    else:
        advice = "check the spelling and the network; offline, give the path of a local folder, or smollm2-135m"
    return f"model {spec.name} cannot be loaded: {words[0]}\n{advice}"


def _listing(spec: Model) -> str:
    return ", ".join(sorted(path.name for path in Path(spec.name).iterdir())[:8]) or "nothing"


@contextmanager
def importing() -> Iterator[None]:
    """While open, Python looks for no garbage, and never again among what is there at the end.

    Importing torch, Transformers and TRL makes more than a million objects that stay; a quarter of the time went there.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def quiet_libraries() -> None:
    """Silence what libraries say of themselves and a user can do nothing about; call it before they are imported."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its faster CPU kernels come from the hub, or not
    # DeepSpeed, which TRL imports wherever it is installed, tells stdout that there is no GPU; the plan has said so.
    logging.getLogger("DeepSpeed").addFilter(_tells_something)
    # Transformers 5.23 renamed gradient checkpointing; 5.17 does not know the new name.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing` is deprecated", category=FutureWarning)
    # bitsandbytes tells of a cast that LLM.int8() makes on purpose, once a layer.
    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast", category=UserWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _tells_something(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()


def with_adapter(model: Any, lora: Lora, seed: int) -> Any:
    """The model with fresh LoRA adapters in fp32, everything else frozen."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(seed)
    targets = lora.targets if lora.targets == "all-linear" else list(lora.targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # a float is fine: PEFT only divides it by the rank
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rank_stabilized,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise RunError(f"lora.targets {lora.targets} do not fit the model: {error}") from error


def trainable(model: Any, lora: Lora | None, seed: int, init: Path | None = None) -> Any:
    """The model with what is trained: fresh adapters, those of `init`, or without LoRA all its weights."""
    if init is not None:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(init), is_trainable=True)
    return with_adapter(model, lora, seed) if lora else model.requires_grad_(requires_grad=True)


def attach(model: Any, folder: Path) -> Any:
    """The base model with the trained adapter in `folder`, for use, not for training."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).eval()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds PEFT weights rather than a whole model."""
    return (folder / "adapter_config.json").is_file()


def adapter_base(folder: Path) -> str:
    """The base model that an adapter names."""
    return str(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])
