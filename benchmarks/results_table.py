"""Write README's table of results from benchmarks/results/headline.json, with others' figures beside it, marked as such.

python benchmarks/results_table.py           # between <!-- results --> and <!-- /results -->
python benchmarks/results_table.py --check   # exit 1 if README differs from what would be written
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finllm.published import FOUNDING, PUBLISHED, SAID

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results -->", "<!-- /results -->"
TITLES = {
    ("phrasebank", "all"): "PhraseBank 50Agree",
    ("phrasebank", "band 100"): "of it AllAgree",
    ("phrasebank", "band 75-99"): "of it 75-99 % agreed",
    ("phrasebank", "band 66-75"): "of it 66-75 % agreed",
    ("phrasebank", "band 50-66"): "of it 50-66 % agreed",
    ("phrasebank", "not seen by ProsusAI/finbert"): "of it not seen by ProsusAI/finbert",
    ("fiqa-text", "all"): "FiQA, text only",
    ("fiqa", "all"): "FiQA, with target",
    ("tfns", "all"): "TFNS, validation tweets",
}
"""Data set and kind of text, in the order of the table."""
BASELINES = {
    "tfidf": "TF-IDF + LR", "base": "zero-shot", "base-calibrated": "batch-calibrated", "finbert": "ProsusAI/finbert",
    "finbert-tone": "finbert-tone",
}  # fmt: skip
"""Systems beside the tuned one, by their accuracy; those that were measured are shown."""
BESIDE = (
    "FinBERT-FinVocab (Yang et al.)", "FinBERT (Araci)", "Llama-3.1-8B, QLoRA r=16", "Qwen2.5-1.5B-Instruct, QLoRA r=16",
    "Mistral-7B, QLoRA r=32", "roberta-large, all weights", "Llama-3-8B, QLoRA r=32", "FinGPT v3.3 (Llama-2-13B)",
)  # fmt: skip
"""Published systems that README names; a run's report has them all."""


def table(results: Path) -> str:
    """Our rows, then what others have published, then what the text that this project began with says."""
    rows = json.loads((results / "headline.json").read_text(encoding="utf-8"))
    settings = list(dict.fromkeys(_settings(row) for row in rows))
    beside = [key for key in BASELINES if any(row["system"] == key and "accuracy" in row for row in rows)]
    head = ["texts", "n", "trained as", "tuned: accuracy", "macro-F1", *(BASELINES[key] for key in beside)]
    lines = [f"| {' | '.join(head)} |", f"| --- | ---: | :---: |{' ---: |' * (len(head) - 3)}"]
    for (dataset, kind), title in TITLES.items():
        shown = title
        for number, setting in enumerate(settings, 1):
            found = {
                row["system"]: row
                for row in rows
                if (row["dataset"], row.get("texts")) == (dataset, kind) and _settings(row) == setting
            }
            if "tuned" not in found:
                continue
            tuned = found["tuned"]
            cells = [shown, str(tuned["n"]) if shown else "", str(number)]
            cells += [_figure(tuned["accuracy"]), _figure(tuned["macro_f1"])]
            cells += [_figure(found.get(key, {}).get("accuracy")) + _seen(found.get(key, {})) for key in beside]
            lines.append(f"| {' | '.join(cells)} |")
            shown = ""
    notes = [f"{number}. {said}." for number, said in enumerate(settings, 1)]
    if any("†" in line for line in lines):
        notes += ["", "† Has seen texts of this data."]
    return "\n".join([*lines, "", *notes, "", *_others()])


def _seen(row: dict[str, Any]) -> str:
    return " †" if any(mark.startswith("has seen") for mark in row.get("marks", ())) else ""


def _figure(of: dict[str, float] | None) -> str:
    if of is None:
        return ""
    spread = f" ± {of['deviation']:.1f}" if of.get("deviation") else ""
    return f"{of['mean']:.1f}{spread} [{of['low']:.1f}, {of['high']:.1f}]"


def _settings(row: dict[str, Any]) -> str:
    changes = [o for o in row["overrides"] if not o.startswith(("data=", "model.name="))]
    recipe = Path(row["recipe"])
    name = f"`{recipe.parent.name}/{recipe.stem}`"
    changed = f" with {', '.join(changes)}" if changes else ""
    data = "PhraseBank, FiQA and TFNS" if row["trained_on"] == "all" else row["trained_on"]
    return (
        f"{row['model']}, {name}{changed}, trained on {data}; seeds {', '.join(row['seeds'])}; "
        f"{row['hardware']}, {row['date']}; interval: {row['interval']}"
    )


def _others() -> Iterator[str]:
    yield "*Not measured here, other splits and tests:* what others have published, and their protocols."
    yield ""
    yield "| texts | system | accuracy | F1 | protocol | source |"
    yield "| --- | --- | ---: | ---: | --- | --- |"
    for one in PUBLISHED:
        if one.system in BESIDE:
            cells = (one.title, one.system, one.accuracy, one.f1, one.protocol, one.source + SAID[one.evidence])
            yield "| " + " | ".join(cells) + " |"
    yield ""
    yield (
        "*Never measured by anybody we know of:* the figures that the text this project began with states, accuracy on "
        "PhraseBank / FiQA: " + "; ".join(_stated(FOUNDING)) + "."
    )


def _stated(rows: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    return (f"{system} {phrasebank} / {fiqa}" for system, phrasebank, fiqa in rows)


def rewritten(text: str, made: str) -> str:
    """README with the table between its marks; exits where they are not there once each and in order."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"README has no {BEGIN} followed by {END}")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    asked = parser.parse_args()
    text = asked.readme.read_text(encoding="utf-8")
    wanted = rewritten(text, table(asked.results))
    if asked.check:
        sys.exit(0 if wanted == text else f"{asked.readme} differs from the results; run benchmarks/results_table.py")
    asked.readme.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
