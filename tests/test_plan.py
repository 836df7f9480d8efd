"""Plans: arithmetic, refusals, and what is written into a run folder."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from finllm import machine
from finllm.errors import RecipeError, RunError
from finllm.machine import Gpu, Machine
from finllm.plan import Plan, Rows, accelerate_yaml, decide, recipe_yaml
from finllm.recipe import Recipe, load
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
    written = reader.load(accelerate_yaml(found))
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
    """Within a second here (twice that where the machine is busy), without torch and transformers, and it makes nothing."""
    program = (
        "import sys; from launch.cli import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'sklearn', 'accelerate', 'wandb'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    command = [sys.executable, "-P", "-c", program, "launch", "demo", "--dry-run", "--runs", str(tmp_path / "runs")]
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds.append(time.monotonic() - began)
        assert (answer.returncode, answer.stderr) == (0, "")
    assert "steps    75" in answer.stdout
    assert "finllm.train" in answer.stdout
    assert not (tmp_path / "runs").exists()
    assert min(seconds) < 2, seconds
