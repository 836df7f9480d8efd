"""Rebuild the tables in this folder from the full split tables and the data beside the checkout.

Usage: python finllm/data/splits/make.py [--check]     writes the tables, or compares them (about 20 s)

Reads  ../shared/data/splits/{phrasebank_splits,fiqa_splits,tfns_flags}.csv and ../shared/data/tfns/sent_*.csv
       (or $FINLLM_DATA instead of ../shared/data)
Writes phrasebank.csv, fiqa.csv, tfns.csv: a name for each row of the original files, a hash of its normalised text,
       its label, its group of near twins, why it is left out if it is, and its part in each split; no texts.

TFNS has no published validation part. We take the groups of near twins whose lowest key hashes to 0 modulo 20,
about 5 % of sent_train.csv; sent_valid.csv is the test part. Groups are made within each file, since rows of
sent_train.csv that are near twins of sent_valid.csv are left out (drop_near_valid).
"""

import csv
import hashlib
import io
import os
import sys
from collections import defaultdict
from pathlib import Path

from finllm.data.twins import groups

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("FINLLM_DATA", HERE.parents[3] / "shared" / "data"))
PARTS = {"train": "train", "valid": "validation", "test": "test", "": ""}
SPLITS = ("split_s42", "split_s1", "split_s2", "split_s3", "split_s4")
Row = dict[str, str]


def rows_of(path: Path) -> list[Row]:
    """Every record of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def phrasebank() -> list[Row]:
    """One row per line of Sentences_50Agree.txt; prosus and fingpt are splits of others, for comparison only."""
    same = ("key", "label", "band", "group", "status")
    return [
        {"row": row["line"]}
        | {name: row[name] for name in same}
        | {name: PARTS[row[name]] for name in SPLITS}
        | {"cv5": row["cv5"]}
        | {name: PARTS[row[name]] for name in ("prosus", "fingpt")}
        for row in rows_of(DATA / "splits" / "phrasebank_splits.csv")
    ]


def fiqa() -> list[Row]:
    """One row per scored (sentence, target); `row` is kind, id and place in `info`."""
    same = ("key", "label", "label_02", "group", "status")
    return [
        {"row": f"{row['kind']}-{row['id']}-{row['index']}"}
        | {name: row[name] for name in same}
        | {name: PARTS[row[name]] for name in SPLITS}
        | {"cv5": row["cv5"]}
        for row in rows_of(DATA / "splits" / "fiqa_splits.csv")
    ]


def tfns() -> list[Row]:
    """One row per record of sent_train.csv and sent_valid.csv."""
    flags = rows_of(DATA / "splits" / "tfns_flags.csv")
    return [row for file in ("train", "valid") for row in _tfns_file(file, flags)]


def _tfns_file(file: str, flags: list[Row]) -> list[Row]:
    flags = [row for row in flags if row["file"] == f"sent_{file}.csv"]
    texts = [row["text"] for row in rows_of(DATA / "tfns" / f"sent_{file}.csv")]
    kept = [i for i, row in enumerate(flags) if row["status"] == "keep"]
    group = {i: f"{file}-{kept[first]}" for i, first in zip(kept, groups([texts[i] for i in kept]), strict=True)}
    keys: dict[str, list[str]] = defaultdict(list)
    for i in kept:
        keys[group[i]].append(flags[i]["key"])
    table = []
    for i, row in enumerate(flags):
        part = "" if i not in group else "test" if file == "valid" else _tfns_part(min(keys[group[i]]))
        table.append(
            {"row": f"{file}-{i}", "key": row["key"], "label": row["label"]}
            | {"group": group.get(i, ""), "status": row["status"], "split": part}
        )
    return table


def _tfns_part(key: str) -> str:
    return "validation" if int(hashlib.sha1(key.encode()).hexdigest(), 16) % 20 == 0 else "train"  # noqa: S324 - no secret


def as_csv(table: list[Row]) -> str:
    """The table as the text of a CSV file."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return buffer.getvalue()


def main(check: bool) -> int:
    """Write or compare every table; returns the number that differ."""
    different = 0
    for build in (phrasebank, fiqa, tfns):
        text, path = as_csv(build()), HERE / f"{build.__name__}.csv"
        if check:
            same = path.read_text("utf-8") == text
            different += not same
            print(path.name, "same" if same else "DIFFERENT")
        else:
            path.write_text(text, "utf-8")
            print(path.name, text.count("\n") - 1, "rows")
    return different


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
