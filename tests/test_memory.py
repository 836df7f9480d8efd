"""The estimate of memory: against what autograd really keeps, against measured peaks, and the shapes and lengths below."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finllm import data, memory, shapes
from finllm.data.sample import Sample
from finllm.example import Example
from finllm.holding import Setting, loading_bytes, lora_parameters, state_bytes, weight_bytes
from finllm.lengths import Batch, Lengths, largest_batch, lengths_of, pieces
from finllm.machine import Machine
from finllm.memory import GIB, estimate, kept_by_autograd, kept_by_hand, scoring_pass, training_pass
from finllm.plan import Rows, decide
from finllm.recipe import Lora, Model, Prompt, load
from finllm.shapes import Shape, from_config, shape_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
MISTRAL = Shape(4096, 14336, 32, 32, 8, 128, 32000, tied=False, kind="mistral")
LORA = Lora(rank=16)
SMALL: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 600,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("smollm2-135m", 134.5),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", 361.8),
        ("HuggingFaceTB/SmolLM2-1.7B", 1711.4),
        ("mistralai/Mistral-7B-v0.1", 7241.7),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7248.0),
        ("meta-llama/Meta-Llama-3-8B", 8030.3),
        ("meta-llama/Llama-3.1-8B-Instruct", 8030.3),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494.0),
        ("Qwen/Qwen2.5-1.5B", 1543.6),
        ("Qwen/Qwen2.5-7B", 7615.5),
        ("google/gemma-3-270m-it", 268.1),
        ("google/gemma-3-1b-pt", 999.8),
    ],
)
def test_known_models_have_as_many_parameters_as_their_pages_say(
    name: str, millions: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Biases and norms of single heads are left out: less than 0.1 %."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    shape = shape_of(Model(name=name))
    assert shape is not None
    assert shape.parameters / 1e6 == pytest.approx(millions, rel=1e-3)


def test_a_shape_is_that_of_the_model_itself() -> None:
    """Every weight of a real model is counted, by the layer it is in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SMALL, num_hidden_layers=2, tie_word_embeddings=True)
    shape = from_config(config.to_dict())
    assert shape is not None
    model = LlamaForCausalLM(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    linears = [m.weight.numel() for n, m in model.model.layers.named_modules() if n.endswith("_proj")]
    assert shape.linear_parameters == sum(linears)


def test_a_shape_is_found_in_a_folder_and_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table cannot know a user's own model; the cache knows what was downloaded, at its revision."""
    config = {"model_type": "llama", "num_hidden_layers": 3, **SMALL}
    (tmp_path / "config.json").write_text(json.dumps(config))
    own = shape_of(Model(name=str(tmp_path)))
    assert own is not None
    assert (own.layers, own.head_size, own.tied, own.kind) == (3, 64, False, "llama")
    snapshot = tmp_path / "hub" / "models--some--one" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision in (None, "abc"):
        cached = shape_of(Model(name="some/one", revision=revision))
        assert cached is not None
        assert cached.layers == 5
    assert shape_of(Model(name="some/one", revision="older")) is None
    assert shape_of(Model(name="some/other")) is None


@pytest.mark.parametrize(
    "config",
    [{**SMALL}, {**SMALL, "num_hidden_layers": 2, "num_local_experts": 8}, {"n_embd": 768, "n_layer": 12}],
    ids=["no layers", "experts", "GPT-2"],
)
def test_another_kind_of_model_has_no_shape(config: dict[str, Any]) -> None:
    """Better no estimate than a wrong one."""
    assert from_config(config) is None


def test_a_gemma_of_several_media_has_its_text_half_and_tied_weights() -> None:
    """Its config.json leaves out what is its architecture's default."""
    text = {**SMALL, "num_hidden_layers": 2, "model_type": "gemma3_text", "head_dim": 128}
    shape = from_config({"model_type": "gemma3", "text_config": text})
    assert shape is not None
    assert (shape.tied, shape.head_size) == (True, 128)


def test_lengths_of_texts_are_near_those_of_the_tokenizer(shared_data: Path) -> None:
    """Within 10 % on average, and 20 % for the longest text: PhraseBank, FiQA, and the shipped sample."""
    from transformers import AutoTokenizer

    from finllm import embedded
    from finllm.data.fiqa import Fiqa
    from finllm.data.phrasebank import PhraseBank
    from finllm.prompts import Prompter

    prompter = Prompter(AutoTokenizer.from_pretrained(embedded.folder()), Prompt())
    instruction = len(prompter.render([""])[0].ids) - 5
    assert shared_data.is_dir()
    for spec in (PhraseBank(name="phrasebank"), Fiqa(name="fiqa", target=True), Sample(name="sample")):
        examples = data.read_parts([spec]).train
        prompts = prompter.render([e.text for e in examples], [e.target for e in examples])
        own = [len(prompt.ids) - instruction for prompt in prompts]
        found = lengths_of(examples)
        assert found is not None
        assert found.mean == pytest.approx(sum(own) / len(own), rel=0.1), spec.title
        assert found.longest == pytest.approx(max(own), rel=0.2), spec.title


def test_figures_and_signs_are_tokens_of_their_own() -> None:
    """A table in a text has far fewer characters a token than prose; 20 characters each, by count of characters alike."""
    assert pieces("EUR 12.5 m, 3.4 (2.1)") == 15
    assert pieces("Sales rose in Finland") == 5
    assert pieces("") == 0
    assert lengths_of([]) is None


def test_the_worst_micro_batch_is_found_where_texts_differ() -> None:
    """Padded rows are as long as the longest text; a stream is longer than its mean, and not longer than all long."""
    prompt, known = Prompt(), Lengths(texts=4000, mean=40, deviation=16, longest=180)
    padded = largest_batch(prompt, known, rows=32, shares=False)
    assert padded.tokens == 32 * padded.longest
    assert 180 < padded.longest < 220
    stream = largest_batch(prompt, known, rows=32, shares=True, epochs=3)
    assert 32 * 40 + 200 < stream.tokens < 32 * 60
    assert stream.keys == stream.tokens + 32 * stream.shared
    assert largest_batch(prompt, known, rows=32, shares=True, multiple=64).tokens % 64 == 0
    unknown = largest_batch(prompt, None, rows=4, shares=False)
    assert unknown.tokens == 4 * prompt.max_tokens


def test_the_largest_stream_is_that_of_random_orders() -> None:
    """Drawn 20 times over, its tokens are within 8 % of the estimate on average."""
    import random

    draw = random.Random(7)
    texts = [12 + int(draw.gammavariate(4, 7)) for _ in range(3000)]
    mean = sum(texts) / 3000
    deviation = (sum((t - mean) ** 2 for t in texts) / 3000) ** 0.5
    known = Lengths(texts=3000, mean=mean, deviation=deviation, longest=max(texts))
    guess = largest_batch(Prompt(), known, rows=16, shares=True)
    worst = []
    for _ in range(20):
        draw.shuffle(texts)
        worst.append(max(sum(texts[i : i + 16]) for i in range(0, 2992, 16)) + 16 + guess.shared)
    assert guess.tokens == pytest.approx(sum(worst) / 20, rel=0.08)


@pytest.mark.parametrize(
    ("form", "dtype", "lora"),
    [
        ("rows", "fp32", True),
        ("rows", "fp32", False),
        ("rows", "bf16", True),
        ("rows", "bf16", False),
        ("stream", "fp32", True),
        ("stream", "fp32", False),
        ("stream", "bf16", True),
    ],
)
def test_autograd_keeps_as_much_as_the_formula_says(form: str, dtype: str, lora: bool) -> None:
    """Counted by torch's own hooks on every tensor that a layer saves, to 1.5 %: two layers less one layer."""
    rows = 8
    per_layer = _saved(2, form, dtype, lora) - _saved(1, form, dtype, lora)
    shape = from_config({**SMALL, "num_hidden_layers": 1})
    assert shape is not None
    how = Setting("cpu", "bf16" if dtype == "bf16" else "fp32", lora=LORA if lora else None)
    shared, own = 40, 25
    batch = (
        Batch(rows, own, shared, shared + rows * own + 1)
        if form == "stream"
        else Batch(rows, shared + own + 1, 0, rows * (shared + own + 1))
    )
    copies = 0  # of weights, cast by autocast: part of what is trained
    if dtype == "bf16":
        copies = 2 * (lora_parameters(shape, LORA) if lora else shape.linear_parameters)
    assert kept_by_autograd(shape, how, batch) + copies == pytest.approx(per_layer, rel=0.015)


def _saved(layers: int, form: str, dtype: str, lora: bool) -> int:
    """Bytes of storages that autograd keeps of a model's blocks, weights aside."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from finllm import models, shared_prefix
    from finllm.training.batches import Row, pad, stream

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=layers))
    if lora:
        model = models.with_adapter(model.to(torch.bfloat16 if dtype == "bf16" else torch.float32), LORA, 0)
    model.train()
    rows = [Row(i, [*range(40), *range(100 + 3 * i, 124 + 3 * i)], [5, 6]) for i in range(8)]
    batch = stream(rows) if form == "stream" else pad(rows)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    body = (model.get_base_model() if lora else model).model
    inputs = {name: value for name, value in batch.items() if name not in {"labels", "meta"}}
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"),
        shared_prefix.attending(model, streams=form == "stream"),
    ):
        output = body(**inputs, use_cache=False).last_hidden_state
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _padded(rows: int, longest: int) -> Batch:
    return Batch(rows, longest, 0, rows * longest)


def _stream(rows: int, shared: int, tokens: int) -> Batch:
    return Batch(rows, (tokens - shared) // rows, shared, tokens)


CHECKPOINTED = Setting("cuda", "bf16", quantization="nf4", lora=LORA, checkpointing=True)
MEASURED = [
    ("TRL, batch 4, checkpointing", CHECKPOINTED, _padded(4, 105), 4.6),
    ("TRL, batch 16, checkpointing", CHECKPOINTED, _padded(16, 105), 5.4),
    ("bf16 base, 32 examples, compiled", Setting("cuda", "bf16", lora=LORA), _stream(32, 45, 1152), 23.0),
    ("bf16 base, 64 examples, compiled", Setting("cuda", "bf16", lora=LORA), _stream(64, 45, 2240), 29.0),
    ("bf16 base, graph, 1,280 tokens", Setting("cuda", "bf16", lora=LORA), _stream(34, 45, 1280), 21.0),
]
"""Peaks of one H200, with what is known of their tokens (docs/memory.md); Mistral's shape, PhraseBank's texts."""


@pytest.mark.parametrize(("how", "batch", "peak"), [case[1:] for case in MEASURED], ids=[case[0] for case in MEASURED])
def test_the_estimate_is_near_measured_peaks(how: Setting, batch: Batch, peak: float) -> None:
    """Within 15 % of what torch.cuda.max_memory_allocated said."""
    found = estimate(MISTRAL, how, batch, _stream(1, 45, 64))
    assert found.allocated == pytest.approx(peak, rel=0.15)


BF16 = Setting("cuda", "bf16", lora=LORA, processes=2)
SHARED_OUT = {
    "fsdp, bf16": replace(BF16, strategy="fsdp"),
    "fsdp, NF4": replace(BF16, strategy="fsdp", quantization="nf4", checkpointing=True),
    "zero2, bf16": replace(BF16, strategy="zero2"),
    "zero3, bf16": replace(BF16, strategy="zero3"),
    "ddp, NF4": replace(BF16, strategy="ddp", quantization="nf4", checkpointing=True, hand_written=True),
    "zero2, NF4": replace(BF16, strategy="zero2", quantization="nf4", checkpointing=True),
    "zero3, NF4": replace(BF16, strategy="zero3", quantization="nf4", checkpointing=True),
    "zero2, 1B, all weights": replace(BF16, strategy="zero2", lora=None),
    "fsdp, 1B, all weights": replace(BF16, strategy="fsdp", lora=None, accumulates=False),
}
SHARED_OUT |= {
    f"{name}, offloaded": replace(SHARED_OUT[name], offload=True)
    for name in ("zero2, bf16", "fsdp, bf16", "zero3, bf16", "zero2, 1B, all weights", "fsdp, 1B, all weights")
}


@pytest.mark.parametrize("name", SHARED_OUT)
def test_the_estimate_is_near_the_peaks_on_two_gpus(name: str) -> None:
    """Of benchmarks/h200x2.py, whose steps had the run's largest micro-batch; of a large model under fsdp it is loading."""
    rows = json.loads((Path(__file__).parents[1] / "benchmarks/results/h200x2.json").read_text())
    row = next(row for row in rows if row["name"] == name)
    shape = replace(MISTRAL, vocabulary=49_152)
    if "1B" in name:
        shape = replace(shape, hidden=2048, intermediate=8192, layers=16, head_size=64)
    how = SHARED_OUT[name]
    assert row["tokens_here"] == row["tokens_of_run"]
    found = estimate(shape, how, _stream(32, 26, row["tokens_planned"]), _stream(224, 26, 8222))
    assert found.allocated == pytest.approx(row["peak_gib"], rel=0.15)
    loading = loading_bytes(shape, how) / GIB
    assert (loading == pytest.approx(found.allocated, rel=1e-3)) == (
        name in {"fsdp, bf16", "fsdp, NF4"} or ("offloaded" in name and "zero2" not in name)
    )


def test_weights_in_four_bits_take_what_the_paper_says() -> None:
    """0.127 bits for a weight's scales with double quantisation, 0.5 without (arXiv 2305.14314, section 3)."""
    bits = [
        8 * weight_bytes(MISTRAL, Setting("cuda", "bf16", quantization="nf4", double_quantization=d, lora=LORA))
        for d in (True, False)
    ]
    rest = 16 * (MISTRAL.embedding_parameters + MISTRAL.norm_parameters)
    assert [(b - rest) / MISTRAL.linear_parameters for b in bits] == pytest.approx([4.127, 4.5], abs=1e-3)
    unpacked = Setting("cuda", "bf16", quantization="nf4", dequantize=True, lora=LORA)
    assert (
        weight_bytes(MISTRAL, unpacked)
        == weight_bytes(MISTRAL, Setting("cuda", "bf16", lora=LORA))
        == 2 * MISTRAL.parameters
    )


def test_full_training_needs_sixteen_bytes_a_weight_and_a_copy() -> None:
    """fp32 weights, gradients, two moments; and autocast's copies."""
    how = Setting("cuda", "bf16", lora=None)
    assert weight_bytes(MISTRAL, how) + state_bytes(MISTRAL, how) == 18 * MISTRAL.parameters
    in_fp32 = Setting("cpu", "fp32", lora=None)
    assert weight_bytes(MISTRAL, in_fp32) + state_bytes(MISTRAL, in_fp32) == 16 * MISTRAL.parameters


def test_adapters_are_counted_by_their_targets() -> None:
    """42 million weights of rank 16 on all linear layers of a 7B model."""
    assert lora_parameters(MISTRAL, LORA) == 41_943_040
    assert lora_parameters(MISTRAL, Lora(rank=16, targets=("q_proj", "v_proj"))) == 32 * 16 * (8192 + 5120)
    paged = Setting("cuda", "bf16", lora=LORA, optimizer="paged_adamw_32bit")
    assert state_bytes(MISTRAL, Setting("cuda", "bf16", lora=LORA)) - state_bytes(MISTRAL, paged) == 8 * 41_943_040


def test_hand_written_passes_keep_what_their_layers_hold() -> None:
    """The size of every tensor of one layer's `Kept`, from a pass over a small model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from finllm import models
    from finllm.fast import layers, passes
    from finllm.fast.streams import pack
    from finllm.fast.weights import Decoder

    torch.manual_seed(0)
    model = models.with_adapter(LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=2)), Lora(rank=64), 0)
    decoder = Decoder(model)
    stream = pack([[1, 2, 3, n, 4] for n in range(10, 18)], [[5, 6]] * 8, shared=3)
    setting = passes._setting(decoder, stream)
    layer = decoder.layers[0]
    _, kept = layers.forward(layer, decoder.unpacked(layer), decoder.embedding[stream.ids], setting)
    tensors = [getattr(kept, name) for name in kept.__slots__]
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    shape = from_config({**SMALL, "num_hidden_layers": 2})
    assert shape is not None
    batch = Batch(8, 3, 3, stream.tokens)
    how = Setting("cpu", "fp32", lora=Lora(rank=64), hand_written=True)
    assert kept_by_hand(shape, how, batch) == pytest.approx(held, rel=0.01)


def test_light_modules_agree_with_those_that_need_torch() -> None:
    """Constants that stand in two places, so that a plan is made without torch."""
    from finllm import fitting
    from finllm.fast import engine, support
    from finllm.training import sharing

    assert fitting.MOST_BY_HAND == engine.MOST_TOKENS
    assert fitting.MULTIPLE == sharing.MULTIPLE
    assert support.MODELS == memory.HAND_WRITTEN_KINDS


def test_the_plans_of_the_h200_benchmark_are_near_its_peaks(shared_data: Path, tmp_path: Path) -> None:
    """Whole runs of the command and of TRL's trainer, recorded with their peaks; estimated from the recipe alone."""
    root = Path(__file__).parents[1]
    assert shared_data.is_dir()
    recorded = json.loads((root / "benchmarks/results/h200_sft.json").read_text())
    peaks = {row["name"]: row["peak_gib"] for row in recorded if row.get("peer") is None}
    path = root / "recipes/sft/mistral-7b-v0.1-phrasebank.yaml"
    examples = data.read_parts(load(path).data)
    texts = lengths_of(examples.train)
    rows = Rows(train=len(examples.train), validation=len(examples.validation), test=len(examples.test))
    for name, overrides in {"finllm": [], "finllm, low memory": ["train.gradient_checkpointing=true"]}.items():
        recipe = load(path, ["resources.gpu=h200-141gb", *overrides])
        plan = decide(recipe, here=Machine((), 2), rows=rows, folder=tmp_path, source="r", texts=texts)
        assert plan.memory is not None
        assert plan.memory.allocated == pytest.approx(peaks[name], rel=0.15), name
    for name, size, how in (
        ("trl 4x4", 4, CHECKPOINTED),
        ("trl 64", 64, Setting("cuda", "bf16", quantization="nf4", lora=LORA)),
    ):
        batch = largest_batch(Prompt(), texts, rows=size, shares=False)
        found = estimate(MISTRAL, how, batch, _stream(1, 45, 64))
        in_bf16 = 10 * lora_parameters(MISTRAL, LORA) / GIB  # TRL's adapters: 8 bytes a weight, not 18
        assert found.allocated - in_bf16 == pytest.approx(peaks[name], rel=0.15), name


def test_checkpointing_and_sharing_need_less_and_scoring_has_its_share() -> None:
    """Each in the order that one expects; a scoring batch alone can be what needs the most."""
    plain, saved = Setting("cuda", "bf16", lora=LORA), Setting("cuda", "bf16", lora=LORA, checkpointing=True)
    batch = _stream(32, 30, 1280)
    assert training_pass(MISTRAL, saved, batch) < 0.2 * training_pass(MISTRAL, plain, batch)
    by_hand = Setting("cuda", "bf16", lora=LORA, hand_written=True)
    assert training_pass(MISTRAL, by_hand, batch) < 0.8 * training_pass(MISTRAL, plain, batch)
    scored = _stream(400, 30, 16_384)
    alone = estimate(MISTRAL, saved, None, scored)
    assert alone.activations == pytest.approx(scoring_pass(MISTRAL, saved, scored) / GIB, abs=1e-3)
    assert estimate(MISTRAL, saved, _stream(4, 30, 192), scored).activations == alone.activations


def test_the_demo_stays_under_four_gigabytes() -> None:
    """SmolLM2-135M in fp32 on a CPU; a whole run of the demo was measured (docs/memory.md)."""
    shape = shape_of(Model(name="smollm2-135m"))
    assert shape is not None
    examples: list[Example] = list(data.read_parts([Sample(name="sample")]).train)
    batch = largest_batch(Prompt(), lengths_of(examples), rows=16, shares=True, epochs=3)
    how = Setting("cpu", "fp32", quantization="nf4", dequantize=True, lora=LORA)
    assert 2.5 < estimate(shape, how, batch, _stream(120, 30, 5000)).total < 4e9 / GIB


def test_the_shape_of_the_embedded_model_is_that_of_its_folder() -> None:
    """The table is used before the model has been fetched."""
    from finllm import embedded

    config = json.loads((embedded.folder() / "config.json").read_text())
    assert from_config(config) == shapes._SMOLLM2_135M


def test_the_embedded_model_ends_its_answers_as_its_configuration_says() -> None:
    """Transformers 5.17 makes the beginning of its file's tokenizer the end, too."""
    from transformers import AutoTokenizer

    from finllm import embedded

    config = json.loads((embedded.folder() / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(embedded.folder())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (config["bos_token_id"], config["eos_token_id"])
