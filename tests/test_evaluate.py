"""Evaluation and prediction: from a trained run to its report, and to answers for new texts."""

import io
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from finllm import SentimentPredictor, evaluate, predictions
from finllm.errors import RunError
from finllm.example import LABELS
from finllm.journal import history
from finllm.run import Progress, Run
from finllm.scores import Scores


@pytest.fixture(scope="module")
def evaluated(
    train: Callable[..., Run], recipe: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    run = train(
        recipe,
        tmp_path_factory.mktemp("runs"),
        "train.epochs=1",
        "evaluation.parts=[validation, test]",
        f"evaluation.classifiers=[{tiny_bert}, {tiny_bert.parent}/nothing]",
    )
    assert evaluate.main([str(run.folder)]) == 0
    return run


def test_every_system_answers_every_row_once(evaluated: Run, tiny_bert: Path) -> None:
    """Tuned, base and baselines on both parts, each row with three probabilities that sum to 1."""
    systems = ["tuned", "base", "base-calibrated", "majority", "tfidf", tiny_bert.name]
    assert [system.key for system in Scores.of(evaluated).systems] == systems
    for part in ("validation", "test"):
        for key in systems:
            rows = predictions.read(evaluated.predictions / f"table.{part}.{key}.jsonl")
            assert len({row.id for row in rows}) == 6
            np.testing.assert_allclose([sum(row.probabilities) for row in rows], 1, atol=1e-5)


def test_the_base_is_the_model_before_training(evaluated: Run, tiny_model: Path) -> None:
    """What the report calls base is what the base model alone answers, and not what the tuned one does."""
    rows = predictions.read(evaluated.predictions / "table.test.base.jsonl")
    alone = SentimentPredictor(tiny_model, device="cpu").predict([row.text for row in rows])
    for row, answer in zip(rows, alone, strict=True):
        np.testing.assert_allclose(row.probabilities, [answer["probabilities"][label] for label in LABELS], atol=1e-5)
    tuned = predictions.read(evaluated.predictions / "table.test.tuned.jsonl")
    assert max(abs(a.probabilities[0] - b.probabilities[0]) for a, b in zip(rows, tuned, strict=True)) > 1e-3


def test_the_predictor_answers_as_the_evaluation_did(evaluated: Run) -> None:
    """A run folder and its adapter folder give the probabilities of the report, batched or one at a time."""
    rows = predictions.read(evaluated.predictions / "table.test.tuned.jsonl")
    expected = [row.probabilities for row in rows]
    for source, batch_tokens in ((evaluated.folder, 16_384), (evaluated.adapter, 1)):
        answers = SentimentPredictor(source, device="cpu", batch_tokens=batch_tokens).predict([r.text for r in rows])
        given = [[answer["probabilities"][label] for label in LABELS] for answer in answers]
        np.testing.assert_allclose(given, expected, atol=1e-5)


def test_one_text_gives_one_answer_and_a_list_a_list(evaluated: Run) -> None:
    """Odd texts too: empty, other alphabets, and one of 5,000 words, which is cut with a warning."""
    predictor = SentimentPredictor(evaluated.folder, device="cpu")
    one = predictor.predict("Profits today. Orders doubled.")
    assert set(one) == {"sentiment", "confidence", "probabilities"}
    assert one["confidence"] == max(one["probabilities"].values())
    odd = ["", "利益は予想を上回った", "Прибыль упала 📉", "word " * 5000]
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("finllm.predictor").addHandler(handler)
    answers = predictor.predict(odd)
    logging.getLogger("finllm.predictor").removeHandler(handler)
    assert [answer["sentiment"] in LABELS for answer in answers] == [True] * 4
    assert "1 text(s) cut to fit 512 tokens" in stream.getvalue()
    assert "1 empty text(s)" in stream.getvalue()
    assert predictor.predict([]) == []


def test_the_report_says_what_was_done(evaluated: Run) -> None:
    """Table, settings, counts, versions, and the command that repeats it."""
    report = evaluated.report.read_text()
    for words in ("| tuned: ", "LoRA, rank 4", "| table | 52 | 6 | 6 |", "transformers ", "finllm launch "):
        assert words in report
    progress = Progress.of(evaluated)
    assert progress is not None
    assert progress.outcome == "done"


def test_what_cannot_be_had_is_told_and_the_rest_is_scored(evaluated: Run) -> None:
    """A classifier that is not there leaves a line in scores and report; every system has its speed and latency."""
    scores = Scores.of(evaluated)
    assert [(one.key, "cannot be loaded" in one.why) for one in scores.missing] == [("nothing", True)]
    assert "(not available)" in evaluated.report.read_text()
    assert "nothing" in evaluated.report.with_suffix(".html").read_text()
    for system in scores.systems:
        assert system.latency_ms is not None, system.key
        assert system.texts_per_second > 0


def test_the_checks_of_a_sound_run_hold(evaluated: Run, tiny_bert: Path) -> None:
    """Each ran, and says what it looked at; the small BERT, which reads 24 tokens, is told of."""
    checks = {check.name: check for check in Scores.of(evaluated).checks}
    assert len(checks) == 7
    cut = checks["texts are read whole"]
    assert [check for check in checks.values() if not check.passed] == [cut]
    assert f"of 12 texts: {tiny_bert.name} " in cut.found
    assert "12 texts one at a time" in checks["a text's figures do not depend on its batch"].found
    assert "8 texts: at most" in checks["with the adapter off, the tuned model is its base"].found
    assert "32 training texts" in checks["prompts of training and evaluation are the same bytes"].found


def test_figures_reach_tracking(evaluated: Run) -> None:
    """The last line of metrics.jsonl has the accuracy that scores.json has."""
    scores = Scores.of(evaluated)
    logged = {name: value for row in history(evaluated) for name, value in row.numbers.items()}
    test = next(part for part in scores.parts if part.part == "test")
    assert logged["test/table/tuned/accuracy"] == test.systems["tuned"].accuracy.value


def test_a_run_without_weights_is_refused(train: Callable[..., Run], recipe: Path, tmp_path: Path) -> None:
    """Evaluation and prediction of a run that did not finish say so and what to do."""
    run = train(recipe, tmp_path, "train.max_steps=1")
    run.adapter.rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="has no trained weights yet"):
        SentimentPredictor(run.folder)
    assert evaluate.main([str(run.folder)]) == 1
    progress = Progress.of(run)
    assert progress is not None
    assert "finllm resume" in progress.error


def test_a_model_that_cannot_be_had_says_what_to_do(tmp_path: Path) -> None:
    """A folder without a model, and a name that is nowhere, each with advice."""
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(RunError, match=r"must hold config.json.*it holds notes.txt"):
        SentimentPredictor(tmp_path, device="cpu")
    with pytest.raises(RunError, match="check the spelling and the network"):
        SentimentPredictor("./no/such/model", device="cpu")


def test_a_run_that_trained_all_weights_is_evaluated_beside_its_base(
    train: Callable[..., Run], recipe: Path, tmp_path: Path
) -> None:
    """Without an adapter to turn off, base and tuned model are loaded one after the other, and answer differently."""
    run = train(recipe, tmp_path, "lora=null", "train.epochs=1", "train.learning_rate=1e-3")
    assert evaluate.main([str(run.folder)]) == 0
    tuned, base = (predictions.read(run.predictions / f"table.test.{key}.jsonl") for key in ("tuned", "base"))
    assert max(abs(a.probabilities[0] - b.probabilities[0]) for a, b in zip(tuned, base, strict=True)) > 1e-3
