"""finllm.data: parts put together, and leaks between them."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from finllm.data import Parts, check_leaks, drop_twins, read_parts, training_parts
from finllm.data.sample import Sample
from finllm.data.spec import DatasetSpec
from finllm.data.table import Table
from finllm.errors import DataError
from finllm.example import Example

TWIN = "Net sales of the Paper segment decreased to EUR 221.6 mn in the second quarter of 2009."
TWIN_AGAIN = "Net sales of the Paper segment decreased to EUR 211.6 mn in the second quarter of 2009."


def example(name: str, text: str, split: Literal["train", "validation", "test"], group: str | None = None) -> Example:
    return Example(name, name.partition(":")[0], text, "neutral", split, group=group)


def parts_of(rows: Sequence[Example], grouped: Sequence[str] = ()) -> Parts:
    of = {split: tuple(e for e in rows if e.split == split) for split in ("train", "validation", "test")}
    return Parts(of["train"], of["validation"], of["test"], frozenset(grouped))


def test_importing_the_data_sets_is_light() -> None:
    """Reading a recipe on a login node must not load torch, transformers or a table library."""
    heavy = "{'torch', 'transformers', 'datasets', 'pandas', 'sklearn', 'scipy', 'numpy', 'pyarrow', 'huggingface_hub'}"
    code = f"import sys, finllm.data; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_parts_keep_the_order_of_the_file_and_carry_the_title() -> None:
    """The alias names the set in ids and tables."""
    parts = read_parts([Sample(name="sample", alias="ours")])
    ids = [e.id for e in parts.train]
    assert ids == sorted(ids)
    assert {e.dataset for e in parts.rows} == {"ours"}
    assert all(e.id.startswith("ours:s") for e in parts.rows)


def test_only_the_parts_asked_for_are_read() -> None:
    """A set that is only evaluated gives no training rows."""
    parts = read_parts([Sample(name="sample", parts=("test",))])
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (0, 0, 170)


def test_fewer_training_rows_are_a_subset_of_more_and_spare_the_other_parts() -> None:
    """Learning curves compare like with like."""
    few, more = (read_parts([Sample(name="sample", train_rows=n)]) for n in (20, 100))
    assert (len(few.train), len(more.train)) == (20, 100)
    assert {e.id for e in few.train} < {e.id for e in more.train}
    assert (len(few.validation), len(few.test)) == (60, 170)


def test_the_draw_of_training_rows_is_fixed() -> None:
    """The same four on every machine and in every version."""
    drawn = [e.id for e in read_parts([Sample(name="sample", train_rows=4)]).train]
    assert drawn == ["sample:s390", "sample:s487", "sample:s551", "sample:s568"]


def test_a_set_used_twice_without_an_alias_is_refused() -> None:
    """Ids name rows in predictions, so they are unique over the whole recipe."""
    with pytest.raises(DataError, match=r"620 example id.* sample:s001.*alias"):
        read_parts([Sample(name="sample"), Sample(name="sample")])


def test_a_part_that_is_asked_for_but_empty_is_refused(tmp_path: Path) -> None:
    """`parts: [test]` on a table without test rows says what there is."""
    file = tmp_path / "t.csv"
    file.write_text("text,label,split\ngood,positive,train\nbad,negative,train\n")
    with pytest.raises(DataError, match=r"table: no rows in test, .* train 2, validation 0, test 0"):
        read_parts([Table(name="table", path=file, split="split", parts=("test",))])


@pytest.mark.parametrize("late", ["validation", "test"])
@pytest.mark.parametrize("text", [TWIN, TWIN.upper() + "!!", TWIN_AGAIN])
def test_a_copy_or_near_twin_of_a_held_out_text_in_training_is_refused(
    text: str, late: Literal["validation", "test"]
) -> None:
    """The message counts the pairs, shows one and says what to do."""
    parts = parts_of(
        [example("a:1", TWIN, "train"), example("a:2", "Other words.", "train"), example("a:3", text, late)]
    )
    with pytest.raises(DataError) as caught:
        check_leaks(parts)
    message = str(caught.value)
    assert message.startswith("1 pair(s)")
    assert f"a train and a {late}: 1" in message
    assert "a:1: Net sales" in message
    assert "Take them out" in message


def test_a_test_text_among_the_validation_texts_is_refused() -> None:
    """Choosing an epoch on a test text is a leak too."""
    with pytest.raises(DataError, match="a validation and a test: 1"):
        check_leaks(parts_of([example("a:1", TWIN, "validation"), example("a:2", TWIN_AGAIN, "test")]))


def test_a_group_in_two_parts_is_refused_although_the_texts_differ() -> None:
    """Rows of one document belong together, whatever they say."""
    rows = [example("a:1", "One thing.", "train", "a:7"), example("a:2", "Quite another.", "test", "a:7")]
    with pytest.raises(DataError, match="same group"):
        check_leaks(parts_of(rows))


def test_clean_parts_pass() -> None:
    """Different texts in different groups are no leak."""
    rows = [example("a:1", TWIN, "train", "a:1"), example("a:2", "The meeting is on Monday.", "test", "a:2")]
    check_leaks(parts_of(rows))


def test_groups_decide_within_a_set_whose_twins_are_grouped() -> None:
    """The table's groups were made over all rows; a cosine among some of them may differ in the last digit."""
    rows = [example("a:1", TWIN, "train", "a:1"), example("a:2", TWIN_AGAIN, "test", "a:2")]
    check_leaks(parts_of(rows, grouped=["a"]))
    with pytest.raises(DataError):
        check_leaks(parts_of(rows))
    with pytest.raises(DataError, match="same text"):
        check_leaks(parts_of([rows[0], replace(rows[1], text=TWIN)], grouped=["a"]))


def test_training_rows_that_give_away_another_sets_test_rows_are_dropped() -> None:
    """Also validation rows; the test rows themselves always stay."""
    rows = [
        example("a:1", TWIN, "train"),
        example("a:2", "The meeting is on Monday.", "train"),
        example("a:3", "Dividend unchanged at 40 cents a share.", "validation"),
        example("b:1", TWIN_AGAIN, "test"),
        example("b:2", "Dividend unchanged, at 40 cents a share", "test"),
    ]
    kept, dropped = drop_twins(parts_of(rows, grouped=["a", "b"]))
    assert [e.id for e in dropped] == ["a:1", "a:3"]
    assert [e.id for e in kept.rows] == ["a:2", "b:1", "b:2"]
    check_leaks(kept)


def _table(folder: Path, alias: str, rows: Sequence[tuple[str, str]]) -> DatasetSpec:
    file = folder / f"{alias}.csv"
    file.write_text("text,label,split\n" + "".join(f'"{text}",neutral,{split}\n' for text, split in rows))
    return Table(name="table", alias=alias, path=file, split="split")


def test_training_parts_say_in_words_what_was_left_out(tmp_path: Path) -> None:
    """Set, number, part, the other set, and the ids."""
    one = _table(tmp_path, "one", [(TWIN, "train"), ("The meeting is on Monday.", "train")])
    two = _table(tmp_path, "two", [("Oil fell.", "train"), (TWIN_AGAIN, "test")])
    parts, notes = training_parts([one, two])
    assert [e.id for e in parts.train] == ["one:3", "two:2"]
    assert notes == ("one: 1 train row(s) left out, the same as or near twins of held-out rows of two (one:2)",)


def test_training_parts_refuse_a_leak_within_a_set(tmp_path: Path) -> None:
    """Only the data set's owner can say which of its own parts is right."""
    with pytest.raises(DataError, match="one train and one test: 1"):
        training_parts([_table(tmp_path, "one", [(TWIN, "train"), (TWIN_AGAIN, "test")])])


def test_training_parts_refuse_a_set_that_would_lose_all_its_training_rows(tmp_path: Path) -> None:
    """A note about a silently vanished data set would be too little."""
    one = _table(tmp_path, "one", [(TWIN, "train")])
    two = _table(tmp_path, "two", [("Oil fell.", "train"), (TWIN_AGAIN, "test")])
    with pytest.raises(DataError, match=r"one: every training row .*parts: \[test\]"):
        training_parts([one, two])
