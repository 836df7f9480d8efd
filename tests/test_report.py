"""The report says what the scores say, in words and tables that render, and how to repeat it."""

import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from finllm import assessment, predictions, report
from finllm.example import LABELS, Example
from finllm.machine import Machine
from finllm.plan import Plan, Rows, decide
from finllm.predictions import Answers
from finllm.recipe import Recipe
from finllm.report import Facts, document
from finllm.scores import Check, Scores

OVERRIDES = ("train.epochs=2", "data=[{name: sample, alias: news}]")


def plan(**more: object) -> Plan:
    recipe = Recipe.model_validate(
        {
            "purpose": "A trial.",
            "model": {"name": "smollm2-135m", "quantization": "nf4"},
            "data": [{"name": "sample", "alias": "news"}],
            "train": {"method": "sft", "epochs": 2},
            "prompt": {"instruction": "Say negative | neutral | positive."},
            **more,
        }
    )
    counts = Rows(train=390, validation=60, test=120)
    folder, source = Path("runs/trial"), "recipes/my trial.yaml"
    return decide(recipe, here=Machine((), 2), rows=counts, folder=folder, source=source, overrides=OVERRIDES)


def rows(dataset: str = "news", count: int = 120) -> list[Example]:
    return [
        Example(
            id=f"{dataset}:{n}",
            dataset=dataset,
            text=f"text {n}",
            label=LABELS[n % 3],
            split="test",
            agreement=("100", "66-75")[n % 2],
            group=f"{dataset}:{n // 2}" if n < 20 else None,
        )
        for n in range(count)
    ]


def answer(examples: list[Example], key: str, wrong_every: int, seconds: float = 4.0) -> Answers:
    """A system that is wrong on every so many rows, and by three rows at a time so that all labels have their share."""
    table = np.full((len(examples), 3), 0.1)
    for n, example in enumerate(examples):
        table[n, (LABELS.index(example.label) + (n // 3 % wrong_every == 0)) % 3] = 0.8
    cut = [n < 2 and key == "tuned" for n in range(len(examples))]
    return Answers(key, f"the {key} system", seconds, predictions.of(examples, table, cut))


ROWS = rows()
TUNED, BASE, TWIN = answer(ROWS, "tuned", 8), answer(ROWS, "base", 2), answer(ROWS, "twin", 7, seconds=0.0)
FACTS = Facts(
    rows={"news": Rows(train=390, validation=60, test=120)},
    training={"steps": "50 of 50", "best validation loss": "0.312"},
    notes=("3 training rows left out.",),
)


@pytest.fixture(scope="module")
def scored() -> Scores:
    return assessment.score([TUNED, BASE, TWIN], 500, 7)


@pytest.fixture(scope="module")
def text(scored: Scores) -> str:
    return report.markdown(scored, plan(), FACTS)


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table as lines of cells; an escaped bar does not end a cell."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    return [[[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block] for block in blocks]


def table_with(text: str, head: str) -> list[list[str]]:
    return next(t for t in tables(text) if t[0][0] == head)


def test_the_verdict_names_the_difference_its_interval_and_what_is_not_decided(scored: Scores) -> None:
    """One sentence with the figures of the scores."""
    (part,) = scored.parts
    names = {system.key: system.name for system in scored.systems}
    said = report.verdict(part, names)
    base, twin, _ = part.paired
    by = base.accuracy
    assert said.startswith("news, test (120 texts): the tuned system has 87.5 % accuracy [")
    assert f"; it beats the base system by 37.5 points [{100 * by.low:.1f}, {100 * by.high:.1f}]" in said
    assert not twin.accuracy.decided
    assert "; is not decided against the twin system (+2.5 points [" in said


def test_a_system_that_is_worse_is_called_worse() -> None:
    """The points are given as a loss without a sign, low end first."""
    (part,) = assessment.score([BASE, TUNED], 500, 7).parts
    said = report.verdict(part, {"base": "A", "tuned": "B"})
    low, high = part.paired[0].accuracy.low, part.paired[0].accuracy.high
    assert f"it is worse than B by 37.5 points [{-100 * high:.1f}, {-100 * low:.1f}]." in said
    assert 0 < -high < -low


def test_one_system_alone_is_compared_with_nothing() -> None:
    """The verdict then is its accuracy."""
    (part,) = assessment.score([TUNED], 200, 7).parts
    accuracy = part.systems["tuned"].accuracy
    ends = f"[{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"
    assert report.verdict(part, {"tuned": "A"}) == f"news, test (120 texts): A has 87.5 % accuracy {ends}."


def test_the_comparison_table_has_every_system_and_figure(text: str, scored: Scores) -> None:
    """Accuracy, macro-F1 and weighted F1 in per cent with their intervals."""
    head, _, *lines = table_with(text, "system")
    assert head == ["system", "accuracy", "macro-F1", "weighted F1", "MCC"]
    assert [line[0] for line in lines] == ["tuned: the tuned system", "base: the base system", "twin: the twin system"]
    tuned = scored.parts[0].systems["tuned"]
    for cell, figure in zip(lines[0][1:4], (tuned.accuracy, tuned.macro_f1, tuned.weighted_f1), strict=True):
        assert cell == f"{100 * figure.value:.1f} [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"


def test_differences_classes_confusion_bands_and_speed_stand_in_tables(text: str) -> None:
    """Each with the figures of the systems in their order."""
    assert [line[2] for line in table_with(text, "tuned minus ...")[2:]] == ["better", "not decided"]
    assert [line[:2] for line in table_with(text, "class")[2:]] == [[label, "40"] for label in LABELS]
    confusion = next(t for t in tables(text) if t[0][:2] == ["system", "gold"])
    assert confusion[2] == ["tuned", "negative", "35", "5", "0"]
    bands = table_with(text, "kind")
    assert [line[:2] for line in bands[2:]] == [
        ["agreement 100 % (AllAgree)", "60"],
        ["agreement 66-75 %", "60"],
        ["75Agree", "60"],
    ]
    speed = next(t for t in tables(text) if t[0][1:2] == ["texts"] and t[0][0] == "system")
    assert [line[1:4] for line in speed[2:]] == [["120", "4.0", "30"], ["120", "4.0", "30"], ["120", "0.0", ""]]


def test_every_table_is_rectangular(text: str) -> None:
    """A bar in a value (the prompt has two) would shift all cells after it."""
    assert len(tables(text)) > 8
    for table in tables(text):
        assert {len(line) for line in table} == {len(table[0])}
    prompt = next(line for line in table_with(text, "setting") if line[0] == "prompt")
    assert prompt[1].endswith(r"Say negative \| neutral \| positive.")


def test_texts_are_shown_as_they_are() -> None:
    """Stars, marks of code and tags in a text are no Markdown."""
    made = document.markdown([document.Table(("text",), [("<b>5 * 3* `x` | < 4",)])])
    assert made.splitlines()[2] == r"| \<b>5 \* 3\* \`x\` \| < 4 |"


def test_settings_data_and_training_are_told(text: str) -> None:
    """As planned, as counted, as it happened."""
    settings = dict(line for line in table_with(text, "setting")[2:])
    assert settings["model"] == "smollm2-135m, nf4, dequantised once to fp32"
    assert settings["batch"].startswith("16 = 1 process x 16 x 1 accumulated")
    assert settings["batch"].endswith("shared prefix on")
    estimate = re.fullmatch(
        r"about (\d+\.\d) GiB on each process: weights (\d+\.\d), .*", settings["memory, estimated"]
    )
    assert estimate is not None, settings
    assert float(estimate[2]) == 0.5  # 134.5 million fp32 weights
    assert float(estimate[2]) < float(estimate[1])
    assert settings["length"] == "50 steps, 2 epochs"
    assert table_with(text, "data set")[2][:4] == ["news", "390", "60", "120"]
    assert ["best validation loss", "0.312"] in table_with(text, "what")
    assert "3 training rows left out." in text
    assert "Texts cut to fit the model: tuned 2." in text
    assert "120 texts in 110 independent groups" in text


def test_what_a_method_learns_from_is_told() -> None:
    """DPO's loss, its pairs and where it goes on from; the weights of explanations."""
    scored = assessment.score([BASE], 100, 7)
    pairs = [{"name": "folds", "sweep": "/runs/folds", "bands": ["100", "66-75"]}, {"name": "careless"}]
    dpo = {"method": "dpo", "init": "/runs/sft", "pairs": pairs, "beta": 0.3, "sft_weight": 1,
           "band_smoothing": {"66-75": 0.3}}  # fmt: skip
    told = dict(table_with(report.markdown(scored, plan(train=dpo), Facts()), "setting")[2:])
    assert told["goes on from"] == "/runs/sft"
    assert told["loss"] == "sigmoid, beta 0.3, 1 of cross-entropy beside it; label smoothing: 0.3 of 66-75"
    assert "name folds, " in told["pairs"]
    assert "bands 100, 66-75" in told["pairs"]
    assert "; " in told["pairs"]
    fresh = {"method": "dpo", "pairs": "careless"}
    told = dict(table_with(report.markdown(scored, plan(train=fresh), Facts()), "setting")[2:])
    assert (told["goes on from"], told["loss"]) == ("the base model", "sigmoid, beta 0.1; label smoothing: none")
    sft = {"method": "sft", "explanations": {"explanation_weight": 0.2}}
    told = dict(table_with(report.markdown(scored, plan(train=sft), Facts()), "setting")[2:])
    assert told["explanations"] == "learnt, weight 0.2 a token, 1 of labels"


def test_a_check_that_does_not_hold_is_told_at_the_top() -> None:
    """Before the results; where all hold, nothing is said there."""
    sound, broken = Check(name="sound", passed=True, found="x"), Check(name="batches agree", passed=False, found="y")
    for checks, wanted in (([sound, broken], True), ([sound], False)):
        made = report.markdown(assessment.score([BASE], 100, 7, checks=checks), plan(), Facts())
        top = made.partition("## Results")[0]
        assert ("**Read with care:**" in top) == wanted
        assert ("these do not hold: batches agree." in top) == wanted


def test_the_title_is_followed_by_what_it_is_about(text: str) -> None:
    """Purpose, model, method, data, date, and then the verdict."""
    lines = [line for line in text.splitlines() if line]
    assert re.fullmatch(r"A trial\. smollm2-135m, trained by SFT, on news; planned \d{4}-\d\d-\d\d\.", lines[1])
    assert lines[2].startswith("**news, test (120 texts):")


def test_the_command_repeats_the_run(text: str) -> None:
    """A shell reads it back as the same arguments, also with blanks and brackets in them."""
    (command,) = re.findall(r"```\n(.*)\n```", text)
    assert shlex.split(command) == ["finllm", "launch", "recipes/my trial.yaml", *OVERRIDES]
    shipped = Path(report.__file__).parents[2] / "recipes" / "sft" / "llama-3-8b-all.yaml"
    there = plan().model_copy(update={"source": str(shipped)})
    assert "\nfinllm launch sft/llama-3-8b-all " in report.markdown(assessment.score([BASE], 100, 7), there, Facts())


def test_commit_versions_and_places_are_told(text: str) -> None:
    """Links are relative to the run folder."""
    made = plan()
    assert made.commit in text
    assert made.versions
    assert all(f"{name} {version}" in text for name, version in made.versions.items())
    links = [link for link in re.findall(r"\]\((\w[^)]*)\)", text) if not link.startswith("figures/")]
    assert links == ["predictions/", "scores.json", "recipe.yaml"]


def test_the_link_to_how_figures_are_read_has_its_heading(text: str) -> None:
    """Markdown makes the anchor from the heading."""
    anchors = {"#" + line.lstrip("# ").lower().replace(" ", "-") for line in text.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\((#[^)]*)\)", text)) <= anchors


def test_a_report_without_training_has_no_training_in_it() -> None:
    """A zero-shot run has neither a learning rate nor steps."""
    text = report.markdown(assessment.score([BASE], 200, 7), plan(train=None), Facts())
    assert "learning rate" not in text
    assert "## Training" not in text
    assert "none: the model as it is" in text


def test_two_data_sets_have_a_verdict_and_a_section_each() -> None:
    """In the order of the predictions."""
    both = [*ROWS, *rows("tweets", 60)]
    text = report.markdown(assessment.score([answer(both, "tuned", 8), answer(both, "base", 2)], 200, 7), plan(), FACTS)
    assert re.findall(r"^- \*\*(\w+), test \((\d+) texts\)", text, re.MULTILINE) == [("news", "120"), ("tweets", "60")]
    assert re.findall(r"^### (\w+)", text, re.MULTILINE) == ["news", "tweets"]


def test_an_interval_without_width_is_explained() -> None:
    """Always right on 120 rows is no proof of 100 %; without such a system the sentence is not there."""
    perfect = Answers("tuned", "tuned", 1.0, [p.model_copy(update={"predicted": p.gold}) for p in TUNED.predictions])
    assert report.NO_WIDTH in report.markdown(assessment.score([perfect], 200, 7), plan(), FACTS)
    assert report.NO_WIDTH not in report.markdown(assessment.score([TUNED], 200, 7), plan(), FACTS)


def test_the_same_scores_give_the_same_report(text: str, scored: Scores) -> None:
    """The report is a pure function: it can be made again from scores.json."""
    again = Scores.model_validate_json(scored.model_dump_json())
    made = plan()
    assert report.markdown(again, made, FACTS) == report.markdown(scored, made, FACTS)
    assert text.splitlines()[0] == "# trial"


def test_the_terminal_table_fits_80_columns(scored: Scores) -> None:
    """Nothing is cut off or folded, and brackets are no markup."""
    shown = io.StringIO()
    Console(width=80, file=shown).print(report.table(scored))
    lines = [line.rstrip() for line in shown.getvalue().splitlines()]
    assert lines[1] == "news test (120)"
    assert [line.split()[0] for line in lines[2:5]] == ["tuned", "base", "twin"]
    assert re.fullmatch(r"  tuned +87\.5 \[\S+\] +87\.5 \[\S+\] +87\.5 \[\S+\]", lines[2])
    assert lines[5:] == ["per cent [95 % interval]"]
