"""The pace that a plan expects: against what was measured, and by what is sent between GPUs."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finllm.holding import Setting, lora_parameters
from finllm.pace import Pace, Work, described, expected, operations, traffic
from finllm.recipe import Lora, Strategy
from finllm.shapes import Shape

ROOT = Path(__file__).resolve().parents[1]
MISTRAL = Shape(4096, 14336, 32, 32, 8, 128, 49152, tied=False, kind="mistral")
LORA = Lora(rank=16)
MEASURED = Work(passes=1, rows=32, begin=26, own=36.9, shares=True)
"""benchmarks/h200_sft.py: tokens of the instruction, and of a training text behind it."""


def setting(processes: int, strategy: Any = "ddp", **more: Any) -> Setting:
    given = {"lora": LORA, "hand_written": strategy in ("single", "ddp"), **more}
    return Setting("cuda", "bf16", processes=processes, strategy=strategy, **given)


def test_one_gpu_is_as_fast_as_it_was_measured() -> None:
    """465 examples/s of a 7B shape on an H200 (benchmarks/results/h200_sft.json)."""
    pace = expected(MISTRAL, setting(1, "single"), MEASURED, gpu="NVIDIA H200", nodes=1, network_gbit=None)
    assert pace is not None
    assert pace.examples_per_s == pytest.approx(465, rel=0.05)
    assert (pace.traffic_gb, pace.bound) == (0, "arithmetic")


def test_a_token_has_the_operations_of_its_weights() -> None:
    """28.17 GFLOP for LoRA through Mistral's layers, half as many more where activations are computed again."""
    one = Work(passes=1, rows=1, begin=0, own=1, shares=True)
    head = 4 * 2 * 4096 * 49152
    assert operations(MISTRAL, setting(1), one) - head == pytest.approx(28.17e9, rel=1e-3)
    again = operations(MISTRAL, setting(1, checkpointing=True), one)
    assert again - operations(MISTRAL, setting(1), one) == 2 * MISTRAL.linear_parameters
    padded = Work(passes=2, rows=4, begin=26, own=38, shares=False)
    assert padded.tokens == 2 * 4 * 64


def test_what_is_sent_follows_from_the_strategy() -> None:
    """Gradients once around under ddp; all weights twice for each pass where they are shared out."""
    trained = lora_parameters(MISTRAL, LORA)
    assert traffic(MISTRAL, setting(1, "single"), 1) == 0
    assert traffic(MISTRAL, setting(8), 4) == 8 * trained
    assert traffic(MISTRAL, setting(8, "zero2"), 4) == 2 * trained * 5
    assert traffic(MISTRAL, setting(8, "fsdp"), 1) == 2 * 2 * MISTRAL.parameters + 2 * trained
    four_bit = traffic(MISTRAL, setting(8, "fsdp", quantization="nf4"), 1)
    assert four_bit < 0.4 * traffic(MISTRAL, setting(8, "fsdp"), 1)


@pytest.mark.parametrize("base", ["bf16", "NF4"])
@pytest.mark.parametrize("strategy", ["zero2", "fsdp", "zero3"])
def test_two_gpus_that_share_are_as_fast_as_was_measured(strategy: Strategy, base: str) -> None:
    """By benchmarks/h200x2.py; nothing is expected of what the host does."""
    rows = json.loads((ROOT / "benchmarks/results/h200x2.json").read_text())
    measured = next(row["examples_per_s"] for row in rows if row["name"] == f"{strategy}, {base}")
    how = setting(2, strategy, **({} if base == "bf16" else {"quantization": "nf4", "checkpointing": True}))
    pace = expected(MISTRAL, how, MEASURED, gpu="NVIDIA H200", nodes=1, network_gbit=None)
    offloaded = expected(MISTRAL, replace(how, offload=True), MEASURED, gpu="NVIDIA H200", nodes=1, network_gbit=None)
    assert offloaded is None
    assert pace is not None
    assert pace.bound == "starting kernels"
    assert pace.examples_per_s == pytest.approx(measured, rel=0.05)


def test_a_slow_network_is_what_saturates() -> None:
    """And where nobody has said how fast it is, nothing is expected."""
    how = setting(64, "fsdp")
    fast, slow = (
        expected(MISTRAL, how, MEASURED, gpu="NVIDIA H100 80 GB", nodes=8, network_gbit=gbit) for gbit in (3200, 100)
    )
    assert fast is not None
    assert slow is not None
    assert (fast.bound, slow.bound) == ("starting kernels", "network between nodes")
    received = (2 * 2 * MISTRAL.parameters + 2 * lora_parameters(MISTRAL, LORA)) * 7 / 8
    assert slow.step_seconds == pytest.approx(received / (100e9 / 8 * 0.8))
    assert expected(MISTRAL, how, MEASURED, gpu="NVIDIA H100", nodes=8, network_gbit=None) is None
    assert expected(MISTRAL, how, MEASURED, gpu="GeForce GTX 1080", nodes=1, network_gbit=None) is None


def test_a_pace_is_read_without_exponents() -> None:
    """The figures of docs/scaling.md, however many GPUs there are."""
    pace = Pace(
        examples_per_s=27881.6,
        step_seconds=0.7312,
        arithmetic_seconds=0.7312,
        traffic_gb=282.1,
        traffic_seconds=0.00092,
        bound="arithmetic",
    )
    assert described(pace, 3) == (
        "about 27,882 examples/s: 731 ms a step, 282 GB from other GPUs in 0.92 ms; bound by arithmetic; 2.19 s for all steps"
    )


@pytest.mark.usefixtures("shared_data")
def test_the_table_of_the_page_is_what_plans_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `benchmarks/scaling_table.py --write` puts it there."""
    path = ROOT / "benchmarks" / "scaling_table.py"
    found = importlib.util.spec_from_file_location("scaling_table", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "scaling_table", module)
    found.loader.exec_module(module)
    page = module.PAGE.read_text(encoding="utf-8").split(module.BEGIN)[1].split(module.END)[0]
    assert page.strip() == "\n".join(module.lines()), "run: python benchmarks/scaling_table.py --write"
