"""PhraseBank, FiQA and TFNS: the counts of the evaluation protocol, and copies that are not the original."""

import csv
import json
import shutil
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from finllm.data import Parts, read_parts, tables, training_parts
from finllm.data.fiqa import Fiqa, label_of
from finllm.data.phrasebank import LEVELS, PhraseBank
from finllm.data.spec import DatasetSpec
from finllm.data.tfns import Tfns
from finllm.errors import DataError
from finllm.example import Example

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def found_by_environment(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINLLM_DATA", str(shared_data))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def table(name: str) -> list[dict[str, str]]:
    with (tables.FOLDER / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def sizes(parts: Parts) -> tuple[int, int, int]:
    return len(parts.train), len(parts.validation), len(parts.test)


def labels(rows: Sequence[dict[str, str]] | Sequence[Example]) -> tuple[int, int, int]:
    count = Counter(row["label"] if isinstance(row, dict) else row.label for row in rows)
    return count["negative"], count["neutral"], count["positive"]


@pytest.mark.parametrize(
    ("agreement", "expected"),
    [(50, (604, 2879, 1363)), (66, (514, 2535, 1168)), (75, (420, 2146, 887)), (100, (303, 1391, 570))],
)
def test_the_phrasebank_table_holds_the_release_at_every_level(agreement: int, expected: tuple[int, int, int]) -> None:
    """Labels of all lines, also of those left out; that the table agrees with the file is checked at every reading."""
    rows = [row for row in table("phrasebank") if row["band"] in LEVELS[agreement]]
    assert labels(rows) == expected


def test_the_phrasebank_bands_have_the_published_sizes() -> None:
    """Each file less the next stricter one."""
    bands = Counter(row["band"] for row in table("phrasebank"))
    assert bands == {"100": 2264, "75-99": 1189, "66-75": 764, "50-66": 629}


@pytest.mark.parametrize(
    ("agreement", "expected"), [(50, (3382, 483, 968)), (66, None), (75, None), (100, (1581, 226, 452))]
)
def test_one_phrasebank_split_serves_every_agreement_level(
    agreement: int, expected: tuple[int, int, int] | None
) -> None:
    """A stricter level is the same split with fewer rows: no row changes its part."""
    spec = PhraseBank.model_validate({"name": "phrasebank", "agreement": agreement})
    rows = spec.read()
    whole = {e.id: e for e in PhraseBank(name="phrasebank").read()}
    assert rows == [e for e in whole.values() if e.agreement in LEVELS[agreement]]
    assert expected is None or sizes(read_parts([spec])) == expected


def test_a_phrasebank_example_carries_band_group_and_source() -> None:
    """The first line of the file, which holds no doubt."""
    first = PhraseBank(name="phrasebank").read()[0]
    assert first.text.startswith("According to Gran , the company has no plans to move all production to Russia")
    assert (first.id, first.label, first.split) == ("phrasebank:1", "neutral", "validation")
    assert (first.agreement, first.group, first.source) == ("100", "phrasebank:0", "news")


def test_phrasebank_bands_choose_rows() -> None:
    """Only the doubtful sentences, for example."""
    rows = PhraseBank(name="phrasebank", bands=("50-66", "66-75")).read()
    assert {e.agreement for e in rows} == {"50-66", "66-75"}


def test_phrasebank_bands_below_the_agreement_are_refused() -> None:
    """They would silently give nothing."""
    with pytest.raises(ValidationError, match="bands 50-66 are below agreement 75"):
        PhraseBank(name="phrasebank", agreement=75, bands=("50-66", "100"))


def test_latin_1_is_decoded_and_every_line_ends_cleanly() -> None:
    """The release is ISO-8859-1 with CRLF; the label follows the last @."""
    rows = PhraseBank(name="phrasebank").read()
    assert any("ä" in e.text for e in rows)
    assert not any("\r" in e.text or "\n" in e.text or e.text.endswith(("@neutral", "@positive")) for e in rows)


@pytest.mark.parametrize("name", ["phrasebank", "fiqa"])
@pytest.mark.parametrize("split", get_args(tables.SplitName))
def test_every_split_is_whole_and_keeps_groups_together(name: str, split: tables.SplitName) -> None:
    """Each kept row is in exactly one part, and no group of near twins in two."""
    rows = [row for row in table(name) if row["status"] == "keep"]
    parts = [tables.part(row, split) for row in rows]
    share = Counter(parts)
    assert set(share) == {"train", "validation", "test"}
    assert 0.19 < share["test"] / len(rows) < 0.21
    where = defaultdict(set)
    for row, part in zip(rows, parts, strict=True):
        where[row["group"]].add(part)
    assert all(len(found) == 1 for found in where.values())


@pytest.mark.parametrize("name", ["phrasebank", "fiqa"])
def test_five_folds_test_every_row_once(name: str) -> None:
    """Fold k is tested, fold k + 1 is validated; fold 0 is the test part of split_s42."""
    for row in table(name):
        if row["status"] == "keep":
            seen = [tables.part(row, split) for split in get_args(tables.SplitName) if split.startswith("cv5")]
            assert Counter(seen) == {"test": 1, "validation": 1, "train": 3}
            assert (seen[0] == "test") == (row["split_s42"] == "test")
            assert (seen.index("validation") + 1) % 5 == seen.index("test")


def test_fiqa_has_the_published_counts() -> None:
    """498 headline rows and 675 posts in the release; 817 / 117 / 234 after dropping repeated ones."""
    rows = table("fiqa")
    headlines = [row for row in rows if row["row"].startswith("headline")]
    posts = [row for row in rows if row["row"].startswith("post")]
    assert (labels(headlines), labels(posts)) == ((145, 61, 292), (218, 30, 427))
    parts = read_parts([Fiqa(name="fiqa")])
    assert sizes(parts) == (817, 117, 234)
    assert labels(parts.test)[1] == 18
    assert {e.source for e in parts.rows} == {"headline", "post"}


def test_fiqa_shows_its_target_only_when_asked() -> None:
    """Same rows, same order, with and without."""
    plain, targeted = Fiqa(name="fiqa").read(), Fiqa(name="fiqa", target=True).read()
    assert [e.id for e in plain] == [e.id for e in targeted]
    assert {e.target for e in plain} == {None}
    assert targeted[0].target == "Royal Mail"
    assert all(e.target for e in targeted)


def test_the_wider_fiqa_threshold_agrees_with_the_table() -> None:
    """label_02 was made by the authors of the protocol; ours is computed from the score."""
    wide = {e.id: e.label for e in Fiqa(name="fiqa", threshold=0.2).read()}
    assert wide == {f"fiqa:{row['row']}": row["label_02"] for row in table("fiqa") if row["status"] == "keep"}
    assert wide != {e.id: e.label for e in Fiqa(name="fiqa").read()}


def test_scores_on_a_threshold_fall_as_published() -> None:
    """-0.1 is neutral, 0.1 is positive."""
    assert [label_of(score) for score in (-0.101, -0.1, 0.0, 0.099, 0.1)] == [
        "negative",
        "neutral",
        "neutral",
        "neutral",
        "positive",
    ]


def test_another_fiqa_threshold_is_refused() -> None:
    """Only the two of the protocol."""
    with pytest.raises(ValidationError, match=r"threshold is 0.3; write 0.1"):
        Fiqa(name="fiqa", threshold=0.3)


def test_tfns_has_the_published_counts() -> None:
    """9,543 + 2,388 records, of which 9,101 + 2,377 are kept, 5 % of the former for validation."""
    rows = table("tfns")
    train = [row for row in rows if row["row"].startswith("train")]
    assert (labels(train), labels(rows[len(train) :])) == ((1442, 6178, 1923), (347, 1566, 475))
    parts = read_parts([Tfns(name="tfns")])
    assert sizes(parts) == (8600, 501, 2377)
    assert len(parts.train) + len(parts.validation) == 9101


def test_a_tweet_with_line_breaks_is_one_row() -> None:
    """227 tweets span several physical lines."""
    assert any("\n" in e.text for e in Tfns(name="tfns").read())


@pytest.mark.slow
def test_the_three_sets_together_lose_only_cross_set_twins() -> None:
    """One FiQA row is a near twin of a TFNS test row (cosine 0.82); nothing else is shared."""
    specs: list[DatasetSpec] = [PhraseBank(name="phrasebank"), Fiqa(name="fiqa"), Tfns(name="tfns")]
    parts, notes = training_parts(specs)
    assert sizes(parts) == (3382 + 817 + 8600 - 1, 483 + 117 + 501, 968 + 234 + 2377)
    assert len(notes) == 1
    assert "fiqa: 1 train row(s) left out" in notes[0]
    assert "held-out rows of tfns" in notes[0]


@pytest.mark.slow
def test_the_shipped_tables_are_what_their_script_makes() -> None:
    """The script is the reference; the full tables beside the data are its input."""
    script = ROOT / "finllm" / "data" / "splits" / "make.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (
        0,
        ["phrasebank.csv", "same", "fiqa.csv", "same", "tfns.csv", "same"],
    )


def test_phrasebank_is_read_from_a_zip_file_too(shared_data: Path, tmp_path: Path) -> None:
    """The hub has only the zip; one made on a Mac holds a decoy of every file."""
    archive = tmp_path / "FinancialPhraseBank-v1.0.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("__MACOSX/FinancialPhraseBank-v1.0/Sentences_50Agree.txt", b"junk")
        for file in sorted((shared_data / "phrasebank").glob("*.txt")):
            out.write(file, f"FinancialPhraseBank-v1.0/{file.name}")
    assert PhraseBank(name="phrasebank", path=archive).read() == PhraseBank(name="phrasebank").read()


def test_a_changed_phrasebank_line_is_refused_with_its_number(shared_data: Path, tmp_path: Path) -> None:
    """Copies go round in which lines were overwritten; their split would be another."""
    raw = (shared_data / "phrasebank" / "Sentences_50Agree.txt").read_bytes().split(b"\r\n")
    raw[37] = b"1@neutral"
    raw[99] = raw[99].rpartition(b"@")[0] + b"@negative"
    (tmp_path / "Sentences_50Agree.txt").write_bytes(b"\n".join(raw))
    with pytest.raises(
        DataError, match=r"2 of 4846 rows differ .* 0 are too many; the first is row 38: '1' \(neutral\)"
    ):
        PhraseBank(name="phrasebank", path=tmp_path).read()


def test_a_phrasebank_line_without_a_label_is_refused(shared_data: Path, tmp_path: Path) -> None:
    """Line, file and what stands there."""
    shutil.copy(shared_data / "phrasebank" / "Sentences_50Agree.txt", tmp_path)
    with (tmp_path / "Sentences_50Agree.txt").open("ab") as file:
        file.write(b"no label here\r\n")
    with pytest.raises(DataError, match=r"line 4847 of Sentences_50Agree.txt is no `sentence@label`: 'no label here'"):
        PhraseBank(name="phrasebank", path=tmp_path).read()


def test_a_fiqa_copy_with_rows_held_out_is_refused(shared_data: Path, tmp_path: Path) -> None:
    """A repackaged copy has the same file names but fewer rows."""
    for kind in ("headline", "post"):
        rows = json.loads((shared_data / "fiqa" / f"task1_{kind}_ABSA_train.json").read_text("utf-8"))
        if kind == "headline":
            del rows["1"]
        (tmp_path / f"task1_{kind}_ABSA_train.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"1 of 1173 rows differ .* row headline-1-0: it is missing"):
        Fiqa(name="fiqa", path=tmp_path).read()


def test_a_tfns_file_that_was_sorted_is_refused(shared_data: Path, tmp_path: Path) -> None:
    """Rows are known by their place."""
    shutil.copy(shared_data / "tfns" / "sent_valid.csv", tmp_path)
    with (shared_data / "tfns" / "sent_train.csv").open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["text"])
    with (tmp_path / "sent_train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(DataError, match="of 11931 rows differ from the original release"):
        Tfns(name="tfns", path=tmp_path).read()


@pytest.mark.parametrize("file", ["sent_train.csv", "sent_valid.csv"])
def test_a_tfns_file_of_another_shape_is_refused(file: str, shared_data: Path, tmp_path: Path) -> None:
    """The message names the file and says where to get the right one."""
    for name in ("sent_train.csv", "sent_valid.csv"):
        shutil.copy(shared_data / "tfns" / name, tmp_path)
    (tmp_path / file).write_text("tweet,label\nhello,1\n")
    with pytest.raises(DataError, match=f"{file} is not the CSV of the release.*zeroshot"):
        Tfns(name="tfns", path=tmp_path).read()


def test_rows_say_which_published_models_have_seen_them() -> None:
    """206 of the 968 test rows are not in ProsusAI's training and validation part, 237 not in FinGPT's training part."""
    rows = [e for e in PhraseBank(name="phrasebank").read() if e.split == "test"]
    assert sum("prosus" not in e.seen_by for e in rows) == 206
    assert sum("fingpt" not in e.seen_by for e in rows) == 237
