"""The baselines learn what they should, answer in the order of LABELS, and reach the floor of the protocol."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from finllm import baselines, metrics
from finllm.baselines import Linear
from finllm.data import phrasebank
from finllm.errors import DataError
from finllm.example import LABELS, Example, Label, Split

WORDS: dict[Label, str] = {"negative": "loss fell", "neutral": "meeting held", "positive": "profit rose"}


def example(number: int, label: Label, split: Split = "train", target: str | None = None) -> Example:
    text = f"{WORDS[label]} in period {number}"
    return Example(id=f"toy:{number}", dataset="toy", text=text, label=label, split=split, target=target)


def rows(*labels: Label, split: Split = "train") -> list[Example]:
    return [example(number, label, split) for number, label in enumerate(labels)]


def figures(probabilities: NDArray[np.float64], test: list[Example]) -> tuple[float, float]:
    gold = np.array([LABELS.index(e.label) for e in test])
    predicted = probabilities.argmax(axis=1)
    return metrics.accuracy(gold, predicted), metrics.macro_f1(gold, predicted)


def test_majority_always_gives_the_commonest_training_label() -> None:
    """Its probabilities are the labels' shares among the training rows."""
    train = rows("positive", "positive", "negative", "neutral", "positive")
    answers = baselines.fit_majority(train, []).probabilities(rows("negative", "neutral", split="test"))
    assert answers.tolist() == [[0.2, 0.2, 0.6]] * 2


def test_tfidf_learns_words_and_gives_rows_in_the_order_of_labels() -> None:
    """Three labels told apart by their words; each row sums to 1."""
    train, test = rows(*LABELS * 8), rows(*LABELS * 3, split="test")
    answers = baselines.fit_tfidf(train, rows(*LABELS, split="validation")).probabilities(test)
    assert figures(answers, test) == (1.0, 1.0)
    assert answers.sum(axis=1) == pytest.approx(1)


def test_a_label_missing_in_training_gets_probability_0_in_its_own_column() -> None:
    """Without neutral rows the second column is 0, and the others do not move into it."""
    train, test = rows(*("negative", "positive") * 8), rows("negative", "positive", split="test")
    answers = baselines.fit_tfidf(train, rows("positive", "neutral", split="validation")).probabilities(test)
    assert answers[:, 1].tolist() == [0, 0]
    assert figures(answers, test) == (1.0, 1.0)


def test_one_label_in_training_is_answered_always() -> None:
    """There is nothing to fit, and that is no fault."""
    answers = baselines.fit_tfidf(rows(*("neutral",) * 4), []).probabilities(rows("positive", split="test"))
    assert answers.tolist() == [[0, 1, 0]]


def test_the_target_changes_nothing_for_tfidf() -> None:
    """FiQA's target is part of the row, not of what TF-IDF reads."""
    classifier = baselines.fit_tfidf(rows(*LABELS * 4), [])
    without, with_target = (classifier.probabilities([example(1, "neutral", "test", t)]) for t in (None, "profit rose"))
    assert (without == with_target).all()


def noisy(count: int, seed: int, split: Split) -> list[Example]:
    """Rows of which a third carry a random label, so that fitting them exactly does harm."""
    draw = np.random.default_rng(seed)
    made = []
    for number in range(count):
        label = LABELS[draw.integers(3)]
        words = WORDS[label].split() if draw.random() < 0.67 else []
        text = " ".join([*words, *(f"w{draw.integers(400)}" for _ in range(8))])
        made.append(Example(id=f"noisy:{seed}-{number}", dataset="noisy", text=text, label=label, split=split))
    return made


def test_the_strength_is_the_one_that_is_best_on_validation() -> None:
    """Trying each C by itself, none is better on validation, and the grid does matter there."""
    train, validation = noisy(150, 1, "train"), noisy(120, 2, "validation")
    chosen = baselines.fit_tfidf(train, validation)
    assert isinstance(chosen, Linear)
    gold = baselines._indices(train)
    table = chosen.features.transform([e.text for e in train])
    quality = {}
    for strength in baselines.STRENGTHS:
        alone = Linear(chosen.features, baselines._regression(table, gold, strength), strength)
        quality[strength] = figures(alone.probabilities(validation), validation)
    assert len(set(quality.values())) > 1
    assert quality[chosen.strength] == max(quality.values())


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_no_training_rows_is_refused_with_directions(name: str) -> None:
    """A zero-shot recipe on a test part alone has nothing to learn from."""
    with pytest.raises(DataError, match=r"evaluation\.baselines: \[\]"):
        baselines.BASELINES[name]([], [])


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_no_rows_to_answer_give_an_empty_table(name: str) -> None:
    """An empty part has no rows and three columns."""
    assert baselines.BASELINES[name](rows(*LABELS * 3), []).probabilities([]).shape == (0, 3)


@pytest.mark.slow
def test_phrasebank_reaches_the_floor_of_the_protocol(shared_data: Path) -> None:
    """50Agree, split_s42: 79.0 accuracy and 75 macro-F1 are recorded; always neutral is right in 59.3 of 100."""
    read = phrasebank.PhraseBank(name="phrasebank", path=shared_data / "phrasebank").read()
    part = {split: [e for e in read if e.split == split] for split in ("train", "validation", "test")}
    assert [len(examples) for examples in part.values()] == [3382, 483, 968]
    tfidf = baselines.fit_tfidf(part["train"], part["validation"])
    accuracy, macro_f1 = figures(tfidf.probabilities(part["test"]), part["test"])
    assert accuracy == pytest.approx(0.79, abs=0.01)
    assert macro_f1 == pytest.approx(0.75, abs=0.02)
    majority = baselines.fit_majority(part["train"], part["validation"])
    assert figures(majority.probabilities(part["test"]), part["test"])[0] == pytest.approx(0.593, abs=0.0005)
