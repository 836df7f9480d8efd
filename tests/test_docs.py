"""docs/ and README say nothing that is not so: commands are run or parsed, links lead somewhere, tables are current."""

import argparse
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finllm
from finllm.data.sample import Sample
from finllm.example import LABELS
from finllm.recipe import Recipe
from finllm.run import Run
from launch import cli, help, schema, shipped  # noqa: A004 - the module of that name

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OURS = re.compile(r"^(?:\w+=\S+ )*(?:cat \S+ \| )?finllm (.*)$", re.MULTILINE)
OTHERS = {"make", "hf", "wandb", "curl", "pip", "export", ".", "cd", "git", "accelerate", "python", "sbatch", "squeue",
          "sinfo", "scontrol", "sacct", "ssh", "srun", "bash", "less", "tail"}  # fmt: skip
"""Programs that a command may begin with; a misspelt one is none of them."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run in this process goes offline; that ends with the test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def ours(page: Path) -> list[str]:
    """What follows `finllm` in every line of a box that runs it, without the comment."""
    lines = "\n".join(blocks(page, "bash", "sh", "console", "text", "")).replace("\\\n", " ").replace("\n$ ", "\n")
    return [shlex.join(shlex.split(line, comments=True)) for line in OURS.findall(lines)]


COMMANDS = [(page, words) for page in PAGES for words in ours(page)]


def test_the_pages_hold_commands() -> None:
    """The tests below would pass with none."""
    assert {"tutorial.md", "troubleshooting.md", "README.md"} <= {page.name for page, _ in COMMANDS}
    assert len(COMMANDS) >= 30


@pytest.mark.parametrize(
    ("page", "line"), COMMANDS, ids=lambda value: named(value) if isinstance(value, Path) else value[:40]
)
def test_every_command_parses(page: Path, line: str) -> None:
    """Its verb and options exist; what argparse leaves over are overrides."""
    parsed, rest = cli.build_parser().parse_known_args(shlex.split(line))
    assert parsed.verb, page
    assert all("=" in word and not word.startswith("-") for word in rest)


@pytest.mark.parametrize(
    "line", sorted({line for _, line in COMMANDS if line.startswith("launch ") and line.split()[1] in shipped.names()})
)
@pytest.mark.usefixtures("shared_data")
def test_every_launch_of_a_shipped_recipe_can_be_planned(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The overrides are keys with values that are allowed; for a GPU where none is named, as 7B models need one."""
    words = [word for word in shlex.split(line) if word not in {"--detach", "--dry-run"}]
    gpu = [] if any(word.startswith(("resources.gpu=", "--cluster")) for word in words) else ["resources.gpu=a100-80gb"]
    assert cli.main([*words, "--dry-run", *gpu]) == 0
    assert "finllm.train" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", sorted({line for _, line in COMMANDS if line.startswith(("launch my.yaml", "check my.yaml"))})
)
def test_every_command_on_a_recipe_of_ones_own_can_be_planned(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`my.yaml` stands for any recipe; here for one on the sample."""
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("model: smollm2-135m\ndata: sample\ntrain: {method: sft}\n")
    words = shlex.split(line)
    assert cli.main([*words, *(["--dry-run"] if words[0] == "launch" else [])]) == 0
    assert ("no faults" if words[0] == "check" else "finllm.train") in capsys.readouterr().out


CURLS = sorted(
    {line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines() if "curl" in line}
)


@pytest.mark.slow
@pytest.mark.parametrize("line", CURLS)
def test_every_curl_is_answered_by_the_service(line: str, tiny_run: Run) -> None:
    """Route, header and body as they are printed."""
    from fastapi.testclient import TestClient

    from finllm.service.app import create
    from finllm.service.reader import Reader
    from finllm.service.settings import Settings

    said = argparse.ArgumentParser()
    said.add_argument("url")
    said.add_argument("-s", action="store_true")
    said.add_argument("-H", dest="header")
    said.add_argument("-d", dest="body")
    asked = said.parse_args(shlex.split(line)[1:])
    name, value = asked.header.split(": ")
    texts = json.loads(asked.body)["texts"]
    with TestClient(create(Reader(tiny_run.folder, device="cpu"), Settings())) as client:
        answer = client.post(asked.url.removeprefix("localhost:8000"), content=asked.body, headers={name: value})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["answers"]) == (1 if isinstance(texts, str) else len(texts))


def test_the_pages_hold_curls_and_python() -> None:
    """The tests of them would pass with none."""
    assert len(CURLS) >= 3
    assert {named(page) for page in PAGES if blocks(page, "python")} == {"README.md", "docs/tutorial.md"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "docs/tutorial.md"])
def test_python_in_the_pages_runs(
    name: str, tiny_run: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As printed, on a tiny model: with a recipe and a run in the places that are named."""
    quick = "evaluation: {bootstrap_draws: 100, baselines: [majority]}\n"
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "demo.yaml").write_text(recipe.read_text() + quick)
    monkeypatch.chdir(tmp_path)
    if name != "README.md":
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "news").symlink_to(tiny_run.folder)
    (code,) = blocks(ROOT / name, "python")
    names: dict[str, Any] = {}
    exec(compile(code, name, "exec"), names)  # noqa: S102 - our own pages
    assert names["predictor"].predict("Orders doubled.")["sentiment"] in LABELS
    if name == "README.md":
        assert (tmp_path / "runs" / "demo" / "report.md").is_file()
        assert names["scores"].parts[0].rows > 0


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_other_programs_are_known_ones(page: Path) -> None:
    """`finlm launch` would not be a command of ours, and not be checked."""
    for block in blocks(page, "bash", "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if "=" not in word or " " in word]
            assert not words or words[0] in {"finllm", "cat", *OTHERS} or (ROOT / words[0]).is_file(), line


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_verbs_in_the_text_exist(page: Path) -> None:
    """Every `finllm VERB` between backticks."""
    known = set(cli.build_parser().verbs.choices) | {"COMMAND"}
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    assert set(re.findall(r"`finllm ([a-zA-Z]+)", text)) <= known


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    """To a file beside the page, and to a heading where they name one."""
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def test_the_index_names_every_page() -> None:
    """docs/README.md is where a reader looks first; once each."""
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name: index.count(f"]({name})") for name in pages} == dict.fromkeys(pages, 1)


def test_the_reference_of_recipes_is_current() -> None:
    """As `finllm schema --markdown` writes it."""
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == schema.markdown() + "\n", (
        "run: finllm schema --markdown > docs/recipes.md"
    )


def test_the_reference_has_every_key() -> None:
    """Of the recipe and of all its parts, each with its default."""
    text = schema.markdown()
    described = Recipe.model_json_schema()
    for part in [described, *described["$defs"].values()]:
        for key in part.get("properties", {}):
            assert f"| `{key}` |" in text
    assert "| `learning_rate` | number above 0 below 1 | `0.0002` |" in text
    assert "or a list of these | needed |" in text
    assert not [line for line in text.splitlines() if line.endswith("|  |")], "keys without a meaning"


def test_the_help_places_every_verb() -> None:
    """In a group that says what it is for."""
    verbs = cli.build_parser().verbs
    lines = help.grouped(verbs)
    assert {line[9:].split()[0] for line in lines} == set(verbs.choices)
    assert "other" not in {line[:9].strip() for line in lines}


@pytest.fixture
def news(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The tutorial's folder: its recipe as printed, on a tiny model, and a file of headlines as it describes."""
    monkeypatch.chdir(tmp_path)
    tutorial = ROOT / "docs" / "tutorial.md"
    (recipe,) = blocks(tutorial, "yaml")
    (tmp_path / "news.yaml").write_text(recipe.replace("smollm2-135m ", f"{tiny_model} "))
    example = next(block for block in blocks(tutorial, "text") if block.startswith("headline,mood"))
    words = {"negative": "bearish", "neutral": "neutral", "positive": "bullish"}
    rows = [
        f"{json.dumps(row.text)},{words[row.label]}" for row in Sample(name="sample").read()[:90] if '"' not in row.text
    ]
    (tmp_path / "news.csv").write_text(example + "\n".join(rows) + "\n")
    (tmp_path / "headlines.txt").write_text("Orders doubled\nOrders halved\n")

    def command(start: str) -> str:
        """The tutorial's command that begins so; it must be there."""
        return next(line for line in ours(tutorial) if line.startswith(start))

    return command


@pytest.mark.slow
def test_the_tutorial_works_as_printed(news: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    """From the CSV over check and plan to predictions and an export, in its own words; trained in this process."""
    quick = ("train.max_steps=4", "evaluation.bootstrap_draws=100", "tracking.wandb=disabled", "resources.gpus=0")

    def run(start: str) -> str:
        assert cli.main(shlex.split(news(start))) == 0, start
        return capsys.readouterr().out

    assert "no faults" in run("check news.yaml")
    assert "finllm.train" in run("launch news.yaml --dry-run")
    assert "NVIDIA L4" in run("launch news.yaml --dry-run model.name=mistralai")
    assert news("launch news.yaml --name") == "launch news.yaml --name news"
    finllm.evaluate(finllm.train("news.yaml", *quick, name="news", runs="runs"))
    capsys.readouterr()
    assert "news" in run("status")
    assert run("predict news --file").count('"sentiment"') == 2
    assert "labels of the run" in run("export news --format adapter")
    assert (Path("runs/news/export/adapter") / "README.md").is_file()


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cells as they stand, in one process, on a tiny model in place of SmolLM2."""
    notebook = json.loads((ROOT / "docs" / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], {cell["cell_type"] for cell in notebook["cells"]}) == (4, {"markdown", "code"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"]).replace('"smollm2-135m"', repr(str(tiny_model)))
            exec(compile(code, cell["id"], "exec"), names)  # noqa: S102 - our own notebook
    said = capsys.readouterr().out
    assert re.search(r"^tuned +\d+\.\d \[", said, re.MULTILINE)
    assert re.search(r"tuned less base: [+-]\d+\.\d points, (not )?decided", said)
    assert Run(tmp_path / "runs" / "quickstart").report.is_file()
