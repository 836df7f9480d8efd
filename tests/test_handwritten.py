"""Training by the hand-written passes: whole runs end as with the model's own, and what they cannot do is said."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model

from finllm import scoring
from finllm.errors import RecipeError, RunError
from finllm.fast.engine import Engine
from finllm.machine import Gpu, Machine
from finllm.plan import Plan, Rows, decide
from finllm.recipe import Recipe
from finllm.shared_prefix import attending, shared_length
from finllm.training import handwritten
from finllm.training.batches import Row, stream

# Checkpointing has new names in Transformers 5.23; PEFT 0.21.2, TRL 1.16 and Transformers 5.17 know only the old ones.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
H200 = Machine((Gpu("NVIDIA H200", 139.8, 9.0),), 16)


def text_rows(folder: Path, count: int) -> list[Row]:
    """Rows of the shipped sample, as training makes them."""
    from finllm.data.sample import Sample
    from finllm.prompts import Prompter
    from finllm.recipe import Prompt
    from finllm.training.batches import encode

    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    examples = [e for e in Sample(name="sample").read() if e.split == "train" and len(e.text) < 90]
    return encode(examples[:count], Prompter(tokenizer, Prompt()))


def loaded(folder: Path, **lora: Any) -> Any:
    """The tiny model of the fixture with LoRA whose second factors are not 0."""
    hf.utils.logging.set_verbosity_error()
    made = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    torch.manual_seed(5)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    made = get_peft_model(made, LoraConfig(**settings))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return made


def trained(folder: Path, output: Path, *, by_hand: bool, resume: bool = False, **more: Any) -> tuple[Any, list[float]]:
    """A model after training on 30 rows, by the hand-written passes or its own, and the losses."""
    from trl import SFTConfig

    from finllm.data.sample import Sample
    from finllm.training.sft import Sft
    from finllm.training.watching import LossWatch

    made, rows = loaded(folder), text_rows(folder, 30)
    shared = shared_length([row.prompt for row in rows])
    usual: dict[str, Any] = {
        "num_train_epochs": 2, "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "optim": "adamw_torch",
        "logging_steps": 1, "report_to": [], "save_strategy": "steps", "save_steps": 2, "use_cpu": True, "bf16": False,
        "seed": 3, "disable_tqdm": True, "remove_unused_columns": False, "max_length": None, "max_grad_norm": 0.5,
        "gradient_checkpointing": False, "dataloader_pin_memory": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }  # fmt: skip
    trainer = Sft(
        model=made,
        processing_class=hf.AutoTokenizer.from_pretrained(folder),
        args=SFTConfig(output_dir=str(output), **{**usual, **more}),
        rows=rows,
        collate=partial(handwritten.packed, shared=shared, device="cpu") if by_hand else stream,
        losses=LossWatch(Sample(name="sample").read()),
        validation=None,
        engine=Engine(made) if by_hand else None,
    )
    with attending(made, streams=not by_hand):
        trainer.train(resume_from_checkpoint=str(output / "checkpoint-2") if resume else None)
    return made, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(made: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in made.parameters() if p.requires_grad])


def error(one: Any, other: Any) -> float:
    return float((weights(one) - weights(other)).norm() / weights(other).norm())


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_whole_run_ends_in_the_weights_of_the_models_own_passes(
    tiny_model: Path, tmp_path: Path, accumulation: int
) -> None:
    """With clipped gradients, an incomplete last step, and passes that have no rows at all."""
    sizes: dict[str, Any] = {
        "per_device_train_batch_size": 16 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    own, own_losses = trained(tiny_model, tmp_path / "own", by_hand=False, **sizes)
    made, losses = trained(tiny_model, tmp_path / "hand", by_hand=True, **sizes)
    assert losses == pytest.approx(own_losses, rel=1e-5)
    assert error(made, own) < 1e-5
    assert error(made, loaded(tiny_model)) > 1e-3  # it did learn


def test_a_resumed_run_ends_in_the_same_weights(tiny_model: Path, tmp_path: Path) -> None:
    """The checkpoint's factors are loaded into the memory that the passes read."""
    sizes: dict[str, Any] = {"per_device_train_batch_size": 16}
    whole, _ = trained(tiny_model, tmp_path, by_hand=True, **sizes)
    again, _ = trained(tiny_model, tmp_path, by_hand=True, resume=True, **sizes)
    assert error(again, whole) < 1e-6


def test_the_saved_adapter_is_what_was_trained(tiny_model: Path, tmp_path: Path) -> None:
    made, _ = trained(tiny_model, tmp_path, by_hand=True, per_device_train_batch_size=16)
    base = hf.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    saved = PeftModel.from_pretrained(base, str(tmp_path / "checkpoint-4"), is_trainable=True)
    assert error(saved, made) == 0


def test_the_scorer_uses_an_engine_with_the_adapter_on_and_off(tiny_model: Path) -> None:
    made, prompts = loaded(tiny_model).eval(), [row.prompt for row in text_rows(tiny_model, 9)]
    engine, answers = Engine(made), [(17,), (40,), (250,)]
    for answer in (answers, [(17, 5), (40,), (17, 9)]):
        plain = scoring.score(made, prompts, answer, batch_tokens=4096)
        fast = scoring.score(made, prompts, answer, batch_tokens=4096, engine=engine)
        assert abs(fast - plain).max() < 1e-5
    with made.disable_adapter():
        off = scoring.score(made, prompts, answers, batch_tokens=4096)
        fast_off = scoring.score(made, prompts, answers, batch_tokens=4096, engine=engine)
    assert abs(fast_off - off).max() < 1e-5
    assert abs(off - scoring.score(made, prompts, answers, batch_tokens=4096)).max() > 1e-3


def plan_of(tmp_path: Path, here: Machine = H200, **changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "model": {"name": "a/b", "quantization": changes.pop("quantization", "nf4")},
        "data": "sample",
        "lora": {"dropout": changes.pop("dropout", 0.0)},
        "distributed": {"strategy": changes.pop("strategy", "auto")},
        "train": {"method": "sft", "global_batch": 64, **changes},
    }
    recipe = Recipe.model_validate(settings)
    return decide(recipe, here=here, rows=Rows(train=640, validation=8, test=8), folder=tmp_path, source="x.yaml")


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_plan_uses_them_on_gpus(tmp_path: Path, gpus: int) -> None:
    plan = plan_of(tmp_path, Machine(H200.gpus * gpus, 16))
    assert plan.hand_written
    assert any("hand-written passes on" in reason for reason in plan.reasons)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"here": Machine((), 2)}, "need a GPU, and bf16"),
        ({"here": Machine((Gpu("NVIDIA T4", 14.6, 7.5),), 2)}, "need a GPU, and bf16"),
        ({"here": Machine(H200.gpus * 2, 16), "strategy": "fsdp"}, "weights in one place, which fsdp shares out"),
        ({"dropout": 0.1}, "LoRA without dropout"),
        ({"quantization": "int8"}, "read bf16, or NF4"),
        ({"shared_prefix": "off"}, "train.shared_prefix is off"),
    ],
    ids=["CPU", "an old GPU", "weights shared out", "dropout", "int8", "separate rows"],
)
def test_the_plan_says_why_it_does_without_them(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    plan = plan_of(tmp_path, **changes)
    assert not plan.hand_written
    assert any(reason.startswith("hand-written passes off") and said in reason for reason in plan.reasons)
    with pytest.raises((RecipeError, ValueError), match="hand_written is on"):
        plan_of(tmp_path, **changes, hand_written="on")


def test_a_recipe_can_do_without_them(tmp_path: Path) -> None:
    assert not plan_of(tmp_path, hand_written="off").hand_written


def test_the_model_itself_is_asked(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a model that the passes know they are used; where they are not, the log says why, or the run ends."""
    rows = text_rows(tiny_model, 6)
    plan = plan_of(tmp_path).model_copy(update={"device": "cpu", "dequantize": True})
    assert handwritten.engine(loaded(tiny_model), rows, plan, is_main=True) is not None
    dora = loaded(tiny_model, use_dora=True)
    assert handwritten.engine(dora, rows, plan, is_main=True) is None
    assert "hand-written passes off: LoRA with dropout or DoRA" in capsys.readouterr().out
    train = plan.recipe.train
    assert train is not None
    forced = plan.recipe.model_copy(update={"train": train.model_copy(update={"hand_written": "on"})})
    with pytest.raises(RunError, match=r"hand_written is on, but LoRA with dropout or DoRA; write auto"):
        handwritten.engine(dora, rows, plan.model_copy(update={"recipe": forced}), is_main=True)


def test_passes_that_compute_something_else_are_not_used(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model whose layers do more than the passes know, here a gate that is squared."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def squared(self: Any, x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) ** 2 * 50 * self.up_proj(x))
        return down

    monkeypatch.setattr(LlamaMLP, "forward", squared)
    plan = plan_of(tmp_path).model_copy(update={"device": "cpu", "dequantize": True})
    assert handwritten.engine(loaded(tiny_model), text_rows(tiny_model, 6), plan, is_main=True) is None
    assert "compute log-probabilities that differ by" in capsys.readouterr().out
