"""Classifiers of the hub: read by the names that they give their outputs, never by the order of these."""

from pathlib import Path

import numpy as np
import pytest

from finllm import classifiers, contamination
from finllm.errors import RunError
from finllm.example import LABELS, Example

WORDS = ["profit", "fell", "rose", "was", "flat", "the", "a", "of", "net", "sales"]


def examples(count: int) -> list[Example]:
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, size=1 + n % 9)) for n in range(count)]
    return [Example(f"x:{n}", "x", text, LABELS[n % 3], "test") for n, text in enumerate(texts)]


def test_outputs_are_put_in_our_order_by_their_names(tiny_bert: Path) -> None:
    """Each row is the model's own softmax of that text alone, its columns permuted by id2label."""
    import torch

    one = classifiers.load(str(tiny_bert), "cpu")
    rows, cut = one.probabilities(examples(70))
    assert one.columns == (1, 2, 0)
    for example, row in list(zip(examples(70), rows, strict=True))[::9]:
        with torch.inference_mode():
            alone = one.model(**one.tokenizer(example.text, return_tensors="pt")).logits.softmax(-1)[0].numpy()
        np.testing.assert_allclose(row, alone[[1, 2, 0]], atol=1e-6)
    assert np.abs(rows - rows[:, [2, 0, 1]]).max() > 0.1  # a wrong order would show
    assert not any(cut)


def test_a_text_that_is_too_long_is_cut_and_counted(tiny_bert: Path) -> None:
    """At what tokenizer and model allow, the smaller of both."""
    one = classifiers.load(str(tiny_bert), "cpu")
    long = Example("x:0", "x", "profit rose " * 50, "positive", "test")
    assert one.max_tokens == 24
    assert one.probabilities([long, *examples(3)])[1] == [True, False, False, False]
    assert one.probabilities([])[0].shape == (0, 3)


@pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1", "LABEL_2"], ["positive", "negative"], ["pos", "neg", "pos"]])
def test_outputs_whose_names_do_not_say_what_they_are_are_refused(names: list[str]) -> None:
    """Guessing the order would give figures of another system."""
    with pytest.raises(RunError, match="does not name negative, neutral and positive once each"):
        classifiers.columns("someone/classifier", dict(enumerate(names)))


def test_other_words_for_the_labels_are_known() -> None:
    """finbert-tone writes capitals; others say bullish and bearish."""
    assert classifiers.columns("x", {0: "Neutral", 1: "Positive", 2: "Negative"}) == (2, 0, 1)
    assert classifiers.columns("x", {0: "Bearish", 1: "Bullish", 2: "Neutral"}) == (0, 2, 1)


def test_a_classifier_that_is_not_there_is_an_error_with_its_name(tmp_path: Path) -> None:
    """A report says so in its place."""
    with pytest.raises(RunError, match="nothing cannot be loaded"):
        classifiers.load(str(tmp_path / "nothing"), "cpu")


def test_what_published_models_have_seen_is_told() -> None:
    """FinBERT of ProsusAI was trained on PhraseBank, finbert-tone was not, of others nothing is known."""
    assert contamination.marks("ProsusAI/finbert", ["phrasebank", "fiqa"])[0].startswith("has seen phrasebank")
    assert not contamination.marks("ProsusAI/finbert", ["fiqa"])[0].startswith("has seen")
    assert not contamination.marks("yiyanghkust/finbert-tone", ["phrasebank"])[0].startswith("has seen")
    assert contamination.marks("someone/else", ["phrasebank"]) == (contamination.UNKNOWN,)
    assert contamination.seen("ProsusAI/finbert") is not None
