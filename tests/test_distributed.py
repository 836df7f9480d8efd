"""Runs that several processes share: the same weights by every strategy, checkpoints, and the plan that picks one."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from torch.utils.checkpoint import checkpoint

import launched
from finllm import distributed
from finllm.errors import RecipeError, RunError
from finllm.files import write_json
from finllm.lengths import Lengths
from finllm.machine import Gpu, Machine
from finllm.plan import Plan, Rows, decide
from finllm.recipe import SHARDED, Recipe, Strategy
from finllm.run import Run, State, create
from finllm.training import sharded
from finllm.training.batches import GlobalBatches, dealt
from launch import planning, replanning, tables
from launched import USUAL, error, figures, forget_the_end, go

H100, L4 = Gpu("NVIDIA H100", 79.2, 9.0), Gpu("NVIDIA L4", 22.0, 8.9)
TEXTS = Lengths(texts=640, mean=30.0, deviation=12.0, longest=110)
PLAIN = {"name": "mistralai/Mistral-7B-v0.1"}
QLORA = {**PLAIN, "quantization": "nf4"}


def plan(folder: Path, gpus: int, gpu: Gpu = H100, *, nodes: int = 1, main_gib: float = 128.0, **keys: Any) -> Plan:
    train = {"method": "sft", "global_batch": 32, "learning_rate": 1e-5, **keys.pop("train", {})}
    recipe = Recipe.model_validate({"model": QLORA, "data": "sample", "train": train, **keys})
    rows = Rows(train=640, validation=64, test=64)
    here = Machine((gpu,) * gpus, 16, main_gib)
    return decide(recipe, here=here, rows=rows, folder=folder / "run", source="r.yaml", texts=TEXTS, nodes=nodes)


@pytest.mark.parametrize(
    ("gpus", "gpu", "keys", "strategy", "why"),
    [
        (1, H100, {}, "single", None),
        (2, H100, {}, "ddp", "everything fits into each process"),
        (4, H100, {"model": PLAIN, "lora": None}, "zero2", "ddp would need"),
        (4, Gpu("NVIDIA A100 40 GB", 39.4, 8.0), {"model": PLAIN, "lora": None}, "fsdp", "zero2 would need"),
        (2, H100, {"distributed": {"strategy": "zero3"}}, "zero3", None),
        (2, H100, {"distributed": {"strategy": "single"}}, "single", None),
    ],
    ids=["one GPU", "QLoRA", "all weights, 80 GB", "all weights, 40 GB", "as asked", "one of two"],
)
def test_the_strategy_is_the_first_that_fits(
    tmp_path: Path, gpus: int, gpu: Gpu, keys: dict[str, Any], strategy: Strategy, why: str | None
) -> None:
    """Everything in each process where there is room; else what is trained is shared out, and at last the weights."""
    found = plan(tmp_path, gpus, gpu, **keys)
    assert found.strategy == strategy
    assert found.processes == (1 if strategy == "single" else gpus)
    reasons = [reason for reason in found.reasons if reason.startswith("strategy ")]
    assert len(reasons) == (why is not None)
    assert all(why in reason for reason in reasons if why)


def test_the_plan_shows_the_memory_of_every_strategy(tmp_path: Path) -> None:
    """Each holds less than the one before; what is trained by DeepSpeed falls with the number of GPUs."""
    found = plan(tmp_path, 4, model=PLAIN, lora=None)
    assert [one.strategy for one in found.considered] == ["ddp", "zero2", "fsdp", "zero3"]
    held = [one.memory.weights + one.memory.trained for one in found.considered if one.memory]
    assert held[0] > held[1] > held[3] > held[2]
    assert held[0] == pytest.approx(22 * 7.24e9 / 2**30, rel=0.02)  # DDP's buckets beside weights, AdamW and autocast
    more = plan(tmp_path, 8, model=PLAIN, lora=None)
    ours, theirs = (one.considered[1].memory for one in (found, more))
    assert ours is not None
    assert theirs is not None
    assert theirs.trained < 0.6 * ours.trained
    lines = [line for line in tables.plan_lines(found, tmp_path) if " GiB of 71.3" in line and "micro-batch" in line]
    assert [line.split()[0 if number else 1] for number, line in enumerate(lines)] == ["ddp", "zero2", "fsdp", "zero3"]
    assert "too much" in lines[0]
    assert "too much" not in lines[1]


def test_what_does_not_fit_is_refused_with_what_would_help(tmp_path: Path) -> None:
    """The advice is taken from where it is not taken yet."""
    with pytest.raises(RecipeError, match=r"set distributed\.offload to true"):
        plan(tmp_path, 2, L4, model=PLAIN, lora=None)
    offloaded = plan(tmp_path, 2, L4, model=PLAIN, lora=None, distributed={"strategy": "fsdp", "offload": True})
    assert offloaded.memory is not None
    assert offloaded.memory.total < 10


def test_what_is_offloaded_must_fit_into_main_memory(tmp_path: Path) -> None:
    """16 bytes for each of 7.24 billion weights, 107.9 GiB; of a LoRA on bf16, the weights and little more."""
    keys: dict[str, Any] = {"model": PLAIN, "distributed": {"strategy": "fsdp", "offload": True}}
    found = plan(tmp_path, 2, lora=None, **keys)
    assert [reason for reason in found.reasons if reason.startswith("offload: 107.9 GiB or more in main memory")]
    with pytest.raises(
        RecipeError, match=r"107\.9 GiB or more into main memory, which is 100\.0 GiB; .* give lora a rank"
    ):
        plan(tmp_path, 2, main_gib=100, lora=None, **keys)
    assert [r for r in plan(tmp_path, 2, main_gib=100, **keys).reasons if r.startswith("offload: 14.1 GiB")]
    assert not [r for r in plan(tmp_path, 2).reasons if r.startswith("offload")]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"distributed": {"strategy": "ddp", "offload": True}}, "write zero2, fsdp, zero3"),
        ({"distributed": {"strategy": "fsdp"}, "model": {**PLAIN, "quantization": "int8"}}, "Write nf4"),
        ({"distributed": {"strategy": "zero3"}, "train": {"optimizer": "paged_adamw_32bit"}}, "Write adamw"),
        ({"distributed": {"strategy": "zero2"}, "train": {"hand_written": "on"}}, "Write hand_written: auto"),
    ],
    ids=["nothing to offload", "int8", "another optimizer", "hand-written"],
)
def test_a_recipe_that_contradicts_its_strategy_is_refused(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    """Before anything starts, with what to write."""
    with pytest.raises(ValueError, match=said):
        plan(tmp_path, 2, **keys)


@pytest.mark.parametrize(("gpus", "strategy", "said"), [(1, "ddp", "there is one process"), (1, "single", None)])
def test_a_machine_that_does_not_suit_the_strategy_is_refused(
    tmp_path: Path, gpus: int, strategy: Strategy, said: str | None
) -> None:
    """`ddp` needs several processes."""
    if said is None:
        assert plan(tmp_path, gpus, distributed={"strategy": strategy}).strategy == strategy
        return
    with pytest.raises(RecipeError, match=said):
        plan(tmp_path, gpus, distributed={"strategy": strategy})


@pytest.mark.parametrize("strategy", ["ddp", *SHARDED])
def test_accelerate_and_deepspeed_are_told_what_the_plan_says(tmp_path: Path, strategy: Strategy) -> None:
    """What their files leave open, they would take from the user's own default file."""
    run = create(tmp_path, "one")
    found = plan(tmp_path, 2, nodes=2, distributed={"strategy": strategy, "offload": strategy != "ddp"})
    found.save(run)
    reader = YAML(typ="safe", pure=True)
    reader.version = (1, 1)
    written = reader.load(run.accelerate)
    kinds = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert (written["distributed_type"], written["num_processes"], written["num_machines"]) == (kinds[strategy], 4, 2)
    assert written.get("mixed_precision") == (None if strategy.startswith("zero") else "bf16")
    assert run.deepspeed.exists() == strategy.startswith("zero")
    if strategy == "fsdp":
        assert written["fsdp_config"]["fsdp_version"] == 2
        assert written["fsdp_config"]["fsdp_offload_params"] is True
    if run.deepspeed.exists():
        zero = reader.load(run.deepspeed)["zero_optimization"]
        assert zero["stage"] == int(strategy[-1])
        assert zero["offload_optimizer"]["device"] == "cpu"
        assert ("offload_param" in zero) == (strategy == "zero3")
    evaluation = reader.load(run.accelerate_evaluation)  # on one machine, each process with the whole model
    assert (evaluation["distributed_type"], evaluation["num_processes"], evaluation["num_machines"]) == (
        "MULTI_GPU",
        2,
        1,
    )


def test_zero3_gathers_two_layers_whatever_their_weights_are_packed_in(tmp_path: Path) -> None:
    """DeepSpeed counts numbers, of which each bf16 one holds four weights in 4 bits."""
    keys: dict[str, Any] = {"distributed": {"strategy": "zero3"}, "train": {"gradient_checkpointing": True}}
    held = {}
    for name, model in (("bf16", PLAIN), ("nf4", QLORA)):
        made = plan(tmp_path, 2, model=model, **keys)
        assert not made.dequantize
        zero = distributed.deepspeed_config(made)["zero_optimization"]
        assert zero["stage3_max_live_parameters"] == 2 * zero["stage3_prefetch_bucket_size"]
        held[name] = zero["stage3_max_live_parameters"]
    assert made.layer_parameters is not None
    assert held["bf16"] == 2 * made.layer_parameters
    assert held["nf4"] == held["bf16"] // 4


def test_processes_that_were_started_by_others_keep_their_strategy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch` says by variables how it has started them; a recipe that asks for another is refused."""
    assert (distributed.started(1), distributed.started(2)) == ("single", "ddp")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="fsdp_version: 2"):
        distributed.started(2)
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert distributed.started(2) == "fsdp"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert distributed.started(2) == "zero3"
    write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": 1}})
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    with pytest.raises(RecipeError, match="ZeRO stage 1; FinLLM knows 2 and 3"):
        distributed.started(2)
    recipe = Recipe.model_validate({
        "model": QLORA, "data": "sample", "train": {"method": "sft"}, "distributed": {"strategy": "fsdp"},
    })  # fmt: skip
    with pytest.raises(RecipeError, match="strategy is fsdp, but the processes were started for ddp"):
        decide(recipe, here=Machine((H100,) * 2, 4), rows=None, folder=tmp_path, source="r", processes=2, started="ddp")


def test_a_step_is_dealt_by_its_tokens() -> None:
    """Processes have about equally many tokens, and none more rows than it has places for."""
    rng = np.random.default_rng(3)
    lengths = rng.gamma(6, 5, size=256).astype(int).tolist()
    spread, plain = [], []
    for start in range(0, 256, 32):
        step = list(range(start, start + 32))
        hands = dealt(step, lengths, 4, 8)
        assert sorted(row for hand in hands for row in hand) == step
        assert {len(hand) for hand in hands} == {8}
        spread.append(np.ptp([sum(lengths[row] for row in hand) for hand in hands]))
        plain.append(np.ptp([sum(lengths[row] for row in step[rank::4]) for rank in range(4)]))
    assert np.mean(spread) < 0.2 * np.mean(plain)
    unequal = dealt([0, 1, 2], [9, 1, 1], 2, 2)
    assert unequal == [[0], [1, 2]]
    alone = GlobalBatches(lengths, micro_batch=32, accumulation=1, rank=0, processes=1, seed=1)
    assert sorted(row for batch in alone for row in batch) == list(range(256))


class _WholeCall(torch.nn.Linear):
    """A layer as Transformers 5.17 makes it: checkpointing repeats the call, hooks and all."""

    gradient_checkpointing = True

    def __call__(self, x: torch.Tensor) -> Any:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(super().__call__, x)
        return super().__call__(x)

    def _gradient_checkpointing_func(self, call: Any, x: torch.Tensor) -> Any:
        return checkpoint(call, x, use_reentrant=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).exp()


def test_what_is_computed_again_runs_no_hooks_which_would_gather_weights_again() -> None:
    def gradients(kind: type[_WholeCall]) -> tuple[torch.Tensor, int, int]:
        torch.manual_seed(0)
        layer, x, calls, products = kind(3, 3), torch.ones(2, 3, requires_grad=True), [], []
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
        layer.register_forward_hook(lambda *_: products.append(1))
        layer(x).sum().backward()
        assert layer.weight.grad is not None
        return layer.weight.grad, len(calls), len(products)

    class Mended(_WholeCall):
        pass

    expected, calls, ends = gradients(_WholeCall)
    assert calls == ends == 2, "the layer of this test repeats its hooks"
    for _ in range(2):  # the second time there is nothing left to do
        sharded.compute_again_without_hooks(Mended)
    found, calls, ends = gradients(Mended)
    assert calls == ends == 1
    assert torch.equal(found, expected)
    Mended.gradient_checkpointing = False
    assert torch.equal(gradients(Mended)[0], expected)


Start = Callable[..., Run]


@pytest.fixture(scope="module")
def start(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Prepares a run of the tests' recipe, and starts its training as the launcher does."""
    runs = tmp_path_factory.mktemp("runs")
    return lambda name, *overrides, **changes: launched.start(recipe, runs, name, *USUAL, *overrides, **changes)


@pytest.fixture(scope="module")
def alone(start: Start) -> Run:
    return start("alone")


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "then"), [("fsdp", 1), ("zero2", 2), ("zero3", 2)])
def test_two_processes_end_in_the_weights_of_one_and_go_on_from_a_checkpoint(
    start: Start, alone: Run, strategy: Strategy, then: int
) -> None:
    """Seven steps, the last one with unequal processes; the adapter is PEFT's, in fp32.

    What FSDP has divided between two, one process can go on with; the global batch, and so each step, stays.
    """
    run = start(strategy, f"distributed.strategy={strategy}", "resources.cpu_processes=2")
    assert Plan.of(run).strategy == strategy
    assert Plan.of(run).shared_prefix
    np.testing.assert_allclose(figures(run), figures(alone), rtol=0, atol=1e-4)
    assert error(run.adapter, alone.adapter) < 1e-5
    assert error(run.complete_checkpoints()[0], alone.adapter) > 1e-2  # the measure can tell
    forget_the_end(run)
    if then == 1:
        replanning.replan(run, ["resources.cpu_processes=1"])
        assert (Plan.of(run).processes, Plan.of(run).strategy) == (1, strategy)
    go(run)
    assert error(run.adapter, alone.adapter) < 1e-5
    assert len(figures(run)) == 7 + 3


@pytest.mark.slow
def test_hand_written_passes_in_two_processes_end_in_the_weights_of_one(start: Start, alone: Run) -> None:
    """Their gradients are added up over the processes, and each loss counts the tokens of all; one can go on for two."""
    run = start("by-hand", "resources.cpu_processes=2", hand_written=True)
    np.testing.assert_allclose(figures(run), figures(alone), rtol=0, atol=1e-4)
    assert error(run.adapter, alone.adapter) < 1e-5
    forget_the_end(run)
    replanning.replan(run, ["resources.cpu_processes=1"])
    assert (Plan.of(run).processes, Plan.of(run).strategy, Plan.of(run).hand_written) == (1, "single", False)
    go(run)
    assert error(run.adapter, alone.adapter) < 1e-5


ALL = ("lora=null", "train.learning_rate=1e-3")


@pytest.fixture(scope="module")
def tied_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head is its embeddings, as in Llama-3.2-1B and SmolLM2."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def all_alone(start: Start, tied_model: Path) -> Run:
    return start("all-alone", *ALL, f"model.name={tied_model}")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", *SHARDED])
def test_all_weights_trained_by_two_processes_are_those_of_one(
    start: Start, all_alone: Run, tied_model: Path, strategy: Strategy
) -> None:
    """Of a model with tied embeddings; saved whole, in Transformers' format; also after going on from a checkpoint."""
    where = (f"model.name={tied_model}", f"distributed.strategy={strategy}", "resources.cpu_processes=2")
    run = start(f"all-{strategy}", *ALL, *where)
    assert Plan.of(run).strategy == strategy
    np.testing.assert_allclose(figures(run), figures(all_alone), rtol=0, atol=1e-4)
    assert error(run.adapter, all_alone.adapter) < 1e-5
    assert error(tied_model, all_alone.adapter) > 1e-3  # the measure can tell
    forget_the_end(run)
    go(run)
    assert error(run.adapter, all_alone.adapter) < 1e-5
    assert len(figures(run)) == 7 + 3


def test_a_checkpoint_that_another_number_cannot_read_is_not_gone_on_from(recipe: Path, tmp_path: Path) -> None:
    """The reason is said, with what to type, and the plan stays."""
    run = planning.prepare(str(recipe), ("distributed.strategy=zero2", "resources.cpu_processes=2"), "z", tmp_path)
    checkpoint = run.checkpoints / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").write_text("{}")
    before = run.plan.read_text()
    with pytest.raises(RunError, match="DeepSpeed by 2 processes, which 1 cannot read"):
        replanning.replan(run, ["resources.cpu_processes=1"])
    with pytest.raises(RunError, match=r"checkpoints of strategy zero2, which ddp cannot read"):
        replanning.replan(run, ["distributed.strategy=ddp"])
    with pytest.raises(RecipeError, match=r"train\.learning_rate=1: a run that goes on can change resources"):
        replanning.replan(run, ["train.learning_rate=1"])
    assert run.plan.read_text() == before


def test_fewer_gpus_than_planned_are_said_to_be_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an error of CUDA in a worker: the line to type."""
    run = create(tmp_path, "run")
    plan(tmp_path, 2).save(run)
    State("stopped").save(run)
    monkeypatch.setattr("finllm.machine._nvidia_smi", lambda: (H100,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(
        RunError, match=r"planned for 2 GPU\(s\), and 1 can be seen here; `finllm resume .* resources.gpus=1`"
    ):
        replanning.suit_gpus(run)


def test_an_evaluation_makes_do_with_the_gpus_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`finllm evaluate` of a run that four GPUs have trained, on a machine with two, and with one."""
    run = create(tmp_path, "run")
    plan(run.folder.parent, 4).save(run)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for there, command in ((4, distributed.ACCELERATE), (2, distributed.ACCELERATE), (1, "finllm.evaluate")):
        monkeypatch.setattr("finllm.machine._nvidia_smi", lambda there=there: (H100,) * there)
        replanning.fit_evaluation(run)
        assert (Plan.of(run).evaluators, Plan.of(run).processes) == (there, 4)
        assert command in Plan.of(run).commands["evaluate"]
        written = run.accelerate_evaluation.read_text()
        assert there == 1 or f"num_processes: {there}" in written


@pytest.mark.slow
def test_an_evaluation_by_two_processes_gives_the_answers_of_one(alone: Run, tmp_path: Path) -> None:
    """Every row once, with the same probabilities, and the report of one."""
    from finllm import evaluate
    from finllm.predictions import of_run

    two = Run(tmp_path / "two")
    shutil.copytree(alone.folder, two.folder)
    Plan.of(alone).evaluated_by(2, two).save(two)
    command = Plan.of(two).commands["evaluate"]
    assert "accelerate-evaluate.yaml" in " ".join(command)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert evaluate.main([str(alone.folder)]) == 0
    ours, theirs = (of_run(run).predictions for run in (two, alone))
    assert [p.id for p in ours] == [p.id for p in theirs]
    assert len({p.id for p in ours}) == len(ours) > 0
    table = [[p.probabilities for p in part] for part in (ours, theirs)]
    np.testing.assert_allclose(table[0], table[1], atol=1e-6)
    assert two.report.exists()
