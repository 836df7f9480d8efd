"""finllm.export: a trained run as files that others load, with the answers that its report was made from."""

import base64
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from finllm import SentimentPredictor, licences, models, predictions, upload
from finllm import evaluate as evaluation
from finllm.data import DataSpec
from finllm.errors import RunError
from finllm.example import LABELS
from finllm.export import AnswersDifferError, export
from finllm.models import Card
from finllm.plan import Plan
from finllm.recipe import Model
from finllm.run import Run
from finllm.scores import Scores
from launch import cli

CONVERTER = Path(__file__).with_name("llama_gguf.py")
QUICK = ("evaluation.bootstrap_draws=100", "evaluation.baselines=[majority]", "train.epochs=4")


@pytest.fixture(scope="module")
def run(train: Callable[..., Run], recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An evaluated run with a 4-bit base; tests that change it take a copy."""
    made = train(recipe, tmp_path_factory.mktemp("runs"), "model.quantization=nf4", *QUICK)
    assert evaluation.main([str(made.folder)]) == 0
    return made


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Run:
    """The same run, to be changed."""
    return Run(shutil.copytree(run.folder, tmp_path / "copy"))


def measured(run: Run) -> tuple[list[str], list[tuple[float, ...]]]:
    rows = predictions.read(run.predictions / "table.test.tuned.jsonl")
    return [row.text for row in rows], [row.probabilities for row in rows]


def answers(folder: Path, texts: list[str]) -> list[list[float]]:
    found = SentimentPredictor(folder, device="cpu").predict(texts)
    return [[answer["probabilities"][label] for label in LABELS] for answer in found]


def turn_around(adapter: Path) -> None:
    """Make the adapter say the opposite of what it has learnt."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({k: -10 * v if "lora_B" in k else v for k, v in weights.items()}, adapter / "adapter_model.safetensors")


def test_a_merged_model_answers_as_the_run_did(run: Run, tmp_path: Path) -> None:
    """Loaded anew from ordinary safetensors, without a trace of quantisation or of this machine."""
    made = export(run, "merged", tmp_path / "out")
    texts, expected = measured(run)
    np.testing.assert_allclose(answers(made.folder, texts), expected, atol=1e-5)
    assert (made.check.rows, made.check.differing, made.check.ties) == (6, 0, 0)
    assert made.check.largest_nats < 1e-4
    assert "quantization_config" not in json.loads((made.folder / "config.json").read_text())
    assert not [path for path in made.folder.iterdir() if path.suffix in (".bin", ".pt")]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_merging_takes_the_base_that_was_trained_on(run: Run, tmp_path: Path) -> None:
    """Not the base as published, with which the same adapter answers differently."""
    card, (texts, expected) = Card.of(run.adapter), measured(run)
    published = Card(base=Model(name=card.base.name), prompt=card.prompt, trained="adapter")
    adapter = shutil.copytree(run.adapter, tmp_path / "adapter")
    published.save(adapter)
    assert np.abs(np.array(answers(adapter, texts)) - expected).max() > 1e-3


def test_another_adapter_than_the_evaluated_one_is_not_exported(copy: Run, tmp_path: Path) -> None:
    """The labels differ: nothing is kept, and the command fails."""
    turn_around(copy.adapter)
    with pytest.raises(AnswersDifferError, match=r"another label on [1-6] of 6 texts.*nothing was kept"):
        export(copy, "adapter", tmp_path / "out")
    assert cli.main(["export", str(copy.folder), "--format", "adapter", "--to", str(tmp_path / "out")]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_an_adapter_alone_names_its_base(run: Run, tmp_path: Path) -> None:
    """PEFT finds the base; the pickle and the empty card that libraries leave are not passed on."""
    made = export(run, "adapter", tmp_path / "out")
    base = Card.of(run.adapter).base
    assert models.adapter_base(made.folder) == licences.base_id(base) == base.name
    assert licences.base_id(Model(name="smollm2-135m")) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    files = {path.name for path in made.folder.iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "finllm.json", "tokenizer.json", "README.md"}
    assert "training_args.bin" not in files
    texts, expected = measured(run)
    np.testing.assert_allclose(answers(made.folder, texts), expected, atol=1e-5)


def test_a_run_that_trained_all_weights_has_no_adapter(train: Callable[..., Run], recipe: Path, tmp_path: Path) -> None:
    """Its weights are the merged form as they are."""
    run = train(recipe, tmp_path / "runs", "lora=null", "train.learning_rate=1e-3", *QUICK)
    assert evaluation.main([str(run.folder)]) == 0
    with pytest.raises(RunError, match="there is no adapter; use --format merged"):
        export(run, "adapter", tmp_path / "out")
    assert export(run, "merged", tmp_path / "out").check.differing == 0


def test_the_card_has_the_figures_of_the_run(run: Run, tmp_path: Path) -> None:
    """Metadata that the hub reads, results with their intervals, licences, the prompt; no folder of this machine."""
    from huggingface_hub import ModelCard

    made = export(run, "adapter", tmp_path / "out")
    card = ModelCard.load(made.folder / "README.md")
    found = Scores.of(run).parts[0].systems["tuned"]
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results == {
        "accuracy": pytest.approx(found.accuracy.value, abs=1e-4),
        "macro-F1": pytest.approx(found.macro_f1.value, abs=1e-4),
    }
    assert (card.data.library_name, card.data.license) == ("peft", "other")  # nobody knows the licence of own data
    shown = f"{100 * found.accuracy.value:.1f} [{100 * found.accuracy.low:.1f}, {100 * found.accuracy.high:.1f}]"
    for words in (
        shown,
        "## Intended use",
        "## Limits",
        "not known to FinLLM",
        "52 texts for training",
        "Sentiment:\n",
    ):
        assert words in card.text
    data = Plan.of(run).recipe.data[0].model_dump()["path"]
    assert str(data.parent) not in card.content
    assert Card.of(run.adapter).base.name not in card.content


def test_licences_of_training_data_narrow_the_model(run: Run) -> None:
    """PhraseBank's forbids commercial use; the shipped sample and TFNS leave the base's licence as it is."""
    from finllm.data.phrasebank import PhraseBank
    from finllm.data.sample import Sample
    from finllm.data.tfns import Tfns

    plan, card = Plan.of(run), Card(base=Model(name="mistralai/Mistral-7B-v0.1"), prompt=Plan.of(run).recipe.prompt, trained="adapter")  # fmt: skip

    def licence(*data: Any) -> str:
        recipe = plan.recipe.model_copy(update={"data": data})
        return licences.licence(plan.model_copy(update={"recipe": recipe}), card)["license"]

    assert licence(Sample(name="sample"), Tfns(name="tfns")) == "apache-2.0"
    assert licence(Sample(name="sample"), PhraseBank(name="phrasebank")) == "other"
    assert licence(Sample(name="sample"), PhraseBank(name="phrasebank", parts=("test",))) == "apache-2.0"


def test_every_public_data_set_has_its_terms() -> None:
    """One that is added without them would be passed on as unknown."""
    kinds = get_args(get_args(DataSpec)[0])
    public = {get_args(kind.model_fields["name"].annotation)[0] for kind in kinds} - {"table", "hub"}
    assert public == set(licences.DATA)


def test_a_gguf_file_answers_as_the_run_did(run: Run, tmp_path: Path) -> None:
    """Written by the user's converter, read back and asked again; the merged folder in between does not stay."""
    made = export(run, "gguf", tmp_path / "out", converter=CONVERTER)
    assert made.check.differing == 0
    assert made.check.largest_nats < 1e-4
    assert {path.name for path in made.folder.iterdir()} == {f"{run.name}-f32.gguf", "README.md"}


def test_a_converter_that_errs_is_found_out(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it says so, or writes wrong weights."""
    monkeypatch.setenv("FORGETS", "1")
    with pytest.raises(AnswersDifferError, match=r"llama.cpp's converter does not write this model rightly"):
        export(run, "gguf", tmp_path / "out", converter=CONVERTER)
    monkeypatch.setenv("FAILS", "1")
    with pytest.raises(RunError, match=r"(?s)ended with status 1:.*BPE pre-tokenizer.*requirements.txt"):
        export(run, "gguf", tmp_path / "out", converter=CONVERTER)
    assert not list(tmp_path.iterdir())


def test_without_a_converter_the_way_to_one_is_said(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None at all, or a variable or an option that leads nowhere; before any weights are loaded."""
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match=r"git clone https://github\.com/ggml-org/llama\.cpp"):
        export(run, "gguf", tmp_path / "out")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(RunError, match=r"\$LLAMA_CPP is .*, where there is no convert_hf_to_gguf.py"):
        export(run, "gguf", tmp_path / "out")
    with pytest.raises(RunError, match="--converter is /none"):
        export(run, "gguf", tmp_path / "out", converter=Path("/none"))


def test_what_is_not_ready_is_refused(copy: Run, tmp_path: Path) -> None:
    """A target that exists, scores of another version, no answers, no weights; each with what to do."""
    with pytest.raises(RunError, match="exists; give --to another folder"):
        export(copy, "adapter", tmp_path)
    copy.scores.write_text(copy.scores.read_text().replace('"draws"', '"drawings"'))
    with pytest.raises(RunError, match=r"not of this version .*`finllm evaluate .*` writes it anew"):
        export(copy, "adapter", tmp_path / "out")
    shutil.rmtree(copy.predictions)
    with pytest.raises(RunError, match=r"`finllm evaluate .*` first"):
        export(copy, "adapter", tmp_path / "out")
    shutil.rmtree(copy.adapter)
    with pytest.raises(RunError, match=r"finllm\.json"):
        export(copy, "adapter", tmp_path / "out")


class Hub(ThreadingHTTPServer):
    """As much of the Hugging Face hub as an upload of small files asks for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Conversation)
        self.created: list[dict[str, Any]] = []
        self.uploaded: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()

    @property
    def address(self) -> str:
        """What $HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self.server_port}"


class Conversation(BaseHTTPRequestHandler):
    """One request to the stand-in."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """A repository is made, files are announced and committed; all else is fine."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self._answer({"url": f"{self.server.address}/me/model", "name": "me/model", "id": "1"})
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] == "file":
                    self.server.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer(
                {"commitUrl": f"{self.server.address}/me/model/commit/1", "commitOid": "1", "success": True}
            )
        return self._answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        """The repository exists and is empty."""
        self._answer({"id": "me/model", "sha": "0", "siblings": []})

    def _answer(self, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub on this machine."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A user who is logged in; nothing listens where uploads would go."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    return monkeypatch


def test_an_export_is_uploaded_to_a_private_repository(
    run: Run, tmp_path: Path, hub: Hub, online: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file as it stands in the folder, in one commit, with the user's token."""
    online.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    command = ["export", str(run.folder), "--format", "adapter", "--to", str(tmp_path / "out")]
    assert cli.main([*command, "--push", "me/model", "--yes"]) == 0
    assert f"uploaded: {hub.address}/me/model" in capsys.readouterr().out
    assert [(made["name"], made["visibility"]) for made in hub.created] == [("model", "private")]
    assert hub.tokens == {"Bearer hf_planted"}
    assert hub.uploaded == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_an_upload_is_asked_about_first(
    run: Run, tmp_path: Path, online: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything but yes is no; where nobody can be asked, nothing is even begun."""
    command = ["export", str(run.folder), "--format", "adapter", "--to", str(tmp_path / "out"), "--push", "me/model"]
    assert cli.main(command) == 2
    assert "no terminal to ask at; add --yes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    asked: list[str] = []

    def say_no(question: str) -> str:
        asked.append(question)
        return "no"

    online.setattr("sys.stdin.isatty", lambda: True, raising=False)
    online.setattr("builtins.input", say_no)
    assert cli.main(command) == 0
    assert asked == ["Upload? [y/N] "]
    shown = capsys.readouterr().out
    assert "a new repository is private" in shown
    assert "not uploaded; later: hf upload me/model" in shown


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [("me/model/more", "hf_x", "is no name of a repository"), ("me/model", "", "needs a token that may write")],
)
def test_an_upload_that_cannot_succeed_is_refused_before_the_work(
    repo: str, token: str, said: str, run: Run, tmp_path: Path, online: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A wrong name, no token."""
    online.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    online.setenv("HF_TOKEN", token)
    assert cli.main(["export", str(run.folder), "--to", str(tmp_path / "out"), "--push", repo, "--yes"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("online")
def test_an_upload_that_fails_says_where_the_files_are(run: Run) -> None:
    """No hub answers there."""
    with pytest.raises(RunError, match=r"(?s)could not be uploaded to http://127.0.0.1:9.*`hf upload me/model "):
        upload.push(run.adapter, "me/model")
