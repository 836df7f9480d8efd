"""A GPU whose memory runs out in the middle of a run: the supervisor goes on with less, to the same losses."""

import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finllm import data, machine
from finllm.journal import history
from finllm.learnt import counted
from finllm.plan import Plan, decide
from finllm.recipe import load
from finllm.run import Run, State, create
from launch.show import Silent
from launch.supervisor import supervise

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
TRAINER = """
    import sys, torch
    from finllm import training
    from finllm.training import sft

    class Narrow(sft.Sft):
        '''From step FROM on, torch may use no more than 0.7 of what PEAK GiB were beyond weights and their states.'''

        def training_step(self, *inputs, **more):
            if self.state.global_step >= FROM:
                held, peak = torch.cuda.memory_allocated(), PEAK * 2**30
                whole = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction((held + 0.7 * (peak - held)) / whole)
            return super().training_step(*inputs, **more)

    training.METHODS["sft"] = Narrow
    from finllm.train import main
    sys.exit(main(sys.argv[1:]))
"""
RECIPE = """\
model: {{name: {model}, dtype: {dtype}}}
data: sample
lora: {{rank: 8}}
train: {{method: sft, max_steps: 10, global_batch: 32, micro_batch: 32, gradient_checkpointing: false, learning_rate: 2e-4,
  evals_per_epoch: 4, optimizer: adamw}}
evaluation: {{base: false, batch_tokens: 1024, classifiers: []}}
tracking: {{wandb: disabled}}
resources: {{gpus: 1}}
"""


@pytest.fixture(scope="module")
def wide_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers, 1,024 wide: what a batch needs is more than what the weights do."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    folder = tmp_path_factory.mktemp("wide")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=4096, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=4, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return folder


def trained(model: Path, folder: Path, dtype: str, *, start: int, peak: float) -> tuple[Run, State]:
    """A run under the supervisor whose memory is short from step `start` on."""
    folder.mkdir()
    path = folder / "wide.yaml"
    path.write_text(RECIPE.format(model=model, dtype=dtype))
    recipe = load(path)
    run = create(folder / "runs", "wide")
    rows, texts = counted(recipe, data.read_parts(recipe.data))
    plan = decide(recipe, here=machine.here(), rows=rows, folder=run.folder, source=str(path), texts=texts)
    script = run.folder / "narrow.py"
    script.write_text(textwrap.dedent(TRAINER.replace("FROM", str(start)).replace("PEAK", str(peak))))
    commands = {"train": (sys.executable, str(script), str(run.folder))}
    plan.model_copy(update={"commands": commands}).save(run)
    State("created").save(run)
    return run, supervise(run, Silent(), ["train"])


def numbers(run: Run, name: str) -> list[float]:
    """A figure of each step; of a step that was taken again, the last."""
    found: dict[Any, float] = {r.step: r.numbers[name] for r in history(run) if name in r.numbers}
    return list(found.values())


@pytest.mark.parametrize(("dtype", "within"), [("fp32", 1e-3), ("bf16", 3e-2)], ids=["fp32", "by hand in bf16"])
def test_a_run_whose_gpu_is_full_goes_on_to_the_same_losses(
    wide_model: Path, tmp_path: Path, dtype: str, within: float
) -> None:
    """A real allocation fails at step 7 of 10; half the micro-batch goes on from a checkpoint, with the same steps."""
    whole, ended = trained(wide_model, tmp_path / "whole", dtype, start=10**9, peak=1.0)
    assert (ended.status, ended.attempt) == ("done", 1)
    run, state = trained(wide_model, tmp_path / "narrow", dtype, start=6, peak=max(numbers(whole, "train/memory_gib")))
    log, after = run.log.read_text(), Plan.of(run)
    assert state.status == "done", log[-3000:]
    assert state.attempt > 1
    assert "CUDA out of memory" in log
    assert "from checkpoint-" in log
    assert after.micro_batch in {16, 8}
    assert after.micro_batch * after.accumulation == 32
    expected, found = np.array(numbers(whole, "train/loss")), np.array(numbers(run, "train/loss"))
    assert len(expected) == 10
    np.testing.assert_allclose(found, expected, rtol=0, atol=within)
    assert np.abs(np.diff(expected)).max() > 2 * within  # other examples have other losses: the comparison can fail
