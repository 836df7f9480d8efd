"""Classifiers without a language model: what any fine-tuned model has to beat."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finllm import metrics
from finllm.errors import DataError
from finllm.example import LABELS, Example

STRENGTHS = (0.25, 1.0, 4.0, 16.0, 64.0)
"""Inverse regularisation (C) of the logistic regression, tried on validation."""


class Classifier(Protocol):
    """Answers with the probability of each label."""

    def probabilities(self, examples: Sequence[Example]) -> NDArray[np.float64]:
        """(examples, labels), each row sums to 1, columns in the order of LABELS."""
        ...


@dataclass(frozen=True)
class Constant:
    """Answers the same for every text."""

    shares: tuple[float, ...]
    """Probability of each label."""

    def probabilities(self, examples: Sequence[Example]) -> NDArray[np.float64]:
        """The same row for every example."""
        return np.tile(np.array(self.shares), (len(examples), 1))


@dataclass(frozen=True)
class Linear:
    """TF-IDF features and a logistic regression, both fitted."""

    features: Any
    model: Any
    strength: float
    """The C that was best on validation."""

    def probabilities(self, examples: Sequence[Example]) -> NDArray[np.float64]:
        """Probabilities from the text alone; 0 for a label that the training rows do not have."""
        rows = np.zeros((len(examples), len(LABELS)))
        if examples:
            rows[:, self.model.classes_] = self.model.predict_proba(self.features.transform(_texts(examples)))
        return rows


def fit_majority(train: Sequence[Example], validation: Sequence[Example]) -> Constant:  # noqa: ARG001 - see BASELINES
    """Always the commonest training label, with the labels' shares in the training rows as probabilities."""
    counts = Counter(example.label for example in _some(train))
    return Constant(tuple(counts[label] / len(train) for label in LABELS))


def fit_tfidf(train: Sequence[Example], validation: Sequence[Example]) -> Linear | Constant:
    """TF-IDF of word 1-2-grams and character 2-4-grams with the logistic regression that does best on validation.

    Best is highest in accuracy, then in macro-F1, then the most regularised. Without validation rows C is 1; with one
    label in the training rows there is nothing to fit, and the answer is that label. Uses one core. The target is
    not read: as a bag of words it does not help.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_union
    from threadpoolctl import threadpool_limits

    gold = _indices(_some(train))
    if len(set(gold.tolist())) == 1:
        return fit_majority(train, validation)
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True),
    )
    # Threads only wait for one another on vectors this short: two took 35 s on two busy cores, one 4 s.
    with threadpool_limits(1):
        table = features.fit_transform(_texts(train))
        fitted = [Linear(features, _regression(table, gold, c), c) for c in (STRENGTHS if validation else (1.0,))]
        return max(fitted, key=lambda classifier: _quality(classifier, validation))  # the first of equals


def _regression(table: Any, gold: metrics.Indices, strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=2000).fit(table, gold)


def _quality(classifier: Linear, validation: Sequence[Example]) -> tuple[float, float]:
    if not validation:
        return 0.0, 0.0
    gold, predicted = _indices(validation), classifier.probabilities(validation).argmax(axis=1)
    return metrics.accuracy(gold, predicted), metrics.macro_f1(gold, predicted)


def _some(train: Sequence[Example]) -> Sequence[Example]:
    if not train:
        raise DataError(
            "the baselines majority and tfidf learn from training rows, and the recipe's data sets have none; "
            "give a data set its train part, or write evaluation.baselines: []"
        )
    return train


def _texts(examples: Sequence[Example]) -> list[str]:
    return [example.text for example in examples]


def _indices(examples: Sequence[Example]) -> metrics.Indices:
    return np.array([LABELS.index(example.label) for example in examples], dtype=np.intp)


BASELINES: dict[str, Callable[[Sequence[Example], Sequence[Example]], Classifier]] = {
    "majority": fit_majority,
    "tfidf": fit_tfidf,
}
"""Every baseline that a recipe can name: (training rows, validation rows) -> classifier."""

NAMES = {"majority": "majority class", "tfidf": "TF-IDF + logistic regression"}
"""What tables call them."""
