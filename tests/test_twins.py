"""finllm.data.twins: which texts are the same, or nearly so."""

import numpy as np
import pytest

from finllm.data.sample import Sample
from finllm.data.twins import comparable, components, groups, normalise, twin_pairs

SALES = "Net sales of the Paper segment decreased to EUR 221.6 mn in the second quarter of 2009."
SALES_AGAIN = "Net sales of the Paper segment decreased to EUR 211.6 mn in the second quarter of 2009."
OTHER = "The annual general meeting will be held in Helsinki on Thursday."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sales ROSE by 3.5 %, to €12-14m.", "sales rose by 3.5 % to €12-14m"),
        ("see https://t.co/abc?x=1 now...", "see now"),
        ("\uff21\uff22\uff23\u00a0Oyj's  profit", "abc oyj s profit"),
        ("+3 and -4, well-known", "3 and 4 well known"),
        ("Nordea\u2122 \u2013 J\u00e4rvi", "nordeatm j rvi"),
    ],
)
def test_normalising_keeps_letters_numbers_percent_and_currency(text: str, expected: str) -> None:
    """Case, URLs, punctuation and runs of spaces go; what numbers need stays."""
    assert normalise(text) == expected


def test_texts_in_another_script_are_not_emptied() -> None:
    """Two different Chinese headlines must not both become nothing, and so be the same."""
    assert normalise("利润增长") == ""
    assert comparable("利润增长 5%") != comparable("利润下降 5%")


def test_near_twins_are_found_with_their_cosine() -> None:
    """One changed figure leaves a near twin; another sentence is none."""
    pairs = twin_pairs([OTHER, SALES], [SALES_AGAIN, "Something else entirely."])
    assert [(i, j) for i, j, _ in pairs] == [(1, 0)]
    assert 0.75 <= pairs[0][2] < 0.999


def test_the_same_text_has_cosine_one_whatever_its_case() -> None:
    """Case and punctuation do not hide a copy."""
    [(i, j, cosine)] = twin_pairs([SALES], [SALES.upper().replace("of the", "of   the") + "!"])
    assert (i, j) == (0, 0)
    assert cosine == pytest.approx(1, abs=1e-5)


def test_pairs_agree_with_all_cosines_computed_at_once() -> None:
    """Working in blocks changes nothing: 620 sentences against themselves, as one dense product."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [example.text for example in Sample(name="sample").read()]
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True).fit_transform(
        [comparable(text) for text in texts * 2]
    )
    cosines = (vectors[: len(texts)] @ vectors[len(texts) :].T).toarray()
    expected = sorted((int(i), int(j)) for i, j in np.argwhere(cosines >= 0.2))
    assert len(expected) > len(texts)
    assert [(i, j) for i, j, _ in twin_pairs(texts, texts, 0.2)] == expected


def test_groups_hold_chains_of_near_twins_and_are_named_by_their_first() -> None:
    """A text alike to a member of a group belongs to the group."""
    assert groups([OTHER, SALES, "Something else.", SALES_AGAIN]) == [0, 1, 2, 1]
    assert components(5, [(3, 4), (1, 3)]) == [0, 1, 2, 1, 1]


@pytest.mark.parametrize("texts", [[], [""], ["", " "]])
def test_nothing_has_no_twins(texts: list[str]) -> None:
    """Empty input gives no pairs and no shared groups, not an error of the vectoriser."""
    assert twin_pairs(texts, texts) == []
    assert groups(texts) == list(range(len(texts)))
