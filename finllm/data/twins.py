"""Near twins: texts so alike that training on one and testing on the other measures memory."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

THRESHOLD = 0.75
"""Cosine of character 3-5-gram TF-IDF vectors at or above which two texts are near twins."""
ROWS = 500
"""Rows compared at once: 500 x 20,000 cosines fit in 120 MB."""


def normalise(text: str) -> str:
    """The text as compared: NFKC, lower case, without URLs and punctuation (but % and currency signs), single spaces.

    The keys of the split tables are made from this, so a change here makes every table refuse its data.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"https?://\S+", " ", text)
    text = re.sub(r"[^a-z0-9%$€£+\-. ]", " ", text)
    text = re.sub(r"(?<![0-9])[.\-+]|[.\-+](?![0-9])", " ", text)  # kept inside numbers: 3.5, 2019-2020
    return " ".join(text.split())


def comparable(text: str) -> str:
    """`normalise(text)`, or the folded text itself where that would lose letters of another script."""
    letters = [c for c in text if c.isalpha()]
    foreign = sum(not c.isascii() for c in letters)
    if foreign * 5 > len(letters):
        return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return normalise(text) or " ".join(text.split())


def twin_pairs(a: Sequence[str], b: Sequence[str], threshold: float = THRESHOLD) -> list[tuple[int, int, float]]:
    """(i, j, cosine) of every a[i] and b[j] that are near twins, in order; TF-IDF is fitted on both."""
    texts = [comparable(text) for text in (*a, *b)]
    if not a or not b or not any(texts):
        return []
    vectors = _vectors(texts)
    return sorted(_close(vectors[: len(a)], vectors[len(a) :], threshold))


def groups(texts: Sequence[str], threshold: float = THRESHOLD) -> list[int]:
    """A group number for each text, the place of the group's first; near twins of near twins share a group."""
    compared = [comparable(text) for text in texts]
    if not any(compared):
        return list(range(len(texts)))
    vectors = _vectors(compared)
    return components(len(texts), ((i, j) for i, j, _ in _close(vectors, vectors, threshold)))


def components(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """For each of `count` items the lowest item that a chain of pairs leads to."""
    parent = list(range(count))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return [root(item) for item in range(count)]


def _vectors(texts: Sequence[str]) -> Any:
    """Unit rows of TF-IDF over character 3-5-grams inside words, sparse, in single precision."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, dtype=np.float32)
    return vectorizer.fit_transform(texts)


def _close(a: Any, b: Any, threshold: float) -> Iterator[tuple[int, int, float]]:
    transposed = b.T.tocsr()
    for start in range(0, a.shape[0], ROWS):
        block = (a[start : start + ROWS] @ transposed).tocoo()
        near = block.data >= threshold
        for i, j, cosine in zip(block.row[near], block.col[near], block.data[near], strict=True):
            yield start + int(i), int(j), float(cosine)
