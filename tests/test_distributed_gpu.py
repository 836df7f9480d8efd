"""Two GPUs take the steps of one: by every strategy, from a checkpoint too, from the hosts' memory, in 4 bits, for pairs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import launched
from finllm import doctor_gpus, machine
from finllm.plan import Plan
from finllm.recipe import Strategy
from finllm.run import Run
from launch import replanning
from launched import USUAL, error, figures, forget_the_end, go

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
Start = Callable[..., Run]
FP32 = ("model.dtype=fp32",)
NF4 = (*FP32, "model.quantization=nf4", "train.gradient_checkpointing=true", "train.optimizer=adamw")


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, 256 wide, heads of 64, as the hand-written passes know them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start(recipe: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Trains so many GPUs on the tests' recipe, or on another, as the launcher does."""
    runs = tmp_path_factory.mktemp("runs")

    def begin(name: str, gpus: int, strategy: str, *overrides: str, of: Path = recipe) -> Run:
        where = (f"model.name={model}", f"resources.gpus={gpus}", f"distributed.strategy={strategy}")
        run = launched.start(of, runs, name, *(USUAL if of == recipe else ()), *where, *overrides)
        assert (Plan.of(run).strategy, Plan.of(run).processes, Plan.of(run).device) == (strategy, gpus, "cuda")
        return run

    return begin


def close(run: Run, to: Run, *, losses: float, weights: float, names: tuple[str, ...] = ("train/loss",)) -> None:
    """Figures of each step within `losses`, adapters within `weights` (relative); what they were is printed."""
    for name in names:
        found, expected = np.array(figures(run, name)[: len(figures(to, name))]), np.array(figures(to, name))
        print(f"{run.name}: {name} of {to.name} within {np.abs(found - expected).max():.2g} in {len(expected)} steps")
        np.testing.assert_allclose(found, expected, rtol=0, atol=losses)
    print(f"{run.name}: weights of {to.name} within {error(run.adapter, to.adapter):.2g}")
    assert error(run.adapter, to.adapter) < weights


@pytest.fixture(scope="module")
def alone(start: Start) -> Run:
    return start("alone", 1, "single", *FP32)


@pytest.mark.parametrize(
    ("strategy", "offload", "then"),
    [
        ("ddp", False, 1), ("fsdp", False, 1), ("zero2", False, 2), ("zero3", False, 2),
        ("fsdp", True, 2), ("zero2", True, 2), ("zero3", True, 2),
    ],
    ids=["ddp", "fsdp", "zero2", "zero3", "fsdp offloaded", "zero2 offloaded", "zero3 offloaded"],
)  # fmt: skip
def test_two_gpus_end_in_the_weights_of_one_and_go_on_from_a_checkpoint(
    start: Start, alone: Run, model: Path, strategy: Strategy, *, offload: bool, then: int
) -> None:
    """Seven steps in fp32, the last one with unequal processes; one CPU can load the adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    name = f"{strategy}-offloaded" if offload else strategy
    run = start(name, 2, strategy, *FP32, f"distributed.offload={str(offload).lower()}")
    close(run, alone, losses=1e-4, weights=1e-4)
    assert error(run.complete_checkpoints()[0], alone.adapter) > 1e-2  # the measure can tell
    forget_the_end(run)
    if then == 1:
        replanning.replan(
            run, ["resources.gpus=1", f"distributed.strategy={'auto' if strategy == 'ddp' else strategy}"]
        )
        assert Plan.of(run).processes == 1
    go(run)
    assert len(figures(run)) == 7 + 3
    again = np.abs(np.array(figures(run)[7:]) - figures(alone)[4:]).max()
    print(f"{name}: from checkpoint-4 on {then} GPU(s), losses within {again:.2g}")
    assert again < 1e-4
    close(run, alone, losses=1e-4, weights=1e-4)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(run.adapter))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_4_bit_weights_are_trained_to_the_same_by_every_strategy(start: Start, nf4: Run, strategy: Strategy) -> None:
    """They stay in 4 bits, and are divided as numbers of the arithmetic's type where weights are shared out."""
    run = start(f"nf4-{strategy}", 2, strategy, *NF4)
    assert not Plan.of(run).dequantize
    close(run, nf4, losses=1e-4, weights=1e-4)


@pytest.fixture(scope="module")
def nf4(start: Start) -> Run:
    return start("nf4", 1, "single", *NF4)


MARGINS = ("train/loss", "train/rewards/margins", "train/logps/chosen")


@pytest.fixture(scope="module")
def pairs(start: Start, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DPO recipe that goes on from a run of one GPU."""
    return launched.preferring(recipe, start("sft", 1, "single", *FP32), tmp_path_factory.mktemp("dpo"))


@pytest.fixture(scope="module")
def preferred(start: Start, pairs: Path) -> Run:
    return start("dpo", 1, "single", *FP32, of=pairs)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_two_gpus_take_the_dpo_steps_of_one(start: Start, preferred: Run, pairs: Path, strategy: Strategy) -> None:
    """Each asks the reference of its share of the pairs; losses, rewards and weights are those of one."""
    run = start(f"dpo-{strategy}", 2, strategy, *FP32, of=pairs)
    close(run, preferred, losses=5e-4, weights=1e-3, names=MARGINS)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_hand_written_passes_of_two_gpus_take_the_steps_of_one(
    start: Start, recipe: Path, pairs: Path, method: str
) -> None:
    """In bf16, whose rounding is all that differs."""
    of = recipe if method == "sft" else pairs
    one, two = (
        start(f"{method}-by-hand-{gpus}", gpus, "ddp" if gpus > 1 else "single", "train.hand_written=on", of=of)
        for gpus in (1, 2)
    )
    assert Plan.of(two).hand_written
    close(two, one, losses=3e-2, weights=0.1)


def test_doctor_adds_up_over_the_gpus() -> None:
    """Over NCCL, as training does."""
    found = doctor_gpus.nccl(machine.here().gpus)
    print(found)
    assert found.state == "ok"
    assert "adds up over the" in found.found
