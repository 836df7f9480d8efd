"""finllm.data.table: a user's own file, and everything that can be wrong with it."""

import csv
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from finllm.data import read_parts, training_parts
from finllm.data.sample import Sample
from finllm.data.table import Table
from finllm.errors import DataError
from finllm.example import Example
from finllm.yamlfile import parse, read

ROWS = [
    {"text": "Sales rose, margins too", "label": "positive"},
    {"text": 'The CEO said "no comment"\nand left', "label": "Negative "},
    {"text": "Yhtiö kertoi tuloksestaan", "label": "NEUTRAL"},
]


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_jsonl(path: Path) -> None:
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")


def write_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)


WRITERS: dict[str, Callable[[Path], None]] = {
    ".csv": write_csv,
    ".tsv": lambda path: write_csv(path, "\t"),
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
}


def table(path: Path, **keys: Any) -> Table:
    return Table.model_validate({"name": "table", "path": path, **keys})


def fault(path: Path, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        table(path, **keys).read()
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def own_split(folder: Path, rows: list[Example], **keys: Any) -> dict[str, Example]:
    file = folder / "own.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["text", "label", "source"])
        writer.writerows((row.text, row.label, row.source) for row in rows)
    return {example.text: example for example in table(file, source="source", **keys).read()}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_examples(suffix: str, tmp_path: Path) -> None:
    """Quotes, line breaks, accents, a byte order mark; labels in any case."""
    file = tmp_path / f"mine{suffix}"
    WRITERS[suffix](file)
    rows = table(file).read()
    assert [row.text for row in rows] == [row["text"] for row in ROWS]
    assert [row.label for row in rows] == ["positive", "negative", "neutral"]
    assert {row.dataset for row in rows} == {"table"}


def test_ids_name_the_line_a_row_starts_on(tmp_path: Path) -> None:
    """So that a faulty prediction is found in the file, also after a text with a line break."""
    file = tmp_path / "mine.csv"
    write_csv(file)
    assert [row.id for row in table(file, alias="own").read()] == ["own:2", "own:3", "own:5"]


def test_other_columns_and_labels_are_named_in_the_recipe(tmp_path: Path) -> None:
    """Numbers as labels too, which YAML reads as keys of a mapping."""
    file = tmp_path / "mine.csv"
    file.write_text("headline,y,asset,kind,why,part\nUp,1,ACME,news,Profit.,train\nDown,0,,post,,Dev\n")
    recipe = tmp_path / "table.yaml"
    recipe.write_text(
        f"name: table\npath: {file}\ntext: headline\nlabel: y\ntarget: asset\nsource: kind\nexplanation: why\n"
        "split: part\nlabels: {0: negative, 1: positive}\n"
    )
    assert parse(Table, read(recipe)).read() == [
        Example("table:2", "table", "Up", "positive", "train", target="ACME", source="news", explanation="Profit."),
        Example("table:3", "table", "Down", "negative", "validation", source="post"),
    ]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """The path is shown whole, since it was relative in the recipe."""
    assert "there is no such file" in fault(tmp_path / "none.csv")


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    """The known ones are listed."""
    assert ".csv, .tsv, .jsonl, .parquet" in fault(tmp_path / "mine.xlsx")


@pytest.mark.parametrize("content", ["", "text,label\n", "\n\n"])
def test_an_empty_file_is_refused(content: str, tmp_path: Path) -> None:
    """With or without a header."""
    (tmp_path / "mine.csv").write_text(content)
    assert fault(tmp_path / "mine.csv") == ": holds no rows"


def test_missing_columns_are_named_with_the_nearest(tmp_path: Path) -> None:
    """All at once, and what the file has."""
    (tmp_path / "mine.csv").write_text("Texts,sentiment\nUp,positive\n")
    assert fault(tmp_path / "mine.csv", split="part") == (
        ": there is no column text; did you mean Texts?; there is no column label; there is no column part. "
        "Columns here: Texts, sentiment"
    )


def test_empty_texts_and_unknown_labels_are_listed_together(tmp_path: Path) -> None:
    """One run shows every fault, with its line."""
    lines = ["text,label", "Up,positive", " ,negative", "Down,bearish", "Flat,", *(["So,so"] * 6)]
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    message = fault(tmp_path / "mine.csv")
    assert "1 row(s) without text in column text (line 3)" in message
    assert "8 row(s) whose label in column label is not known ('bearish' at line 4, '' at line 5," in message
    assert "line 8, ...); known here: negative, neutral, positive" in message


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    """A row in no part would silently vanish."""
    (tmp_path / "mine.csv").write_text("text,label,split\nUp,positive,train\nDown,negative,holdout\n")
    assert "1 row(s) whose part in column split is not known ('holdout' at line 3)" in fault(
        tmp_path / "mine.csv", split="split"
    )


def test_another_encoding_is_refused_with_the_line(tmp_path: Path) -> None:
    """Guessing it would put wrong characters into the training texts."""
    (tmp_path / "mine.csv").write_bytes("text,label\nUp,positive\nJärvi,neutral\n".encode("latin-1"))
    assert "line 3 is not UTF-8 (byte 0xe4)" in fault(tmp_path / "mine.csv")


@pytest.mark.parametrize(
    ("suffix", "content", "expected"),
    [
        (".csv", "text,label\nUp, and up,positive\n", "line 2 has 3 fields, the header has 2 (1 such line(s))"),
        (".csv", "text,label\nUp\n", "line 2 has 1 fields, the header has 2"),
        (".csv", "text,label,text\nUp,positive,Down\n", "line 1 names a column twice"),
        (".csv", 'text,label\n"Up,positive\n', "is not CSV: unexpected end of data"),
        (".jsonl", '{"text": "Up", "label": "positive"}\n{"text": \n', "line 2 is not JSON"),
        (".jsonl", '["Up", "positive"]\n', 'line 1 is \'["Up", "positive"]\'; write an object'),
        (".parquet", "text,label\n", "is not Parquet"),
    ],
)
def test_a_broken_file_is_refused_with_the_line(suffix: str, content: str, expected: str, tmp_path: Path) -> None:
    """A half-read file would be trained on without a word."""
    (tmp_path / f"mine{suffix}").write_text(content)
    assert expected in fault(tmp_path / f"mine{suffix}")


def test_labels_must_mean_one_of_the_three(tmp_path: Path) -> None:
    """Other classes are another task."""
    with pytest.raises(ValidationError, match="'negative', 'neutral' or 'positive'"):
        table(tmp_path / "mine.csv", labels={"mixed": "mixed"})


def test_our_own_split_is_70_10_20_and_spreads_the_labels(tmp_path: Path) -> None:
    """Within two rows of the share for each label, and within one over all."""
    rows = Sample(name="sample").read()
    split = own_split(tmp_path, rows).values()
    for label, total in Counter(row.label for row in rows).items():
        count = Counter(example.split for example in split if example.label == label)
        expected = {"train": 0.7 * total, "validation": 0.1 * total, "test": 0.2 * total}
        assert all(abs(count[part] - share) < 2 for part, share in expected.items())  # type: ignore[index]
    assert Counter(example.split for example in split) == {"train": 434, "validation": 62, "test": 124}


def test_our_own_split_does_not_depend_on_the_order_of_the_rows(tmp_path: Path) -> None:
    """Sorting the file in another way must not move a test row into training."""
    rows = Sample(name="sample").read()
    one = {text: example.split for text, example in own_split(tmp_path, rows).items()}
    random.Random(3).shuffle(rows)
    assert {text: example.split for text, example in own_split(tmp_path, rows).items()} == one
    assert {text: example.split for text, example in own_split(tmp_path, rows, split_seed=1).items()} != one


def test_our_own_split_keeps_near_twins_together(tmp_path: Path) -> None:
    """Forty pairs that differ in a figure: each pair shares group and part, and the leak check passes."""
    texts = [example.text for example in Sample(name="sample").read() if len(example.text) > 80][:40]
    rows = [text + ending for text in texts for ending in ("", " (2)")]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"text": text, "label": "neutral"}) + "\n" for text in rows))
    by_text = {example.text: example for example in table(file).read()}
    for text in texts:
        assert by_text[text].group == by_text[text + " (2)"].group
        assert by_text[text].split == by_text[text + " (2)"].split
    assert {example.split for example in by_text.values()} == {"train", "validation", "test"}
    parts, notes = training_parts([table(file)])
    assert (len(parts.rows), notes) == (80, ())


def test_our_own_split_keeps_a_users_groups_together(tmp_path: Path) -> None:
    """Sentences of one document go to one part."""
    rows = Sample(name="sample").read()
    split = own_split(tmp_path, rows, group="source").values()
    parts = {example.source: example.split for example in split}
    assert len(parts) == 4
    assert all(example.split == parts[example.source] for example in split)


def test_a_split_column_with_twins_across_parts_is_refused(tmp_path: Path) -> None:
    """The user's own test part must not stand in the user's own training part."""
    (tmp_path / "mine.csv").write_text(
        "text,label,split\nNet profit rose to EUR 4.2 million in May.,positive,train\n"
        "Net profit rose to EUR 4.3 million in May.,positive,test\n"
    )
    spec = table(tmp_path / "mine.csv", split="split")
    assert len(read_parts([spec]).rows) == 2
    with pytest.raises(DataError, match="table train and table test: 1"):
        training_parts([spec])
