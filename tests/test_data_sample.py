"""finllm.data.sample: the facts that README and recipes rely on."""

from collections import Counter

from finllm.data import check_leaks, read_parts
from finllm.data.sample import Sample
from finllm.data.twins import normalise

ROWS = Sample(name="sample").read()
MIXED = [example for example in ROWS if example.careless is not None]


def test_the_sample_holds_620_sentences_in_three_fixed_parts() -> None:
    """Counts per part and label; they change only together with the file."""
    assert Counter(example.split for example in ROWS) == {"train": 390, "validation": 60, "test": 170}
    assert Counter((example.split, example.label) for example in ROWS) == {
        ("train", "negative"): 135,
        ("train", "neutral"): 114,
        ("train", "positive"): 141,
        ("validation", "negative"): 21,
        ("validation", "neutral"): 17,
        ("validation", "positive"): 22,
        ("test", "negative"): 59,
        ("test", "neutral"): 49,
        ("test", "positive"): 62,
    }


def test_every_source_is_in_every_part() -> None:
    """Newswire, filings, analyst notes and posts are spread over the parts."""
    sources = {(example.split, example.source) for example in ROWS}
    assert len(sources) == 12
    assert {source for _, source in sources} == {"news", "filing", "analyst", "post"}


def test_mixed_signals_are_misread_by_the_careless_and_explained() -> None:
    """200 of them, 60 in the test part, each with another careless label and a reason."""
    assert Counter(example.split for example in MIXED) == {"train": 121, "validation": 19, "test": 60}
    assert all(example.careless != example.label for example in MIXED)
    assert all(len((example.explanation or "").split()) >= 6 for example in MIXED)
    assert {example.label for example in MIXED} == {"negative", "neutral", "positive"}


def test_kinds_are_the_two_halves_of_all() -> None:
    """Plain and mixed together are all, with the same ids."""
    mixed, plain = Sample(name="sample", kind="mixed").read(), Sample(name="sample", kind="plain").read()
    assert mixed == MIXED
    assert {e.id for e in mixed} | {e.id for e in plain} == {e.id for e in ROWS}
    assert len(mixed) + len(plain) == len(ROWS)


def test_no_two_sentences_are_twins_across_parts() -> None:
    """Looked for by cosine, not by stored groups."""
    parts = read_parts([Sample(name="sample")])
    assert not parts.twins_grouped
    check_leaks(parts)
    assert len({normalise(example.text) for example in ROWS}) == 620


def test_the_texts_are_clean() -> None:
    """No stray spaces, no empty text, and sentences that end where prose ends."""
    for example in ROWS:
        assert example.text == " ".join(example.text.split()), example.id
        assert 3 <= len(example.text.split()) <= 60, example.id
        if example.source in {"filing", "analyst"}:
            assert example.text.endswith((".", "?")), example.id
