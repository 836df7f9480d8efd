"""Plans: arithmetic, refusals, and what is written into a run folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from finllm import machine
from finllm.distributed import accelerate_yaml
from finllm.errors import RecipeError, RunError
from finllm.lengths import Lengths
from finllm.machine import Gpu, Machine
from finllm.plan import Plan, Rows, decide
from finllm.recipe import Recipe, load, recipe_yaml
from finllm.run import create
from launch import shipped

CPU = Machine((), 4)
H100, V100 = Gpu("NVIDIA H100", 79.2, 9.0), Gpu("NVIDIA V100", 31.7, 7.0)
TEXT = "model: {name: smollm2-135m, quantization: nf4}\ndata: sample\ntrain: {method: sft}\n"
RECIPES = [shipped.FOLDER / f"{name}.yaml" for name in shipped.names()]


def recipe(folder: Path, *overrides: str, text: str = TEXT) -> Recipe:
    path = folder / "r.yaml"
    path.write_text(text)
    return load(path, overrides)


def plan(
    folder: Path, *overrides: str, here: Machine = CPU, train_rows: int = 100, processes: int | None = None
) -> Plan:
    rows = Rows(train=train_rows, validation=10, test=20)
    wanted = recipe(folder, *overrides)
    return decide(wanted, here=here, rows=rows, folder=folder / "run", source="r.yaml", processes=processes)


@pytest.mark.parametrize(
    ("overrides", "gpus", "expected"),
    [
        (["train.global_batch=16"], 0, (1, 16, 1)),
        (["train.global_batch=64"], 0, (1, 16, 4)),
        (["train.global_batch=22"], 0, (1, 11, 2)),
        (["train.global_batch=17"], 0, (1, 1, 17)),
        (["train.global_batch=64", "train.micro_batch=4"], 0, (1, 4, 16)),
        (["train.global_batch=16", "resources.cpu_processes=2"], 0, (2, 8, 1)),
        (["train.global_batch=64"], 4, (4, 16, 1)),
        (["train.global_batch=64", "train.micro_batch=4"], 4, (4, 4, 4)),
        (["train.global_batch=64", "resources.gpus=2"], 4, (2, 32, 1)),
        (["train.global_batch=64", "resources.gpus=0"], 4, (1, 16, 4)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_global_batch_is_made_up_exactly(
    tmp_path: Path, overrides: list[str], gpus: int, expected: tuple[int, int, int]
) -> None:
    """Processes, examples in one forward pass of each, passes to a step."""
    found = plan(tmp_path, *overrides, here=Machine((H100,) * gpus, 4))
    assert (found.processes, found.micro_batch, found.accumulation) == expected
    assert found.recipe.train is not None
    assert found.processes * found.micro_batch * found.accumulation == found.recipe.train.global_batch


@pytest.mark.parametrize(
    ("overrides", "rows", "steps"),
    [
        (["train.epochs=3", "train.global_batch=16"], 96, 18),
        (["train.epochs=3", "train.global_batch=16"], 97, 21),
        (["train.epochs=0.5", "train.global_batch=16"], 97, 4),
        (["train.epochs=0.01", "train.global_batch=16"], 16, 1),
        (["train.max_steps=5"], 970, 5),
        (["train.epochs=1", "train.max_steps=500"], 96, 6),
    ],
    ids=["whole", "an incomplete batch counts", "half an epoch", "at least one", "capped", "cap out of reach"],
)
def test_steps_are_counted(tmp_path: Path, overrides: list[str], rows: int, steps: int) -> None:
    """As Transformers does: the last batch of each epoch may be smaller."""
    assert plan(tmp_path, *overrides, train_rows=rows).steps == steps


def test_steps_are_unknown_where_rows_are(tmp_path: Path) -> None:
    """A set that would have to be fetched is not counted."""
    unknown = decide(recipe(tmp_path), here=CPU, rows=None, folder=tmp_path / "run", source="r.yaml")
    assert (unknown.rows, unknown.steps) == (None, None)


@pytest.mark.parametrize(
    ("overrides", "here", "said"),
    [
        (["train.global_batch=15", "resources.cpu_processes=2"], CPU, "15, which 2 processes do not divide; try 14"),
        (
            ["train.global_batch=8", "train.micro_batch=8", "resources.cpu_processes=2"],
            CPU,
            "16 does not divide; try 16",
        ),
        (["resources.gpus=2"], Machine((H100,), 4), "resources.gpus is 2, but 1 can be seen here"),
        (["model.dtype=bf16"], Machine((V100,), 4), "model.dtype is bf16, which NVIDIA V100 does not have"),
        (["train.optimizer=paged_adamw_32bit"], CPU, "needs a GPU; write adamw"),
        (["model.quantization=int8"], CPU, "needs a GPU; write nf4 or none"),
        (["model.attention=flash_attention_2"], CPU, "needs a GPU; write sdpa"),
        (["resources.gpu=h1000"], CPU, "resources.gpu is 'h1000'; known are a10-24gb"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_this_machine_cannot_do_is_refused(tmp_path: Path, overrides: list[str], here: Machine, said: str) -> None:
    """Before anything starts, with what would work."""
    with pytest.raises(RecipeError) as caught:
        plan(tmp_path, *overrides, here=here)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "here", "expected"),
    [
        ([], CPU, ("cpu", "fp32")),
        ([], Machine((H100,), 4), ("cuda", "bf16")),
        ([], Machine((V100,), 4), ("cuda", "fp32")),
        ([], Machine((H100, V100), 4), ("cuda", "fp32")),
        (["model.dtype=fp32"], Machine((H100,), 4), ("cuda", "fp32")),
        (["resources.gpus=0"], Machine((H100,), 4), ("cpu", "fp32")),
        (["resources.gpu=t4-16gb"], CPU, ("cuda", "fp32")),
        (["resources.gpu=a100-80gb"], CPU, ("cuda", "bf16")),
    ],
    ids=["CPU", "H100", "V100", "a mixed pair", "fp32 wanted", "CPU wanted", "an imagined T4", "an imagined A100"],
)
def test_arithmetic_follows_the_device(
    tmp_path: Path, overrides: list[str], here: Machine, expected: tuple[str, str]
) -> None:
    """bf16 where every GPU has it."""
    found = plan(tmp_path, *overrides, here=here)
    assert (found.device, found.dtype) == expected


MISTRAL = """
model: {name: mistralai/Mistral-7B-v0.1, quantization: nf4}
data: sample
train: {method: sft, global_batch: 32}
"""
TEXTS = Lengths(texts=3382, mean=38, deviation=15, longest=184)
"""About PhraseBank's."""


def planned(folder: Path, gpu: str, *overrides: str, text: str = MISTRAL) -> Plan:
    wanted = recipe(folder, *([f"resources.gpu={gpu}"] if gpu else []), *overrides, text=text)
    rows = Rows(train=3382, validation=480, test=970)
    return decide(wanted, here=CPU, rows=rows, folder=folder / "run", source="r.yaml", texts=TEXTS)


@pytest.mark.parametrize(
    ("gpu", "overrides", "expected"),
    [
        ("h200-141gb", [], (32, False, True)),
        ("a100-80gb", [], (32, False, True)),
        ("l4-24gb", [], (16, False, True)),
        ("l4-24gb", ["train.hand_written=off"], (8, False, True)),
        ("l4-24gb", ["train.global_batch=4"], (4, False, True)),
        ("t4-16gb", [], (32, True, False)),
        ("a100-40gb", ["train.shared_prefix=off"], (8, False, True)),
        ("a100-80gb", ["train.gradient_checkpointing=true"], (32, True, False)),
        ("a100-80gb", ["train.micro_batch=2"], (2, False, True)),
        ("a100-80gb", ["model.quantization=none"], (32, False, False)),
        ("l4-24gb", ["model.quantization=none"], (16, False, False)),
        ("", ["model.name=smollm2-135m"], (16, False, True)),
        ("", ["model.name=smollm2-135m", "train.gradient_checkpointing=true"], (16, True, True)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value if isinstance(value, str) else "",
)
def test_what_fits_is_chosen(tmp_path: Path, gpu: str, overrides: list[str], expected: tuple[int, bool, bool]) -> None:
    """Micro-batch, checkpointing, dequantised: the fastest that the memory holds, and what the recipe sets stays."""
    found = planned(tmp_path, gpu, *overrides)
    assert (found.micro_batch, found.gradient_checkpointing, found.dequantize) == expected
    assert found.micro_batch * found.accumulation == (4 if "train.global_batch=4" in overrides else 32)
    assert found.memory is not None
    assert found.memory.limit is None or found.memory.total <= found.memory.limit
    parts = found.memory.weights + found.memory.trained + found.memory.activations + found.memory.other
    assert found.memory.total == pytest.approx(parts)


def test_a_micro_batch_is_the_largest_that_fits(tmp_path: Path) -> None:
    """The next larger one, forced, is refused; memory grows with it."""
    found = planned(tmp_path, "l4-24gb")
    assert any(reason.startswith("micro-batch 16: 32 would need ") for reason in found.reasons)
    with pytest.raises(RecipeError, match=r"may fill 19\.8; .*set train\.micro_batch to auto"):
        planned(
            tmp_path, "l4-24gb", "train.micro_batch=32", "train.gradient_checkpointing=false", "model.quantization=none"
        )


@pytest.mark.parametrize(
    ("gpu", "overrides", "said"),
    [
        (
            "a100-80gb",
            ["model.quantization=none", "lora=null"],
            r"with micro-batch 1 needs about 12\d\.\d GiB .*\(weights 27\.0, trained 9\d\.\d, .*fill 71\.3; give lora a rank",
        ),
        (
            "t4-16gb",
            ["model.quantization=none"],
            r"weights 27\.0, .* it may fill 13\.1; set model\.quantization to nf4",
        ),
        ("t4-16gb", ["train=null", "model.quantization=none"], r"scoring needs about 2\d\.\d GiB"),
        (
            "t4-16gb",
            ["train.gradient_checkpointing=false", "train.micro_batch=32"],
            r"set train\.micro_batch to auto, or set train\.gradient_checkpointing to auto",
        ),
    ],
    ids=["all weights of 7B on 80 GB", "fp32 on 16 GB", "scoring in fp32 on 16 GB", "too much wanted"],
)
def test_what_cannot_fit_is_refused_with_numbers(tmp_path: Path, gpu: str, overrides: list[str], said: str) -> None:
    """What it needs by terms, what there is, and what to change."""
    with pytest.raises(RecipeError, match=said):
        planned(tmp_path, gpu, *overrides)


def test_several_gpus_and_their_smallest_memory_count(tmp_path: Path) -> None:
    """Each process has its share of the batch, and DDP's buckets."""
    small = Gpu("NVIDIA A10", 22.0, 8.6)
    wanted = recipe(tmp_path, text=MISTRAL)
    both = decide(wanted, here=Machine((H100, small), 8), rows=None, folder=tmp_path / "r", source="r", texts=TEXTS)
    assert both.memory is not None
    assert both.memory.limit == pytest.approx(0.9 * 22.0)
    assert both.processes * both.micro_batch * both.accumulation == 32


def test_a_model_of_unknown_shape_is_planned_by_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the plan says."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    found = planned(tmp_path, "a100-80gb", "model.name=someone/something")
    assert found.memory is None
    assert (found.micro_batch, found.gradient_checkpointing, found.dequantize) == (16, True, False)
    assert "memory not estimated: the shape of someone/something is not known before it is loaded" in found.reasons


def test_without_texts_prompts_are_taken_to_be_as_long_as_allowed(tmp_path: Path) -> None:
    """A dry run where the data would have to be fetched."""
    wanted = recipe(tmp_path, "resources.gpu=a100-80gb", text=MISTRAL)
    found = decide(wanted, here=CPU, rows=None, folder=tmp_path / "run", source="r.yaml")
    assert found.memory is not None
    assert found.memory.tokens > 400 * found.micro_batch
    assert "texts not at hand: memory is for prompts of 512 tokens" in found.reasons


def test_scoring_batches_are_smaller_where_they_would_not_fit(tmp_path: Path) -> None:
    """A T4 has no bf16, and half the room is the model's."""
    assert planned(tmp_path, "a100-80gb").batch_tokens == 16_384
    found = planned(tmp_path, "t4-16gb")
    assert found.batch_tokens == 8192
    assert "scoring batches of 8192 tokens: more would not fit" in found.reasons


def test_a_cpu_with_little_memory_gets_a_smaller_micro_batch(tmp_path: Path) -> None:
    """Its processes share it; where even one example is too much, the plan says so and tries."""
    wanted = recipe(tmp_path, "train.global_batch=16")

    def on(gib: float) -> Plan:
        rows = Rows(train=100, validation=10, test=20)
        here = Machine((), 2, gib)
        return decide(wanted, here=here, rows=rows, folder=tmp_path / "run", source="r.yaml", texts=TEXTS)

    assert (on(8).micro_batch, on(8).gradient_checkpointing) == (16, False)
    assert (on(4).micro_batch, on(4).gradient_checkpointing) == (8, False)
    assert (on(3).micro_batch, on(3).gradient_checkpointing) == (16, True)
    assert any("needs about" in reason for reason in on(1).reasons)


def test_memory_of_this_machine_is_known() -> None:
    """From the system or the control group."""
    assert 0.5 < (machine.here().memory_gib or 0) < 100_000


def test_processes_that_are_started_already_are_taken_as_they_are(tmp_path: Path) -> None:
    """`accelerate launch -m finllm.train recipe.yaml` from a plain shell."""
    assert plan(tmp_path, "train.global_batch=16", processes=4).micro_batch == 4
    with pytest.raises(RecipeError, match="3 processes do not divide"):
        plan(tmp_path, "train.global_batch=16", processes=3)


def test_a_recipe_without_training_is_only_evaluated(tmp_path: Path) -> None:
    """One process, no steps, one command."""
    zero_shot = recipe(tmp_path, text="model: smollm2-135m\ndata: sample\n")
    found = decide(zero_shot, here=Machine((H100,) * 4, 4), rows=None, folder=tmp_path / "run", source="r.yaml")
    assert list(found.commands) == ["evaluate"]
    assert (found.processes, found.steps) == (1, None)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(shipped.FOLDER).as_posix())
def test_every_shipped_recipe_can_be_planned_for_a_large_gpu(path: Path, tmp_path: Path) -> None:
    """A recipe that loads may still ask for what no machine can do."""
    found = decide(load(path), here=Machine((H100,), 16), rows=None, folder=tmp_path / "run", source=str(path))
    assert found.device == "cuda"


@pytest.mark.parametrize("gpus", [0, 1, 2], ids=["CPU", "one GPU", "two GPUs"])
def test_accelerate_is_told_what_the_plan_says(tmp_path: Path, gpus: int) -> None:
    """It reads its file as YAML 1.1, where a bare `no` is false."""
    found = plan(tmp_path, "train.global_batch=16", here=Machine((H100,) * gpus, 4))
    reader = YAML(typ="safe", pure=True)
    reader.version = (1, 1)
    written = reader.load(accelerate_yaml(found, create(tmp_path, "one")))
    assert written["num_processes"] == max(1, gpus)
    assert written["distributed_type"] == ("MULTI_GPU" if gpus > 1 else "NO")
    assert written["mixed_precision"] == ("bf16" if gpus else "no")
    assert written["use_cpu"] is (gpus == 0)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_starts_as_many_processes_and_guesses_nothing(tmp_path: Path, processes: int) -> None:
    """What is not in the file it takes from the user's own default file, or guesses with a warning."""
    found = plan(tmp_path, f"resources.cpu_processes={processes}", "train.global_batch=16")
    run = create(tmp_path, "run")
    found.save(run)
    *launcher, module, _ = found.commands["train"]
    assert module == "finllm.train"
    answer = subprocess.run(
        [*launcher, "platform"], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    assert answer.stdout.count("Linux") == processes
    assert "defaults used instead" not in answer.stderr
    assert "Warning" not in answer.stderr


@pytest.mark.parametrize("purpose", ["plain", "2026-01-01", "no", "1e3", "null", "a: b # c", "'", "ümlaut\nline", ""])
def test_the_recipe_in_a_run_folder_loads_to_the_same_recipe(tmp_path: Path, purpose: str) -> None:
    """Whatever stands in it."""
    wanted = recipe(tmp_path, "data=[sample, phrasebank]", "data.1.bands=['50-66']", "train.max_steps=7")
    wanted = wanted.model_copy(update={"purpose": purpose})
    (tmp_path / "again.yaml").write_text(recipe_yaml(wanted), encoding="utf-8")
    assert load(tmp_path / "again.yaml") == wanted


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(shipped.FOLDER).as_posix())
def test_shipped_recipes_survive_the_run_folder(path: Path, tmp_path: Path) -> None:
    """Resolved, without `extends`, they are the same."""
    (tmp_path / "again.yaml").write_text(recipe_yaml(load(path)), encoding="utf-8")
    assert load(tmp_path / "again.yaml") == load(path)


def test_a_plan_is_read_back_as_it_was_saved(tmp_path: Path) -> None:
    """The worker reads what the launcher wrote; nothing is left half-written."""
    run = create(tmp_path, "one")
    saved = plan(tmp_path, "train.learning_rate=3e-5").model_copy(update={"name": "one"})
    saved.save(run)
    assert Plan.of(run) == saved
    assert sorted(path.name for path in run.folder.iterdir()) == ["accelerate.yaml", "plan.json", "recipe.yaml"]


def test_a_damaged_plan_is_said_to_be_damaged(tmp_path: Path) -> None:
    """Not a traceback of a JSON parser."""
    run = create(tmp_path, "one")
    run.plan.write_text('{"name": "on')
    with pytest.raises(RunError, match=r"plan.json is damaged"):
        Plan.of(run)


def test_gpus_are_those_that_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nvidia-smi` lists all; CUDA_VISIBLE_DEVICES hides some. The program here stands in for a machine with two GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 9.0'\necho 'Tesla V100-SXM2-32GB, 32768, 7.0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu.name for gpu in machine.here().gpus] == ["NVIDIA H100 80GB HBM3", "Tesla V100-SXM2-32GB"]
    for visible, capabilities in (("1", [7.0]), ("1,0", [7.0, 9.0]), ("", []), ("-1", []), ("GPU-4f2a", [9.0])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [gpu.capability for gpu in machine.here().gpus] == capabilities, visible


def test_a_broken_driver_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training on the CPU instead, silently, would take weeks."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(RunError, match="Driver/library version mismatch"):
        machine.here()


def test_a_dry_run_is_quick_and_light(tmp_path: Path) -> None:
    """Within a second of a processor (twice that where the machine is busy), without torch and transformers, and it makes nothing."""
    program = (
        "import sys; from launch.cli import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'sklearn', 'accelerate', 'wandb'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    command = [sys.executable, "-P", "-c", program, "launch", "demo", "--dry-run", "--runs", str(tmp_path / "runs")]
    seconds = []
    for _ in range(3):
        before = os.times()
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert (answer.returncode, answer.stderr) == (0, "")
    assert "steps    75" in answer.stdout
    assert "memory   about " in answer.stdout
    assert "finllm.train" in answer.stdout
    assert not (tmp_path / "runs").exists()
    assert min(seconds) < 2, seconds
