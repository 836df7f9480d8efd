"""The shared prefix computes what separate rows compute: loss, every gradient, and whole runs."""

import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from finllm import shared_prefix
from finllm.errors import RecipeError, RunError
from finllm.machine import Gpu, Machine
from finllm.plan import Rows, decide
from finllm.recipe import Recipe
from finllm.shared_prefix import IGNORED, attending, layout, places, shared_length
from finllm.training import sharing
from finllm.training.batches import Row, pad, stream

# Checkpointing has new names in Transformers 5.23; PEFT 0.21.2, TRL 1.16 and Transformers 5.17 know only the old ones.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

WITHIN = {torch.float32: 5e-6, torch.float64: 1e-7}  # Transformers' RMSNorm rounds to fp32 inside, even in fp64
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,  # attention as uneven as in a trained model; with 0.02 it would be all but uniform
    "attn_implementation": "sdpa",
}
WINDOW = 12  # shorter than an instruction of 14 tokens and the text behind it
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "mistral with a short window": lambda: hf.MistralConfig(**SIZES, sliding_window=WINDOW),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **SIZES,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=16,
    ),
}


def model(name: str, kind: torch.dtype = torch.float32, *, lora: bool = False, checkpointing: bool = False) -> Any:
    """A model as in the middle of training: LoRA's second factors are not 0, or the first would have no gradient."""
    hf.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    made = hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).to(kind)
    if lora:
        made = get_peft_model(made, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        for parameter_name, parameter in made.named_parameters():
            if "lora" in parameter_name:
                parameter.data = parameter.data.to(kind)
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.02)
    if checkpointing:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        made.enable_input_require_grads()
    return made.train()


def rows(count: int, instruction: int = 14, label_tokens: Sequence[int] = (1, 2, 3), seed: int = 0) -> list[Row]:
    """Rows of 20 to 34 prompt tokens, of which 14 are common to all, and answers that end with token 2."""
    draw = random.Random(seed)

    def some(length: int) -> list[int]:
        return [draw.randrange(3, 96) for _ in range(length)]

    common = some(instruction)
    return [
        Row(i, common + some(draw.randint(6, 20)), [*some(draw.choice(list(label_tokens))), 2]) for i in range(count)
    ]


def loss_of(made: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Mean cross-entropy of the labels, by plain means."""
    inputs = {name: value for name, value in batch.items() if name not in {"labels", "meta"}}
    logits = made(**inputs, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)


def gradients(made: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    made.zero_grad(set_to_none=True)
    loss = loss_of(made, batch)
    loss.backward()
    return loss.item(), taken(made)


def taken(made: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.requires_grad and p.grad is not None}


def errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error of each tensor, and of all of them as one vector under the name `all`."""
    assert found.keys() == expected.keys()
    assert expected
    each = {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()}
    one, other = (torch.cat([tensors[name].flatten() for name in expected]) for tensors in (found, expected))
    return {**each, "all": float((one - other).norm() / other.norm())}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept activations", "checkpointing"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_every_gradient_are_those_of_separate_rows(
    name: str, kind: torch.dtype, *, lora: bool, checkpointing: bool
) -> None:
    """On shapes with grouped queries, windows shorter than a row, and layers that differ; answers of 2 to 4 tokens."""
    made = model(name, kind, lora=lora, checkpointing=checkpointing)
    batch = rows(6)
    expected_loss, expected = gradients(made, pad(batch))
    with attending(made):
        loss, found = gradients(made, stream(batch, multiple=16))
    assert loss == pytest.approx(expected_loss, rel=WITHIN[kind])
    wrong = errors(found, expected)
    if name == "gemma3" and not lora:  # Gemma's gains are summed in fp32 by Transformers, whatever their own type
        gains = [key for key in wrong if key.endswith("norm.weight")]
        assert gains
        assert max(wrong.pop(key) for key in gains) <= max(WITHIN[kind], 5e-7)
    assert max(wrong.values()) <= WITHIN[kind], max(wrong, key=wrong.__getitem__)


@pytest.mark.parametrize("label_tokens", [(1,), (3,)], ids=["one label token", "three label tokens"])
@pytest.mark.parametrize("instruction", [14, 0], ids=["an instruction", "nothing in common"])
@pytest.mark.parametrize("count", [1, 5], ids=["one row", "five rows"])
def test_every_shape_of_batch_is_exact(label_tokens: tuple[int, ...], instruction: int, count: int) -> None:
    """Also where a micro-batch has a single row, or nothing to share."""
    made = model("llama", torch.float64)
    batch = rows(count, instruction, label_tokens)
    expected_loss, expected = gradients(made, pad(batch))
    with attending(made):
        loss, found = gradients(made, stream(batch))
    assert loss == pytest.approx(expected_loss, rel=1e-7)
    assert max(errors(found, expected).values()) <= 1e-7


@pytest.mark.parametrize("fault", ["rows see each other", "positions go on", "a longer window"])
def test_a_fault_would_be_seen(fault: str) -> None:
    """A wrong mask, wrong positions or a window left out is far outside the tolerance."""
    made = model("mistral with a short window" if fault == "a longer window" else "llama")
    batch = stream(rows(6))
    with attending(made):
        _, right = gradients(made, batch)
        if fault == "rows see each other":
            batch = seeing_each_other(rows(6))
        elif fault == "positions go on":
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        else:
            made.config.sliding_window = 4096
        _, wrong = gradients(made, batch)
    assert errors(wrong, right)["all"] > 1000 * WITHIN[torch.float32]


def seeing_each_other(given: Sequence[Row | None]) -> dict[str, Any]:
    """A stream with a wrong mask: each token attends to all before it."""
    batch = stream(given)
    return {**batch, "shared_prefix": places(0, [batch["input_ids"].shape[1]], 0)}


def test_a_stream_holds_the_instruction_once_and_no_end_of_sequence() -> None:
    """Tokens, positions and labels of three rows, spelt out; the last label stands where padding is."""
    found = layout([[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 4]], [[30, 2], [31, 32, 2], [2]], multiple=4)
    assert found["input_ids"].tolist() == [[5, 6, 7, 8, 30, 9, 31, 32, 7, 4, 0, 0]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 0, 1]]
    no = IGNORED
    assert found["labels"].tolist() == [[no, no, no, no, 30, 2, 31, 32, 2, no, 2, no]]
    assert found["shared_prefix"]["rows"].tolist() == [[2, 3, 4], [5, 6, 7], [8, 9, 9]]


def test_a_prompt_keeps_its_last_token() -> None:
    """Also where one prompt begins another: its last token has to predict a label of its own."""
    assert shared_length([[1, 2, 3], [1, 2, 3, 4]]) == 2
    assert shared_length([[1, 2, 3], [1, 2, 3]]) == 2
    assert shared_length([[7], [7, 8]]) == 0


def test_a_pass_without_rows_has_a_loss_of_nothing() -> None:
    """Such passes fill the last step of an epoch; their gradient is 0, not missing and not NaN."""
    made = model("llama")
    batch = stream([None, None])
    assert batch["meta"] == pad([None])["meta"] == {"rows": [], "tokens": 0}
    assert bool((batch["labels"] == IGNORED).all())
    with attending(made):
        made(**{k: v for k, v in batch.items() if k not in {"labels", "meta"}}).logits.sum().mul(0).backward()
    assert all(bool((gradient == 0).all()) for gradient in taken(made).values())


def test_both_batches_count_the_same_rows_and_tokens() -> None:
    """Throughput is told in the tokens of the examples, however few of them are computed."""
    batch = rows(5)
    assert stream([*batch, None])["meta"] == pad([*batch, None])["meta"]


@pytest.mark.parametrize("window", [None, 6], ids=["whole", "window"])
@pytest.mark.parametrize("shared", [7, 0], ids=["instruction", "none"])
def test_segments_are_the_rows(shared: int, window: int | None) -> None:
    """The keys and bounds that a GPU's kernel gets, worked off one by one, give the same values and gradients."""
    torch.manual_seed(0)
    where = places(shared, [3, 1, 5], 4)
    tokens = shared + 3 + 1 + 5
    query, key, value = (torch.randn(1, heads, tokens + 4, 8, dtype=torch.float64) for heads in (4, 2, 2))
    outputs, slopes = [], []
    for kernel in (shared_prefix.on_padded_rows, one_by_one):
        q, k, v = (tensor.clone().requires_grad_() for tensor in (query, key, value))
        output = kernel(q, k, v, where, window, 0.3)[:tokens]
        slopes.append(torch.autograd.grad(output.square().sum(), (q, k, v)))
        outputs.append(output)
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(slopes[0], slopes[1])


def one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, where: Any, window: int | None, scaling: float | None
) -> torch.Tensor:
    """What FlashAttention does with `queries` and `keys`, in plain words: each segment's last query at its last key."""
    queries = query[0].transpose(0, 1)
    keys, values = (shared_prefix.attended(tensor, where).repeat_interleave(2, dim=1) for tensor in (key, value))
    parts = []
    for i in range(len(where["queries"]) - 1):
        mine = slice(int(where["queries"][i]), int(where["queries"][i + 1]))
        seen = slice(int(where["keys"][i]), int(where["keys"][i + 1]))
        scores = torch.einsum("qhd,khd->hqk", queries[mine], keys[seen]) * (scaling or 1.0)
        count, total = scores.shape[1:]
        assert count <= where["most_queries"]
        assert total <= where["most_keys"]
        distance = torch.arange(total - count, total)[:, None] - torch.arange(total)
        hidden = (distance < 0) | (distance >= (window or total))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, values[seen]))
    return torch.cat(parts)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 40], ids=["whole", "window"])
@pytest.mark.parametrize("shared", [33, 0], ids=["instruction", "none"])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_kernel_for_segments_is_exact_on_a_gpu(shared: int, window: int | None, size: int) -> None:
    """In bf16, against fp32 on padded rows: values and gradients within bf16's rounding."""
    torch.manual_seed(0)
    where = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in places(shared, [30, 1, 61, 8], 7).items()}
    tokens = shared + 100
    given = [torch.randn(1, heads, tokens + 7, size, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2)]
    found = []
    for kernel, kind in ((shared_prefix.on_padded_rows, torch.float32), (shared_prefix.on_segments, torch.bfloat16)):
        q, k, v = (tensor.to(kind).requires_grad_() for tensor in given)
        output = kernel(q, k, v, where, window, 0.1)[:tokens]
        slopes = torch.autograd.grad(output.float().square().sum(), (q, k, v))
        found.append([output.detach().float(), *(slope.float() for slope in slopes)])
    for expected, got in zip(*found, strict=True):
        assert float((got - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"dropout": 0.1}, "dropout of 0.1"),
        ({"is_causal": False}, "not causal"),
        ({"shared_prefix": None}, "something else"),
        ({"attention_mask": torch.ones(1, 1, 9, 9)}, "something else"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_attention_cannot_do_is_refused(arguments: dict[str, Any], said: str) -> None:
    """An argument that a model passes is never ignored silently."""
    tokens = torch.randn(1, 2, 9, 8)
    usual: dict[str, Any] = {"attention_mask": None, "shared_prefix": places(3, [4, 2], 0), "softcap": None}
    shared_prefix.attention(torch.nn.Module(), tokens, tokens, tokens, **usual)
    with pytest.raises(RunError, match=said):
        shared_prefix.attention(torch.nn.Module(), tokens, tokens, tokens, **{**usual, **arguments})


def test_a_model_attends_to_streams_only_while_asked() -> None:
    """Validation in the middle of training, and everything after it, sees ordinary batches again."""
    made = model("llama", lora=True)
    batch = rows(4)
    before = loss_of(made, pad(batch))
    with attending(made):
        with pytest.raises(RunError, match="attends to streams"):
            loss_of(made, pad(batch))
        with attending(made, streams=False):
            assert torch.equal(loss_of(made, pad(batch)), before)
        loss_of(made, stream(batch))
    assert torch.equal(loss_of(made, pad(batch)), before)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_models_that_can_share_pass_the_check(name: str, dtype: str) -> None:
    """The check before training finds nothing, whatever the arithmetic, and leaves the model as it was."""
    made = model(name, lora=True).eval()
    assert sharing.unsupported(made, rows(4), dtype) is None
    assert not made.training


def test_rounding_is_no_reason_not_to_share_but_a_wrong_position_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a model so deep that bf16 rounds more than the fixed limit allows; how this one does, depends on the CPU."""
    monkeypatch.setitem(sharing.TOLERANCE, "bf16", 0.0)
    torch.manual_seed(0)
    wide = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64}
    made = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**wide))
    batch = [Row(i, [*range(20, 40), *range(50, 70 + 9 * i)], [7 + i, 2]) for i in range(2)]
    assert 0 <= sharing.rounding(made, batch, "bf16") < 0.05
    between_ways = sharing.difference(made, batch, "bf16")
    assert 0 <= between_ways < 0.05
    monkeypatch.setattr(sharing, "rounding", lambda *_: between_ways / 2)
    assert sharing.unsupported(made, batch, "bf16") is None

    def in_a_row(given: Any) -> dict[str, Any]:
        whole = stream(given)
        return {**whole, "position_ids": torch.arange(whole["input_ids"].shape[1])[None]}

    monkeypatch.setattr(sharing, "stream", in_a_row)
    why = sharing.unsupported(made, batch, "bf16")
    assert why is not None
    assert "something else on a stream" in why


def test_models_that_cannot_share_are_found_out() -> None:
    """Each says why: dropout in attention or elsewhere, attention with sinks, no interface, too little in common."""
    small = {**SIZES, "num_hidden_layers": 1}
    sinks = hf.GptOssConfig(**{**SIZES, "attn_implementation": "eager"}, num_local_experts=2, num_experts_per_tok=1)
    gpt = hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, attn_pdrop=0.0)
    cases = {
        "dropout of 0.3": hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**small, attention_dropout=0.3)),
        "s_aux": hf.AutoModelForCausalLM.from_config(sinks),
        "something else": hf.AutoModelForCausalLM.from_config(gpt),  # drops embeddings
        "interface": hf.AutoModelForCausalLM.from_config(
            hf.MptConfig(vocab_size=96, d_model=32, n_heads=4, n_layers=1)
        ),
    }
    for said, made in cases.items():
        why = sharing.unsupported(made, rows(4), "fp32")
        assert why is not None, said
        assert said in why
    why = sharing.unsupported(model("llama"), rows(4, instruction=5), "fp32")
    assert why is not None
    assert "only 5 tokens in common" in why


def plan_of(tmp_path: Path, train: dict[str, Any] | None = None, here: Machine | None = None, **keys: Any) -> Any:
    spec = {"method": "sft", "global_batch": 8, **(train or {})}
    recipe = Recipe.model_validate({"model": "smollm2-135m", "data": "sample", "train": spec, **keys})
    counted = Rows(train=30, validation=5, test=5)
    return decide(recipe, here=here or Machine((), 2), rows=counted, folder=tmp_path / "run", source="r.yaml")


@pytest.mark.parametrize(
    ("keys", "shared", "said"),
    [
        ({}, True, "shared prefix on"),
        ({"train": {"shared_prefix": "on"}}, True, None),
        ({"train": {"shared_prefix": "off"}}, False, None),
        ({"lora": {"dropout": 0.1}}, False, "shared prefix off: lora.dropout is 0.1"),
        (
            {"model": {"name": "smollm2-135m", "attention": "eager"}},
            False,
            "shared prefix off: model.attention is eager",
        ),
        ({"train": {"micro_batch": 1}}, False, "shared prefix off: a micro-batch of 1"),
        ({"lora": None}, True, "shared prefix on"),
    ],
    ids=["auto", "on", "off", "dropout", "another attention", "one row", "all weights"],
)
def test_the_plan_says_whether_rows_share_and_why(
    tmp_path: Path, keys: dict[str, Any], shared: bool, said: str | None
) -> None:
    """A reason is given where the recipe leaves the choice open."""
    plan = plan_of(tmp_path, **keys, here=Machine((Gpu("NVIDIA H100", 79.2, 9.0),), 8))
    assert plan.shared_prefix == shared
    reasons = [reason for reason in plan.reasons if "shared prefix" in reason]
    assert len(reasons) == (said is not None)
    assert all(said in reason for reason in reasons if said)


@pytest.mark.parametrize("keys", [{"lora": {"dropout": 0.1}}, {"model": {"name": "m", "attention": "eager"}}])
def test_a_prefix_that_must_be_shared_but_cannot_is_refused(tmp_path: Path, keys: dict[str, Any]) -> None:
    """`on` is an order, so what contradicts it is a fault of the recipe."""
    path = tmp_path / "r.yaml"
    from finllm.recipe import load, recipe_yaml

    spec = {"model": "m", "data": "sample", "train": {"method": "sft", "shared_prefix": "auto"}, **keys}
    path.write_text(recipe_yaml(Recipe.model_validate(spec)))
    load(path)
    with pytest.raises(RecipeError, match=r"train\.shared_prefix is on, but"):
        load(path, ["train.shared_prefix=on"])


def test_training_falls_back_or_refuses_as_the_recipe_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the model and the texts show that nothing is shared: auto says so and goes on, `on` stops."""
    made, batch = model("llama"), rows(4, instruction=3)
    assert sharing.collate(made, batch, plan_of(tmp_path), is_main=True) is None
    assert "shared prefix off: the prompts have only 3 tokens in common" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"train\.shared_prefix is on, but the prompts"):
        sharing.collate(made, batch, plan_of(tmp_path, {"shared_prefix": "on"}), is_main=True)
    assert sharing.collate(made, rows(4), plan_of(tmp_path, {"shared_prefix": "off"}), is_main=True) is None
    streams = sharing.collate(made, rows(4), plan_of(tmp_path), is_main=True)
    assert streams is not None
    assert streams(rows(4))["input_ids"].shape[0] == 1


class KeepGradients(hf.TrainerCallback):  # type: ignore[misc]  # Transformers ships no types for its callbacks
    """Keeps the gradients of the first optimizer step, accumulated and over all processes."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, **more: Any) -> None:
        """Called by the trainer before clipping has anything to do."""
        self.first = self.first or taken(more["model"])


def text_rows(folder: Path, count: int) -> list[Row]:
    """Rows of the shipped sample, as training makes them."""
    from finllm.data.sample import Sample
    from finllm.prompts import Prompter
    from finllm.recipe import Prompt
    from finllm.training.batches import encode

    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    examples = [e for e in Sample(name="sample").read() if e.split == "train" and len(e.text) < 90]
    return encode(examples[:count], Prompter(tokenizer, Prompt()))


def settings(output: Path, **more: Any) -> Any:
    from trl import SFTConfig

    usual: dict[str, Any] = {
        "num_train_epochs": 1, "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "optim": "adamw_torch",
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "seed": 3,
        "disable_tqdm": True, "remove_unused_columns": False, "max_length": None, "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }  # fmt: skip
    return SFTConfig(output_dir=str(output), **{**usual, **more})


def loaded(folder: Path, *, lora: bool) -> Any:
    """The tiny model of the fixture, again with second LoRA factors that are not 0."""
    hf.utils.logging.set_verbosity_error()
    made = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    if not lora:
        return made
    torch.manual_seed(5)
    made = get_peft_model(made, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return made


def trained(
    folder: Path, output: Path, collate: Any, count: int, *, lora: bool = True, streams: bool = True, **more: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float]]:
    """First gradients, final weights and losses of our trainer on `count` rows."""
    from finllm.data.sample import Sample
    from finllm.training.sft import Sft
    from finllm.training.watching import LossWatch

    made, kept = loaded(folder, lora=lora), KeepGradients()
    trainer = Sft(
        model=made,
        processing_class=hf.AutoTokenizer.from_pretrained(folder),
        args=settings(output, **more),
        rows=text_rows(folder, count),
        collate=collate,
        losses=LossWatch(Sample(name="sample").read()),
        validation=None,
        callbacks=[kept],
    )
    with attending(made, streams=streams):
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return kept.first, weights(made), losses


def weights(made: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept activations", "checkpointing"])
@pytest.mark.parametrize(("accumulation", "count"), [(1, 14), (4, 14), (4, 3)])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
def test_a_step_of_the_trainer_has_the_gradients_of_padded_rows(
    tiny_model: Path, tmp_path: Path, *, lora: bool, accumulation: int, count: int, checkpointing: bool
) -> None:
    """TRL's head and loss on streams; rows for 16 places in passes of 16 or 4, so that some are not full, or empty."""
    more: dict[str, Any] = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if checkpointing else {}
    found, _, losses = trained(
        tiny_model,
        tmp_path / "streams",
        stream,
        count,
        lora=lora,
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=1e9,
        gradient_checkpointing=checkpointing,
        **more,
    )
    made = loaded(tiny_model, lora=lora)
    loss, expected = gradients(made, pad(text_rows(tiny_model, count)))
    assert losses == pytest.approx([loss], rel=5e-6)
    assert max(errors(found, expected).values()) <= 5e-6


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
def test_a_whole_run_ends_in_the_weights_of_trls_own_trainer(tiny_model: Path, tmp_path: Path, *, lora: bool) -> None:
    """TRL's trainer with its own collator and data set, on the same examples in the same order."""
    from datasets import Dataset
    from trl import SFTTrainer

    from finllm.training.batches import GlobalBatches

    sizes: dict[str, Any] = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    _, found, losses = trained(tiny_model, tmp_path / "ours", partial(stream, multiple=8), 96, lora=lora, **sizes)
    rows_in_order = text_rows(tiny_model, 96)
    order = GlobalBatches([1] * 96, micro_batch=8, accumulation=2, rank=0, processes=1, seed=3)
    rows_in_order = [rows_in_order[index] for batch in order for index in batch]
    made = loaded(tiny_model, lora=lora)
    theirs = SFTTrainer(
        model=made,
        processing_class=hf.AutoTokenizer.from_pretrained(tiny_model),
        args=settings(tmp_path / "theirs", train_sampling_strategy="sequential", **sizes),
        train_dataset=Dataset.from_list(
            [
                {"input_ids": [*r.prompt, *r.answer], "labels": [IGNORED] * len(r.prompt) + r.answer}
                for r in rows_in_order
            ]
        ),
    )
    start = weights(made)
    theirs.train()
    expected_losses = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert max(errors(found, weights(made)).values()) <= 1e-5
    assert errors(start, weights(made))["all"] > 1e-3


def test_a_run_with_a_wrong_mask_ends_elsewhere(tiny_model: Path, tmp_path: Path) -> None:
    """The two comparisons above can fail: with rows that see each other, gradients and weights are far off."""
    sizes: dict[str, Any] = {"per_device_train_batch_size": 8, "max_grad_norm": 1e9}
    right = trained(tiny_model, tmp_path / "right", stream, 32, **sizes)
    wrong = trained(tiny_model, tmp_path / "wrong", seeing_each_other, 32, **sizes)
    assert errors(wrong[0], right[0])["all"] > 1000 * 5e-6
    assert errors(wrong[1], right[1])["all"] > 100 * 1e-5


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tiny_model: Path, tmp_path: Path) -> None:
    """Two processes over gloo, two passes each, 14 rows for 16 places; each shares what its own rows begin with."""
    port = 20_000 + random.randrange(20_000)
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(tiny_model), str(tmp_path)],
            env={
                "PYTHONPATH": str(Path(__file__).parents[1]),
                "PATH": "/usr/bin:/bin",
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    _, expected = gradients(loaded(tiny_model, lora=True), pad(text_rows(tiny_model, 14)))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert max(errors(found, expected).values()) <= 5e-6


def one_process(folder: Path, output: Path) -> None:
    """What each process of the test above does."""
    import os

    from accelerate import PartialState

    PartialState(cpu=True)
    first, _, _ = trained(
        folder,
        output / "run",
        stream,
        14,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=1e9,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
    )
    torch.save(first, output / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    one_process(Path(sys.argv[1]), Path(sys.argv[2]))
