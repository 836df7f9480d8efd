"""finllm.data.hub: sets of the hub, tried on local folders, which `datasets` reads in the same way."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from finllm.data import read_parts
from finllm.data.hub import Hub
from finllm.errors import DataError
from finllm.example import Example


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` prepares lands in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten training rows and two of validation, in Parquet; the label has class names in another order than ours."""
    from datasets import ClassLabel, Dataset, Features, Value

    kind = ClassLabel(names=["Bearish", "Bullish", "Neutral"])
    features = Features({"sentence": Value("string"), "label": kind, "company": Value("string")})
    words = ["oil", "wheat", "copper", "tea", "rubber", "cotton", "sugar", "timber", "zinc", "gas"]
    sets = {
        "train": [{"sentence": f"The price of {w} moved", "label": i % 3, "company": w} for i, w in enumerate(words)],
        "validation": [{"sentence": s, "label": 1, "company": None} for s in ("A quiet day.", "Orders doubled!")],
    }
    for name, rows in sets.items():
        (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "set" / "data" / f"{name}.parquet")
    return tmp_path / "set"


NAMES = {"bearish": "negative", "bullish": "positive", "neutral": "neutral"}


def hub(folder: Path | str, **keys: Any) -> Hub:
    return Hub.model_validate({"name": "hub", "id": str(folder), "text": "sentence", "labels": NAMES, **keys})


def test_named_splits_become_parts_and_class_names_become_labels(folder: Path) -> None:
    """The hub's validation is used as test here, and the company as target."""
    rows = hub(folder, splits={"train": "train", "test": "validation"}, target="company").read()
    assert rows[0] == Example(
        "hub:train-0", "hub", "The price of oil moved", "negative", "train", target="oil", group=None
    )
    assert rows[-1] == Example("hub:validation-1", "hub", "Orders doubled!", "positive", "test")
    assert [row.label for row in rows[:3]] == ["negative", "positive", "neutral"]
    assert Counter(row.split for row in rows) == {"train": 10, "test": 2}


def test_without_named_splits_we_split_all_rows(folder: Path) -> None:
    """The same 70/10/20 as a table's; every row has a group then."""
    rows = hub(folder, alias="mine").read()
    assert len(rows) == 12
    assert {row.split for row in rows} == {"train", "validation", "test"}
    assert all(row.group is not None for row in rows)
    assert read_parts([hub(folder)]).twins_grouped == {"hub"}
    assert not hub(folder, splits={"train": "train"}).twins_grouped


def test_a_folder_of_csv_files_works_too(tmp_path: Path) -> None:
    """Labels as words, found without a mapping."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("text,label\nUp,positive\nDown,negative\n")
    rows = Hub(name="hub", id=str(tmp_path / "set"), splits={"train": "train"}).read()
    assert [(row.text, row.label) for row in rows] == [("Up", "positive"), ("Down", "negative")]


def test_an_unknown_split_is_refused(folder: Path) -> None:
    """The set's own splits are listed."""
    with pytest.raises(DataError, match="has no split dev; its splits are train, validation"):
        hub(folder, splits={"validation": "dev"}).read()


def test_an_unknown_column_is_refused_with_the_nearest(folder: Path) -> None:
    """As for a table."""
    with pytest.raises(DataError, match=r"split train: there is no column sentense; did you mean sentence\?"):
        hub(folder, text="sentense").read()


def test_an_unknown_class_is_refused_with_its_row(folder: Path) -> None:
    """Class names, not numbers, are what `labels` maps."""
    with pytest.raises(DataError, match=r"4 row.*'Bearish' at row 0 of train"):
        hub(folder, labels={"bullish": "positive", "neutral": "neutral"}).read()


def test_a_set_that_cannot_be_had_is_refused_with_directions() -> None:
    """Offline, and not in the cache."""
    with pytest.raises(DataError, match=r"nobody/nothing: .*ConnectionError.*Check `id`"):
        hub("nobody/nothing").read()


def test_a_loading_script_is_refused_with_directions(tmp_path: Path) -> None:
    """`datasets` 5 no longer runs them."""
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text("raise SystemExit('must not run')\n")
    with pytest.raises(DataError, match="use `name: table`"):
        hub(tmp_path / "scripted").read()
