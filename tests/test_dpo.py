"""DPO on streams: the loss, every gradient and whole runs are those of TRL's trainer on separate rows."""

import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

import launched
from finllm.data.preferences import Preference
from finllm.errors import RunError
from finllm.fast.engine import Engine
from finllm.run import Run
from finllm.shared_prefix import BRANCHES, NAME, attending, shared_length
from finllm.training import pairs
from finllm.training.batches import GlobalBatches
from finllm.training.dpo import Dpo, log_probabilities, refuse_another_policy
from finllm.training.pairs import PairRow
from finllm.training.watching import LossWatch
from launched import figures

# Checkpointing has new names in Transformers 5.23; PEFT 0.21.2, TRL 1.16 and Transformers 5.17 know only the old ones.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

WITHIN = 5e-6
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "attn_implementation": "sdpa",
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "mistral with a short window": lambda: hf.MistralConfig(**SIZES, sliding_window=12),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
}
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid and sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.2},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "sft": {"loss_type": ["sft"]},
}


def adapted(base: Any, seed: int = 5) -> Any:
    """The model with adapters as in the middle of training: their second factors are not 0."""
    torch.manual_seed(seed)
    made = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return made


def model(name: str = "llama") -> Any:
    hf.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    return adapted(hf.AutoModelForCausalLM.from_config(CONFIGS[name]()))


def tokenizer(folder: Path) -> Any:
    made = hf.AutoTokenizer.from_pretrained(folder)
    made.pad_token = made.eos_token  # TRL would set it, with a warning
    return made


def rows(count: int, instruction: int = 14, longest: int = 3, seed: int = 0) -> list[PairRow]:
    """Pairs whose prompts have `instruction` tokens in common; answers of 1 to `longest` tokens and the end, 2."""
    draw = random.Random(seed)

    def some(length: int) -> list[int]:
        return [draw.randrange(3, 96) for _ in range(length)]

    common = some(instruction)
    made = []
    for i in range(count):
        chosen, rejected = some(draw.randint(1, longest)), some(draw.randint(1, longest))
        rejected[0] = chosen[0] if i % 3 == 2 and longest > 1 else (chosen[0] + 1 - 3) % 93 + 3
        made.append(PairRow(i, common + some(draw.randint(4, 18)), [*chosen, 2], [*rejected, 2]))
    return made


def examples(given: list[PairRow]) -> list[Preference]:
    """What the rows are called."""
    return [Preference(f"x:{row.index}", "file", "", None, "a", "b") for row in given]


def settings(output: Path, **more: Any) -> DPOConfig:
    usual: dict[str, Any] = {
        "num_train_epochs": 2, "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "optim": "adamw_torch",
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "seed": 3,
        "disable_tqdm": True, "remove_unused_columns": False, "max_length": None, "max_grad_norm": 0.5,
        "gradient_checkpointing": False, "dataloader_pin_memory": False, "beta": 0.3,
    }  # fmt: skip
    return DPOConfig(output_dir=str(output), **{**usual, **more})


def ours(made: Any, given: list[PairRow], folder: Path, output: Path, *, by: str = "streams", **more: Any) -> Dpo:
    """Our trainer on streams, on padded rows, or by the hand-written passes."""
    engine = Engine(made) if by == "hand" else None
    packed = partial(Dpo.packed, shared=shared_length([row.prompt for row in given]), device="cpu")
    return Dpo(
        model=made,
        processing_class=tokenizer(folder),
        args=settings(output, **more),
        rows=given,
        collate={"streams": partial(pairs.stream, multiple=8), "rows": pairs.pad, "hand": packed}[by],
        losses=LossWatch(examples(given)),
        validation=None,
        engine=engine,
    )


def trls(made: Any, given: list[PairRow], folder: Path, output: Path, **more: Any) -> DPOTrainer:
    """TRL's own trainer, collator and data set, going over the rows in their order."""
    from datasets import Dataset

    class InOrder(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
            return dataset

    columns = [{"prompt_ids": r.prompt, "chosen_ids": r.chosen, "rejected_ids": r.rejected} for r in given]
    return InOrder(
        model=made,
        args=settings(output, train_sampling_strategy="sequential", **more),
        train_dataset=Dataset.from_list(columns),
        processing_class=tokenizer(folder),
        data_collator=DataCollatorForPreference(pad_token_id=0),
    )


def taken(made: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.requires_grad and p.grad is not None}


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest relative error of any tensor."""
    assert found.keys() == expected.keys()
    assert expected
    return max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())


def moved(made: Any) -> Any:
    """The policy away from its reference, as after some steps."""
    torch.manual_seed(9)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.03 * torch.randn_like(parameter)
    return made


def one_step(trainer: Any, given: list[PairRow], batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch that is a whole step."""
    trainer.model.zero_grad(set_to_none=True)
    learnt = (len(given), sum(len(row.chosen) for row in given))
    if trainer._engine is not None:
        loss = trainer.training_step(trainer.model, batch, learnt)
    else:
        with attending(trainer.model, streams="read" in batch):
            loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=learnt)
            loss.backward()
    return loss.item(), taken(trainer.model)


@pytest.mark.parametrize("variant", LOSSES)
def test_loss_and_every_gradient_are_those_of_trls_trainer(variant: str, tiny_model: Path, tmp_path: Path) -> None:
    """On streams, on padded rows and by hand: each loss, with a policy that has left its reference."""
    given, more = rows(6), LOSSES[variant]
    theirs = trls(model(), given, tiny_model, tmp_path / "theirs", **more)
    moved_apart = {n: p.data.clone() for n, p in moved(model()).named_parameters() if p.requires_grad}
    for name, parameter in theirs.model.named_parameters():
        if name in moved_apart:
            parameter.data = moved_apart[name].clone()
    batch = theirs.data_collator([theirs.train_dataset[i] for i in range(6)])
    expected_loss = theirs.compute_loss(theirs.model, batch)
    expected_loss.backward()
    expected = {n: g for n, g in taken(theirs.model).items() if ".ref." not in n}
    told = {name: values[-1] for name, values in theirs._metrics["train"].items()}
    for by in ("streams", "rows", "hand"):
        trainer = ours(model(), given, tiny_model, tmp_path / by, by=by, **more)
        with attending(trainer.model, streams=by == "streams"):
            asked = [replace(row, smoothing=more.get("label_smoothing", 0.0)) for row in trainer._with_reference()]
        moved(trainer.model)
        loss, found = one_step(trainer, asked, trainer._collate(asked))
        assert loss == pytest.approx(expected_loss.item(), rel=WITHIN), by
        assert worst(found, expected) < WITHIN, by
        logs = {"loss": loss}
        trainer.log(logs)
        assert {name: logs[name] for name in told if name in logs} == pytest.approx(
            {name: told[name] for name in told if name in logs}, rel=1e-4, abs=1e-6
        )
        assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"} <= logs.keys()


def padded_and_stream(made: Any, given: list[PairRow], batch: dict[str, Any]) -> tuple[float, float]:
    """Relative error of log-probabilities and of the worst gradient, of a stream against padded rows."""
    weights = torch.linspace(-1, 1, 2 * len(given))
    found = []
    for one in (batch, pairs.pad(given)):
        made.zero_grad(set_to_none=True)
        with attending(made, streams="read" in one):
            log_p = by_rows(made, one["inputs"]) if "read" not in one else log_probabilities(made, one)
            (log_p * weights).sum().backward()
        found.append((log_p.detach(), taken(made)))
    (log_p, gradients), (expected_log_p, expected) = found
    return float((log_p - expected_log_p).norm() / expected_log_p.norm()), worst(gradients, expected)


def by_rows(made: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of padded rows by plain means."""
    labels = inputs["labels"][:, 1:]
    logits = made(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    total: torch.Tensor = (log_p * (labels >= 0)).sum(1)
    return total


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept activations", "checkpointing"])
@pytest.mark.parametrize("name", CONFIGS)
def test_streams_are_exact_on_other_models(name: str, *, checkpointing: bool) -> None:
    """Also with a window shorter than a pair, and answers that begin alike; padding at the end changes nothing."""
    made, given = model(name).train(), rows(7)
    if checkpointing:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        made.enable_input_require_grads()
    assert max(padded_and_stream(made, given, pairs.stream(given, multiple=16))) < WITHIN


@pytest.mark.parametrize("instruction", [14, 0], ids=["an instruction", "nothing in common"])
@pytest.mark.parametrize(("count", "longest"), [(1, 1), (5, 1), (4, 9)], ids=["one pair", "labels", "sentences"])
def test_every_shape_of_batch_is_exact(count: int, longest: int, instruction: int) -> None:
    made, given = model(), rows(count, instruction, longest)
    assert max(padded_and_stream(made, given, pairs.stream(given))) < WITHIN


@pytest.mark.parametrize("wrong", ["branches", "positions"])
def test_a_rejected_answer_that_sees_the_chosen_one_is_noticed(wrong: str) -> None:
    """The comparisons here can fail: with one branch instead of two, or positions that go on."""
    made, given = model(), rows(6)
    batch = pairs.stream(given)
    if wrong == "branches":
        batch["inputs"][NAME][BRANCHES].zero_()
    else:
        batch["inputs"]["position_ids"][0, 20:] += 1
    assert max(padded_and_stream(made, given, batch)) > 1e-3


def test_what_is_always_given_has_no_part_in_the_loss() -> None:
    """On streams, on padded rows and by hand: log-probabilities less those of the tokens that are given."""
    made, plain = model(), rows(5, longest=6)
    masked = [
        replace(row, given=(range(1, len(row.chosen) - 1), range(1, min(3, len(row.rejected) - 1)))) for row in plain
    ]
    assert any(row.learnt != (len(row.chosen), len(row.rejected)) for row in masked)
    assert max(padded_and_stream(made, masked, pairs.stream(masked))) < WITHIN
    with torch.no_grad():
        whole, found = (by_rows(made, pairs.pad(given)["inputs"]) for given in (plain, masked))
        by_hand = Engine(made).log_probabilities_of_pairs(
            Dpo.packed(masked, shared=shared_length([row.prompt for row in masked]), device="cpu")["stream"]
        )
    assert by_hand == pytest.approx(found, rel=1e-5)
    first, alone = masked[0], []
    for answer, given in ((first.chosen, first.given[0]), (first.rejected, first.given[1])):
        with torch.no_grad():
            log_p = made(torch.tensor([[*first.prompt, *answer]]), use_cache=False).logits[0].log_softmax(-1)
        alone.append(sum(float(log_p[len(first.prompt) - 1 + at, answer[at]]) for at in given))
    assert whole[0] - found[0] == pytest.approx(alone[0], rel=1e-4)
    assert whole[5] - found[5] == pytest.approx(alone[1], rel=1e-4, abs=1e-6)
    assert pairs.meta(masked)["learnt"] == (5, sum(row.learnt[0] for row in masked))


def test_explained_answers_are_those_that_sft_learns(tiny_model: Path) -> None:
    """The same tokens, and the same of them given; the reason of a label and the other label with the same reason."""
    from finllm.example import Example, Label
    from finllm.prompts import Prompter
    from finllm.recipe import Recipe
    from finllm.training.batches import encode

    prompter = Prompter(tokenizer(tiny_model), Recipe.model_validate({"model": "x", "data": "sample"}).prompt)
    why = "Profit rose by a fifth."
    pair = Preference("x:1", "careless", "Profit rose.", None, "positive", "negative", reasons=(why, why))
    train_ = {"method": "sft", "explanations": {}}
    sft = Recipe.model_validate({"model": "x", "data": "sample", "train": train_})
    dpo = Recipe.model_validate({"model": "x", "data": "sample", "train": {"method": "dpo", "pairs": "careless"}})
    (row,) = pairs.encode([pair], prompter, dpo)
    both: list[tuple[Label, list[int], range]] = [
        ("positive", row.chosen, row.given[0]), ("negative", row.rejected, row.given[1])
    ]  # fmt: skip
    for label, answer, given in both:
        example = Example("x:1", "x", "Profit rose.", label, "train", explanation=why)
        (learnt,) = encode([example], prompter, sft)
        assert (row.prompt, answer) == (learnt.prompt, learnt.answer)
        assert [*given] == [at for at, weight in enumerate(learnt.weights or ()) if not weight]


def test_prompt_and_instruction_stand_once_in_a_stream() -> None:
    """Of labels, a pair costs its text and one token for each answer."""
    given = rows(5, longest=1)
    own = sum(len(row.prompt) - 14 for row in given)
    assert pairs.stream(given)["inputs"]["input_ids"].numel() == 14 + own + 2 * 5
    assert pairs.pad(given)["inputs"]["input_ids"].numel() > 3 * (14 + own + 2 * 5) / 1.5


def test_label_smoothing_mixes_both_ways_round() -> None:
    """With probability a half, neither answer is preferred: the gradient is 0 where policy and reference agree."""
    from finllm.training.preferring import Loss, judge

    log_p = torch.tensor([-1.0, -2.0, -3.0, -1.5])
    figures = torch.tensor([[-1.5, -2.0], [-2.0, -2.5], [2, 2], [2, 2], [0.0, 0.4], [1, 1]])
    plain = judge(Loss(beta=0.5), log_p, figures * torch.tensor([1, 1, 1, 1, 0, 1])[:, None], (2, 4)).loss
    mixed = judge(Loss(beta=0.5), log_p, figures, (2, 4)).loss
    apart = 0.5 * torch.tensor([(-1.0 + 1.5) - (-3.0 + 2.0), (-2.0 + 2.0) - (-1.5 + 2.5)])
    expected = torch.nn.functional.softplus(-apart)
    flipped = torch.nn.functional.softplus(apart)
    assert plain.item() == pytest.approx(expected.mean().item())
    assert mixed.item() == pytest.approx(((expected[0] + 0.6 * expected[1] + 0.4 * flipped[1]) / 2).item())


def weights(made: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in made.named_parameters() if p.requires_grad and ".ref." not in n}


def trained(trainer: Any, *, streams: bool, **how: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Final weights and losses of a run."""
    with attending(trainer.model, streams=streams):
        trainer.train(**how)
    return weights(trainer.model), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("by", ["streams", "hand"])
def test_a_whole_run_ends_in_the_weights_of_trls_own_trainer(by: str, tiny_model: Path, tmp_path: Path) -> None:
    """Two epochs of 32 pairs in TRL's layout with its reference adapter, and in ours without; clipped gradients."""
    sizes: dict[str, Any] = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 1, "learning_rate": 1e-2,
    }  # fmt: skip
    given = rows(32)
    trainer = ours(model(), given, tiny_model, tmp_path / "ours", by=by, **sizes)
    found, losses = trained(trainer, streams=by == "streams")
    order = [
        i
        for batch in GlobalBatches([1] * 32, micro_batch=4, accumulation=2, rank=0, processes=1, seed=3)
        for i in batch
    ]
    theirs = trls(model(), [given[i] for i in order], tiny_model, tmp_path / "theirs", **sizes)
    expected, their_losses = trained(theirs, streams=False)
    assert losses == pytest.approx(their_losses, rel=1e-5)
    assert worst(found, expected) < 1e-5
    assert worst(found, weights(model())) > 1e-2  # it did learn


def test_another_order_of_pairs_is_noticed(tiny_model: Path, tmp_path: Path) -> None:
    """Negative control: TRL's trainer on the rows as they stand ends elsewhere."""
    sizes: dict[str, Any] = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "learning_rate": 1e-2}
    given = rows(32)
    found, _ = trained(ours(model(), given, tiny_model, tmp_path / "ours", **sizes), streams=True)
    expected, _ = trained(trls(model(), given, tiny_model, tmp_path / "theirs", **sizes), streams=False)
    assert worst(found, expected) > 1e-3


@pytest.mark.parametrize("by", ["streams", "rows", "hand"])
def test_the_micro_batch_changes_nothing(by: str, tiny_model: Path, tmp_path: Path) -> None:
    """With steps that are not full, and passes that have no pairs at all."""
    more: dict[str, Any] = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    given = rows(19)
    ends = []
    for micro, accumulation in ((16, 1), (4, 4)):
        sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation, **more}
        trainer = ours(model(), given, tiny_model, tmp_path / str(micro), by=by, **sizes)
        ends.append(trained(trainer, streams=by == "streams"))
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-5)
    assert worst(ends[0][0], ends[1][0]) < 1e-5


@pytest.mark.parametrize("by", ["streams", "hand"])
def test_a_resumed_run_restores_the_policy_and_ends_as_one_that_was_not_stopped(
    by: str, tiny_model: Path, tmp_path: Path
) -> None:
    """The checkpoint holds the policy alone: Transformers 5.19 to 5.21 restore a reference beside it, and not the policy."""
    sizes: dict[str, Any] = {
        "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2,
    }  # fmt: skip
    given = rows(24)
    whole, losses = trained(ours(model(), given, tiny_model, tmp_path, by=by, **sizes), streams=by == "streams")
    saved = tmp_path / "checkpoint-2"
    assert [path.name for path in saved.rglob("adapter_model.safetensors")] == ["adapter_model.safetensors"]
    again = ours(model(), given, tiny_model, tmp_path, by=by, **sizes)
    found, more = trained(again, streams=by == "streams", resume_from_checkpoint=str(saved))
    assert more == pytest.approx(losses, rel=1e-6)
    assert worst(found, whole) < 1e-6
    hf.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    base = hf.AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    policy = weights(PeftModel.from_pretrained(base, str(tmp_path / "checkpoint-6"), is_trainable=True))
    assert worst(policy, whole) == 0


def test_a_resume_that_restores_another_adapter_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Transformers 5.19 to 5.21 did where a checkpoint holds two: the run ends, and names version and checkpoint."""
    sizes: dict[str, Any] = {"per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 2}
    trainer = ours(model(), rows(24), tiny_model, tmp_path, learning_rate=1e-2, **sizes)
    trained(trainer, streams=True)
    saved = tmp_path / "checkpoint-2"
    with pytest.raises(RunError, match=r"did not restore the policy \(\d+ of \d+ weights differ"):
        refuse_another_policy(trainer.model, saved)  # step 6 against step 2
    refuse_another_policy(trainer.model, tmp_path / "checkpoint-6")
    again = ours(model(), rows(24), tiny_model, tmp_path, **sizes)
    monkeypatch.setattr(hf.Trainer, "_load_from_checkpoint", lambda *_: None)
    with pytest.raises(RunError, match=rf"Transformers {hf.__version__} did not restore the policy"):
        trained(again, streams=True, resume_from_checkpoint=str(saved))


def test_trls_own_trainer_saves_its_reference_beside_the_policy(tiny_model: Path, tmp_path: Path) -> None:
    """Negative control of the resume test: so checkpoints would look with TRL's second adapter."""
    theirs = trls(model(), rows(8), tiny_model, tmp_path, per_device_train_batch_size=8, save_strategy="epoch",
                  num_train_epochs=1)  # fmt: skip
    theirs.create_model_card = lambda *_, **__: None
    theirs.train()
    assert (tmp_path / "checkpoint-1" / "ref" / "adapter_model.safetensors").is_file()


Train = Callable[..., Run]


@pytest.fixture(scope="module")
def sft(train: Train, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of one epoch, from which the others go on."""
    return train(recipe, tmp_path_factory.mktemp("sft"), "train.epochs=1", "train.shared_prefix=auto")


@pytest.fixture(scope="module")
def preferring(recipe: Path, sft: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DPO recipe on the rows of that run, as a user's own pairs."""
    return launched.preferring(recipe, sft, tmp_path_factory.mktemp("dpo"))


@pytest.fixture(scope="module")
def whole(train: Train, preferring: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(preferring, tmp_path_factory.mktemp("whole"))


def test_a_run_goes_on_from_an_sft_run(whole: Run, sft: Run) -> None:
    """It begins where SFT ended, learns to prefer, and keeps the same shape of adapter; margins are in metrics.jsonl."""
    from safetensors.torch import load_file

    before, after = (load_file(run.adapter / "adapter_model.safetensors") for run in (sft, whole))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    margins, accuracies = figures(whole, "train/rewards/margins"), figures(whole, "train/rewards/accuracies")
    chosen, rejected = figures(whole, "train/rewards/chosen"), figures(whole, "train/rewards/rejected")
    assert margins[0] == pytest.approx(0, abs=1e-6)
    assert sum(margins[-4:]) / 4 > 0.02
    assert margins == pytest.approx([one - other for one, other in zip(chosen, rejected, strict=True)], abs=1e-6)
    assert all(0 <= share <= 1 for share in accuracies)
    assert figures(whole, "validation/loss")


def test_evaluation_compares_it_with_its_base(whole: Run) -> None:
    """A DPO run's folder is like any other's: evaluation and prediction take it as it is."""
    from finllm import SentimentPredictor
    from finllm.evaluate import evaluate

    evaluate(whole)
    assert whole.scores.is_file()
    assert SentimentPredictor(whole.folder).predict("Profits today.")["sentiment"] in launched.OTHER


def test_the_policy_begins_as_its_reference_on_a_quantised_base(train: Train, preferring: Path, tmp_path: Path) -> None:
    """TRL would round the adapter to bf16, so that the first loss were not log 2; a step later it is."""
    run = train(preferring, tmp_path, "model.quantization=nf4", "train.sft_weight=0", "train.max_steps=3")
    losses = figures(run, "train/loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses[2] - math.log(2)) > 1e-4


def test_a_fresh_adapter_prefers_against_the_base_model(train: Train, preferring: Path, tmp_path: Path) -> None:
    """Without `init`, the base model is the reference; without LoRA, all weights are trained."""
    for more in ((), ("lora=null",)):
        run = train(
            preferring, tmp_path / str(len(more)), "train.init=null", "train.epochs=1", "train.sft_weight=0", *more
        )
        assert figures(run, "train/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
        assert figures(run, "train/rewards/margins")[-1] > 0


def test_rows_and_streams_take_the_same_steps(train: Train, whole: Run, preferring: Path, tmp_path: Path) -> None:
    """The recipe's shared_prefix changes no loss."""
    run = train(preferring, tmp_path, "train.shared_prefix=off", "train.micro_batch=4")
    assert figures(run, "train/loss") == pytest.approx(figures(whole, "train/loss"), abs=2e-4)


FSDP = """
distributed_type: FSDP
use_cpu: true
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: false
"""
ZERO = "distributed_type: DEEPSPEED\nuse_cpu: false\ndeepspeed_config: {zero_stage: STAGE, zero3_init_flag: false}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "configuration",
    ["distributed_type: MULTI_GPU\nuse_cpu: true\n", FSDP, ZERO.replace("STAGE", "2"), ZERO.replace("STAGE", "3")],
    ids=["ddp", "fsdp", "zero2", "zero3"],
)
def test_two_processes_take_the_steps_of_one(whole: Run, preferring: Path, tmp_path: Path, configuration: str) -> None:
    """Each asks the reference of its share of the pairs; losses, rewards and weights are those of one process.

    Under a user's own configuration of Accelerate.
    """
    from safetensors.torch import load_file

    own = tmp_path / "accelerate.yaml"
    own.write_text(f"num_processes: 2\nmixed_precision: 'no'\n{configuration}")
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(own)]
    environment = {
        **os.environ, "FINLLM_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    done = subprocess.run(
        [*accelerate, "-m", "finllm.train", str(preferring)],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = Run(tmp_path / "runs" / preferring.stem)
    for name in ("train/loss", "train/rewards/margins", "train/logps/chosen"):
        assert figures(run, name) == pytest.approx(figures(whole, name), abs=2e-4)
    one, two = (load_file(found.adapter / "adapter_model.safetensors") for found in (whole, run))
    assert worst(two, one) < 1e-3


def test_a_stopped_run_continues_to_the_same_losses(
    train: Train, whole: Run, preferring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of an epoch and resumed by the command: the reference is SFT's again, the policy its own."""
    from finllm import train as command
    from finllm.training import stopping

    seen = 0

    class StopLater(stopping.StopRequests):
        @property
        def reason(self) -> str | None:
            nonlocal seen
            seen += 1
            return "the test" if seen == 4 else None

    with monkeypatch.context() as patched:
        patched.setattr(stopping, "StopRequests", StopLater)
        run = train(preferring, tmp_path)
    assert not run.adapter.exists()
    before = figures(run, "train/loss")
    assert command.main([str(run.folder)]) == 0
    losses = [*before, *figures(run, "train/loss")[len(before) :]]
    assert losses == pytest.approx(figures(whole, "train/loss"), abs=1e-6)
    assert figures(run, "train/rewards/margins") == pytest.approx(figures(whole, "train/rewards/margins"), abs=1e-6)
