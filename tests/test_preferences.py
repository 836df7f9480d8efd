"""Pairs of answers: from out-of-fold predictions, from mixed signals, from a file; and never from held-out texts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finllm import data
from finllm.data import preferences
from finllm.data.parts import Parts
from finllm.data.preferences import Careless, File, Folds, Preference
from finllm.data.sample import Sample
from finllm.errors import DataError, RecipeError
from finllm.example import LABELS, Example
from finllm.learnt import counted, learnt
from finllm.methods import Dpo
from finllm.recipe import Recipe, load
from finllm.sweeps import Cell, Sweep
from launch import cli
from launch import pairs as shown

COUNT = 3
SPEC = Sample(name="sample")
PARTS = data.training_parts([SPEC])[0]


def test_folds_hold_each_training_row_out_once() -> None:
    """Test rows of the fold runs are the training rows; validation stays, the test part is in none of them."""
    seen: list[str] = []
    for number in range(1, COUNT + 1):
        fold, _ = data.training_parts([Sample(name="sample", fold=f"{number}/{COUNT}")])
        seen += [row.id for row in fold.test]
        assert {row.id for row in fold.train} == {row.id for row in PARTS.train} - {row.id for row in fold.test}
        assert fold.validation == PARTS.validation
        assert abs(len(fold.test) - len(PARTS.train) / COUNT) < 2
    assert sorted(seen) == sorted(row.id for row in PARTS.train)


def test_near_twins_share_a_fold() -> None:
    """Of a data set whose groups are known, and of one whose are not."""
    from finllm.data.folds import held_out

    rows = [
        Example(str(i), "x", f"Sentence number {i} of {'abcdefghij'[i % 10] * 9}", LABELS[i % 3], "train", group=str(i // 2))
        for i in range(20)
    ]  # fmt: skip
    for number in (1, 2, 3, 4):
        fold = {row.group for row in held_out(rows, f"{number}/4", twins_grouped=True) if row.split == "test"}
        rest = {row.group for row in held_out(rows, f"{number}/4", twins_grouped=True) if row.split == "train"}
        assert fold
        assert not fold & rest
    twins = [Example(str(i), "x", f"Oyj's net sales rose by {i // 2} {'per cent' * (i % 2 + 1)} in {i // 2 * 'Finland '}",
                     "positive", "train") for i in range(12)]  # fmt: skip
    fold_of: dict[str, int] = {}
    for number in (1, 2):
        fold_of |= {
            row.id: number for row in held_out(twins, f"{number}/2", twins_grouped=False) if row.split == "test"
        }
    assert all(fold_of[str(i)] == fold_of[str(i + 1)] for i in range(0, 12, 2))


@pytest.mark.parametrize("fold", ["0/5", "6/5", "1/1", "2", "x/5"])
def test_a_fold_that_is_none_is_refused(fold: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: smollm2-135m\ndata: {{name: sample, fold: '{fold}'}}\ntrain: {{method: sft}}\n")
    with pytest.raises(RecipeError, match="is no fold; write number/count, such as 2/5"):
        load(path)


def sweep_of(folder: Path, *, count: int = COUNT, alter: Any = None, **changes: Any) -> Path:
    """A sweep's folders as `finllm launch --sweep data.0.fold=...` leaves them, with made-up answers.

    Every fifth row is wrong (as its neighbour among the labels), every other fifth is right by a margin of 0.1.
    """
    cells = []
    for number in range(1, count + 1):
        spec = Sample(name="sample", fold=f"{number}/{count}", **changes)
        run = folder / f"folds-{number}"
        (run / "predictions").mkdir(parents=True)
        rows = []
        for row in data.read_parts([spec]).test:
            gold, place = LABELS.index(row.label), int(row.id[-2:]) % 5
            shares = [0.01] * 3
            shares[gold], shares[(gold + 1) % 3] = {0: (0.3, 0.6), 1: (0.5, 0.4)}.get(place, (0.9, 0.05))
            answer = {"id": row.id, "dataset": "sample", "part": "test", "gold": row.label, "predicted": row.label}
            rows.append({**answer, "probabilities": shares, "text": row.text})
        rows = alter(rows, number) if alter else rows
        (run / "predictions" / "sample.test.tuned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / "scores.json").write_text("{}")
        (run / "plan.json").write_text(json.dumps({"recipe": {"data": [spec.model_dump(mode="json")]}}))
        cells.append(Cell(run.name, (f"data.0.fold={number}/{count}",)))
    Sweep(folder / "folds", "x.yaml", ("data.0.fold",), tuple(cells)).save()
    return folder / "folds"


def test_wrong_and_narrow_answers_make_pairs(tmp_path: Path) -> None:
    """Chosen is the gold label, rejected what it was confused with, and the text is that of the training part."""
    spec = Folds(name="folds", sweep=sweep_of(tmp_path))
    found = preferences.read([spec], PARTS, [SPEC])
    rows = {row.id: row for row in PARTS.train}
    assert {pair.id for pair in found} == {i for i in rows if int(i[-2:]) % 5 in (0, 1)}
    for pair in found:
        assert (pair.text, pair.chosen) == (rows[pair.id].text, rows[pair.id].label)
        assert pair.rejected == LABELS[(LABELS.index(rows[pair.id].label) + 1) % 3]
    narrow = spec.model_copy(update={"margin": 0.0})
    assert {pair.id for pair in preferences.read([narrow], PARTS, [SPEC])} == {i for i in rows if int(i[-2:]) % 5 == 0}


def test_bands_of_agreement_can_be_chosen() -> None:
    """A source takes only the bands it names."""
    assert Careless(name="careless", bands=("100",)).wants("100")
    assert not Careless(name="careless", bands=("100",)).wants("50-66")
    assert not Careless(name="careless", bands=("100",)).wants(None)
    assert Careless(name="careless").wants(None)


def planted_test_row(rows: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    return [*rows, {**rows[0], "id": PARTS.test[0].id, "text": PARTS.test[0].text}] if number == 2 else rows


def without_a_row(rows: list[dict[str, Any]], _number: int) -> list[dict[str, Any]]:
    return rows[1:]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"alter": planted_test_row}, "of the validation or test part, such as sample:"),
        ({"alter": without_a_row}, "no prediction of 3 training row"),
        ({"kind": "mixed"}, "made from other data than this recipe's"),
    ],
    ids=["a test row", "a row missing", "other data"],
)
def test_predictions_that_are_not_honest_are_refused(made: dict[str, Any], said: str, tmp_path: Path) -> None:
    spec = Folds(name="folds", sweep=sweep_of(tmp_path, **made))
    with pytest.raises(DataError, match=said):
        preferences.read([spec], PARTS, [SPEC])


def test_the_recipe_may_have_data_of_its_own_behind_that_of_the_folds(tmp_path: Path) -> None:
    spec = Folds(name="folds", sweep=sweep_of(tmp_path))
    other = Sample(name="sample", alias="other", kind="mixed")
    assert preferences.read([spec], PARTS, [SPEC, other]) == preferences.read([spec], PARTS, [SPEC])
    with pytest.raises(DataError, match=r"held out no fold|other data than this recipe's"):
        preferences.read([spec], PARTS, [other, SPEC])


def test_a_sweep_must_hold_every_fold(tmp_path: Path) -> None:
    folder = sweep_of(tmp_path)
    whole = Sweep.of(folder)
    Sweep(folder, whole.source, whole.keys, whole.cells[:2]).save()
    with pytest.raises(DataError, match=r"needs each fold of one data set once, and has 1/3, 2/3"):
        Folds(name="folds", sweep=folder).read(PARTS, [SPEC])
    whole.save()
    (tmp_path / "folds-2" / "scores.json").unlink()
    with pytest.raises(DataError, match=r"not evaluated yet: folds-2; `finllm resume folds` goes on"):
        Folds(name="folds", sweep=folder).read(PARTS, [SPEC])
    with pytest.raises(DataError, match=r"is no sweep .*--sweep data.0.fold=1/5"):
        Folds(name="folds", sweep=tmp_path / "nothing").read(PARTS, [SPEC])


def test_a_run_that_has_seen_its_rows_is_no_judge_of_them(tmp_path: Path) -> None:
    folder = sweep_of(tmp_path)
    plan = tmp_path / "folds-1" / "plan.json"
    plan.write_text(json.dumps({"recipe": {"data": [SPEC.model_dump(mode="json")]}}))
    with pytest.raises(DataError, match="held out no fold of one data set, so that it has seen what it would judge"):
        Folds(name="folds", sweep=folder).read(PARTS, [SPEC])


def test_mixed_signals_make_pairs_of_training_rows_alone() -> None:
    """Each training row with a careless label is a pair, and no row of another part is."""
    found = preferences.read([Careless(name="careless")], PARTS, [SPEC])
    rows = {row.id: row for row in PARTS.train if row.careless}
    assert len(rows) > 100
    assert {pair.id: (pair.chosen, pair.rejected) for pair in found} == {
        row.id: (row.label, row.careless) for row in rows.values()
    }
    plain = Sample(name="sample", kind="plain")
    with pytest.raises(DataError, match="no training row says what a careless reader answers"):
        preferences.read([Careless(name="careless")], data.training_parts([plain])[0], [plain])


def test_explained_pairs_prefer_a_label_to_one_that_its_reason_contradicts() -> None:
    """Only rows that say why; both labels have the reason of the right one."""
    found = preferences.read([Careless(name="careless", explained=True)], PARTS, [SPEC])
    rows = {row.id: row for row in PARTS.train if row.careless and row.explanation}
    assert {pair.id: pair.reasons for pair in found} == {
        row.id: (row.explanation, row.explanation) for row in rows.values()
    }
    pair = found[0]
    assert pair.reasons is not None
    assert pair.answers == (f"{pair.chosen}: {pair.reasons[0]}", f"{pair.rejected}: {pair.reasons[1]}")
    plain = Parts(train=tuple(replace(row, explanation=None) for row in PARTS.train), validation=(), test=())
    with pytest.raises(DataError, match="take out `explained`"):
        preferences.read([Careless(name="careless", explained=True)], plain, [SPEC])


def file_of(folder: Path, *lines: Any) -> File:
    path = folder / "own.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return File(name="file", path=path)


WHY = {"chosen_explanation": "Output grew.", "rejected_explanation": "Grade fell."}
GOOD = {"prompt": "Zarquon Mining's ore grade fell while output doubled.", "chosen": "positive", "rejected": "negative"}


def test_a_file_of_ones_own_gives_pairs(tmp_path: Path) -> None:
    """Answers may be any text; blank lines are passed over."""
    long = {**GOOD, "prompt": "Quibble & Sons merges.", "chosen": "neutral, as no price is named", "target": "Quibble"}
    found = preferences.read([file_of(tmp_path, GOOD, "", long)], PARTS, [SPEC])
    reasons = {**GOOD, **WHY, "rejected": "positive"}
    (explained,) = preferences.read([file_of(tmp_path, reasons)], PARTS, [SPEC])
    assert (explained.chosen, explained.rejected, explained.reasons) == ("positive", "positive", (*WHY.values(),))
    assert found == [
        Preference("own.jsonl:1", "file", GOOD["prompt"], None, "positive", "negative"),
        Preference("own.jsonl:3", "file", long["prompt"], "Quibble", "neutral, as no price is named", "negative"),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: is not JSON"),
        ([1], "line 2: the line: "),
        ({"prompt": "x", "chosen": "positive"}, "line 2: rejected: Field required"),
        ({**GOOD, "chosed": "x"}, "line 2: chosed: Extra inputs"),
        ({**GOOD, "chosen": "negative "}, "line 2: chosen and rejected are the same"),
        ({**GOOD, "prompt": " "}, "line 2: prompt, chosen or rejected holds only white space"),
        ({**GOOD, "chosen": 3}, "line 2: chosen: Input should be a valid string"),
        ({**GOOD, "chosen_explanation": "x"}, "line 2: has one explanation; give both"),
        ({**GOOD, **WHY, "chosen": "up"}, "line 2: 'up' has an explanation, so it must be one of negative, neutral"),
        ({**GOOD, "rejected": "positive", **dict.fromkeys(WHY, "x")}, "both answers and explanations are the same"),
    ],
    ids=[
        "no JSON",
        "no object",
        "a key missing",
        "a key misspelt",
        "no preference",
        "no text",
        "a number",
        "half explained",
        "an explanation of no label",
        "the same explanation",
    ],
)
def test_a_wrong_line_is_named(line: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        preferences.read([file_of(tmp_path, GOOD, line)], PARTS, [SPEC])


@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("twin", [False, True], ids=["the same text", "a near twin"])
def test_no_held_out_text_is_learnt_from(part: str, twin: bool, tmp_path: Path) -> None:
    """A test sentence planted in a file is found, also with a word changed, and its line is named."""
    row = max(getattr(PARTS, part), key=lambda row: len(row.text))
    text = f"{row.text.upper()} Today." if twin else row.text
    planted = {"prompt": text, "chosen": "positive", "rejected": "negative"}
    with pytest.raises(DataError, match=rf"(?s)1 line\(s\) hold texts of .*line 2 and {part} row {row.id}"):
        preferences.read([file_of(tmp_path, GOOD, planted)], PARTS, [SPEC])


def test_pairs_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    other = {**GOOD, "chosen": GOOD["rejected"], "rejected": GOOD["chosen"]}
    with pytest.raises(DataError, match="contradict others: the same two answers, preferred both ways"):
        preferences.read([file_of(tmp_path, GOOD, other)], PARTS, [SPEC])
    assert len(preferences.read([file_of(tmp_path, GOOD, GOOD)], PARTS, [SPEC])) == 1  # said twice is one pair


def recipe(folder: Path, train: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(f"model: smollm2-135m\ndata: sample\ntrain: {train}\n")
    return path


def test_a_recipe_counts_pairs_as_its_rows(tmp_path: Path) -> None:
    found = load(recipe(tmp_path, "{method: dpo, pairs: careless, beta: 0.3, band_smoothing: {'66-75': 0.3}}"))
    assert isinstance(found.train, Dpo)
    assert found.train.epochs == 1
    rows, texts = counted(found, PARTS)
    pairs = learnt(found, PARTS)
    assert rows.train == len(pairs) < len(PARTS.train)
    assert texts is not None
    assert texts.texts == rows.train


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ("{method: dpp, pairs: careless}", "train.method is 'dpp'; did you mean dpo?"),
        ("{method: dpo}", "train.pairs is missing"),
        ("{method: dpo, pairs: carless}", "train.pairs.name is 'carless'; did you mean careless?"),
        ("{method: dpo, pairs: careless, loss: hinge, label_smoothing: 0.1}", "loss hinge has no label smoothing"),
        ("{method: dpo, pairs: careless, label_smoothing: 0.5}", "train.label_smoothing is 0.5; it must be less than 0.5"),
    ],
    ids=["method", "pairs", "source", "smoothing", "half"],
)  # fmt: skip
def test_faults_of_a_recipe_are_named(train: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(recipe(tmp_path, train))
    assert said in str(caught.value)


def test_check_shows_counts_and_ten_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, "{method: dpo, pairs: careless}")
    assert cli.main(["check", str(path)]) == 0
    said = capsys.readouterr().out
    assert "121 pairs of answers, the better one first" in said
    assert "careless: positive over negative" in said
    assert sum(line.startswith("  sample:s") for line in said.splitlines()) == shown.EXAMPLES == 10


def test_a_run_to_go_on_from_must_fit(tmp_path: Path) -> None:
    """Missing, of another model, of another prompt or rank: each is said before anything starts."""
    from finllm.errors import RunError
    from finllm.learnt import initial_adapter
    from finllm.models import Card

    found = load(recipe(tmp_path, f"{{method: dpo, pairs: careless, init: {tmp_path / 'sft'}}}"))
    with pytest.raises(RunError, match="which is no folder"):
        initial_adapter(found)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "adapter_config.json").write_text(json.dumps({"r": 16, "lora_alpha": 32}))
    Card(base=found.model, prompt=found.prompt, trained="adapter").save(tmp_path / "sft")
    assert initial_adapter(found) == tmp_path / "sft"
    for changes, said in (
        ({"model": {"name": "another/model"}}, "an adapter of smollm2-135m, but model.name is another/model"),
        ({"prompt": {"max_tokens": 64}}, "trained with another `prompt`"),
        ({"lora": {"rank": 8}}, "of rank 16 and alpha 32, but lora says 8"),
        ({"lora": None}, "goes on from a LoRA adapter"),
    ):
        other = Recipe.model_validate({**found.model_dump(mode="json"), **changes})
        with pytest.raises(RunError, match=said):
            initial_adapter(other)
