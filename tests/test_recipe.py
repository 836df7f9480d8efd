"""Recipes: every shipped one is read, every wrong one is refused."""

from pathlib import Path

import pytest

from finllm import yamlfile
from finllm.errors import RecipeError
from finllm.methods import Sft
from finllm.recipe import Recipe, load
from launch import shipped

FILES = sorted(shipped.FOLDER.rglob("*.yaml"))
WHOLE = """\
model:
  name: smollm2-135m
  quantization: nf4
data: sample
lora:
  rank: 8
train:
  method: sft
  global_batch: 8
"""


def recipe(folder: Path, text: str, *overrides: str) -> Recipe:
    (folder / "r.yaml").write_text(text)
    return load(folder / "r.yaml", overrides)


def faults(folder: Path, text: str, *overrides: str) -> str:
    """What is said of a wrong recipe, with the folder left out."""
    with pytest.raises(RecipeError) as caught:
        recipe(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}/", "")


def test_there_are_shipped_recipes() -> None:
    """The tests below would pass with none."""
    assert "demo" in shipped.names()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(shipped.FOLDER).with_suffix("").as_posix())
def test_every_shipped_file_can_be_read(path: Path) -> None:
    """Those in base/ are parts of others, and are read as such; the others are recipes that say what they are for."""
    if shipped.FRAGMENTS in path.parts:
        document = yamlfile.read(path)
        assert document.values
        assert not document.faults
        assert any(_extends(other, path) for other in FILES), f"{path} is used by no recipe"
        return
    assert load(path).purpose


def _extends(path: Path, base: Path) -> bool:
    """Whether a file names another one after `extends:`."""
    return "extends:" in path.read_text() and base.name in path.read_text()


def test_short_forms_mean_the_long_ones(tmp_path: Path) -> None:
    """A name is a mapping with a name, one data set is a list of one."""
    short = recipe(tmp_path, "model: smollm2-135m\ndata: sample\n")
    assert short == recipe(tmp_path, "model: {name: smollm2-135m}\ndata: [{name: sample}]\n")


def test_what_a_recipe_says_arrives(tmp_path: Path) -> None:
    """Typed, and with the defaults where it says nothing."""
    found = recipe(tmp_path, WHOLE, "train.learning_rate=2e-4", "lora.targets=[q_proj, v_proj]", "train.micro_batch=4")
    assert isinstance(found.train, Sft)
    assert (found.train.learning_rate, found.train.micro_batch, found.train.global_batch) == (2e-4, 4, 8)
    assert found.lora is not None
    assert (found.lora.rank, found.lora.targets) == (8, ("q_proj", "v_proj"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("learning_rat: 1e-3", "r.yaml:10: train.learning_rat is not a known key; did you mean learning_rate?"),
        ("seed: forty", "r.yaml:10: train.seed is 'forty'; it must be an integer"),
        ("seed: -1", "r.yaml:10: train.seed is -1; it must be greater than or equal to 0"),
        ("learning_rate: 3", "r.yaml:10: train.learning_rate is 3; it must be less than 1"),
        ("epochs: 0", "r.yaml:10: train.epochs is 0; it must be greater than 0"),
        ("warmup_share: 10", "train.warmup_share is 10; it must be less than or equal to 1"),
        ("optimizer: adam", "train.optimizer is 'adam'; it must be 'adamw', 'paged_adamw_32bit'"),
        ("micro_batch: big", "train.micro_batch is 'big'; it must be an integer, or it must be 'auto'"),
        ("global_batch: 4", "r.yaml:10: train.global_batch is given twice, first at r.yaml:9"),
        ("keep_checkpoints: 1", "train.keep_checkpoints is 1; it must be greater than or equal to 2"),
    ],
    ids=lambda text: text.split(";")[0][:40],
)
def test_a_wrong_training_key_is_refused(tmp_path: Path, change: str, said: str) -> None:
    """Misspelt, ill-typed, out of range or repeated, with its line."""
    assert said in faults(tmp_path, f"{WHOLE}  {change}\n")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["lora=null"], "model.quantization is nf4 but lora is null: quantised weights cannot be trained"),
        (["lora.targets=[]"], "targets is empty; name at least one module"),
        (["train.micro_batch=3"], "global_batch is 8, which micro_batch 3 does not divide; try global_batch 9"),
        (["train.micro_batch=0"], "micro_batch is 0; write auto, or a number from 1"),
        (["data=[sample, sample]"], "data names the same set twice (sample, sample); give each its own `alias`"),
        (["resources.gpus=-1"], "gpus is -1; write auto, or a number from 0"),
        (["data=[]"], "data is []; it needs at least 1 item(s)"),
        (["data=smaple"], "data.name is 'smaple'; did you mean sample? It must be one of sample, phrasebank"),
        (["data={kind: mixed}"], "data.name is missing"),
        (["data.0.split=cv5-7"], "split is not a known key"),
        (["data=phrasebank", "data.0.split=cv5-7"], "data.0.split is 'cv5-7'; it must be"),
        (["train.method=xyz"], "train.method is 'xyz'; it must be one of sft, dpo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_choices_that_contradict_each_other_are_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    """Before anything starts, with what to write instead."""
    assert said in faults(tmp_path, WHOLE, *overrides)


def test_a_contradiction_is_placed_where_it_can_be_mended(tmp_path: Path) -> None:
    """At the key that the message begins with, not at the top of the file."""
    said = faults(
        tmp_path,
        "purpose: none\nmodel:\n  name: a\n  quantization: nf4\ndata: sample\nlora: null\ntrain: {method: sft}",
    )
    assert "r.yaml:4: model.quantization is nf4 but lora is null" in said
    said = faults(tmp_path, "model: a\ndata: sample\ntrain:\n  method: sft\n  global_batch: 8\n  micro_batch: 3\n")
    assert "r.yaml:5: train: global_batch is 8" in said


def test_a_key_of_the_command_line_in_a_file_is_explained(tmp_path: Path) -> None:
    """`model.quantization: nf4` is how overrides are written."""
    said = faults(tmp_path, "model: a\nmodel.quantization: nf4\ndata: sample\n")
    assert "r.yaml:2: model.quantization is not a known key; in a file, write quantization below model" in said


def test_faults_of_all_parts_are_told_together(tmp_path: Path) -> None:
    """Nobody should have to run it five times to hear of five faults."""
    text = (
        "model: {nam: a}\ndata:\n  - {name: phrasebank, agrement: 50}\n  - {name: sample, kind: odd}\nlora: {rank: 0}\n"
    )
    first, *others = faults(tmp_path, text, "train.method=sft", "train.lr=1").splitlines()
    assert first == "r.yaml: 6 faults"
    assert [line.split(";")[0].strip() for line in others] == [
        "r.yaml:1: model.name is missing",
        "r.yaml:1: model.nam is not a known key",
        "r.yaml:3: data.0.agrement is not a known key",
        "r.yaml:4: data.1.kind is 'odd'",
        "r.yaml:5: lora.rank is 0",
        "command line (train.lr=1): train.lr is not a known key",
    ]


def test_model_and_data_have_no_default(tmp_path: Path) -> None:
    """What is trained on what is always written down."""
    said = faults(tmp_path, "purpose: none\n")
    assert "model is missing" in said
    assert "data is missing" in said


def test_a_recipe_cannot_be_changed_after_reading(tmp_path: Path) -> None:
    """What must be computed becomes a plan."""
    found = recipe(tmp_path, WHOLE)
    with pytest.raises(ValueError, match="frozen"):
        found.purpose = "another"  # type: ignore[misc]
