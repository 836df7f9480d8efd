"""Tables as people have them: read where that is possible, else refused with what to do."""

import csv
import io

import pytest

from finllm.errors import DataError
from launch.uploads import MAX_ROWS, answered, read

ANSWER = {
    "sentiment": "positive",
    "confidence": 0.7,
    "probabilities": {"negative": 0.1, "neutral": 0.2, "positive": 0.7},
}


@pytest.mark.parametrize(
    "content",
    [
        b"id,headline\n1,Profits rose\n",
        "\ufeffid;headline\r\n1;Profits rose\r\n".encode(),
        b"id\theadline\n\n1\tProfits rose\n\n",
        b'id,headline\n1,"Profits rose"',
    ],
    ids=["plain", "Excel", "tabs and empty lines", "quoted, without an end"],
)
def test_usual_kinds_of_csv_are_read(content: bytes) -> None:
    """Commas, semicolons, tabs; with and without a mark of byte order."""
    upload = read("news.csv", content)
    assert (upload.columns, upload.rows) == (("id", "headline"), (("1", "Profits rose"),))
    assert upload.likely_column == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"  \n", "is empty"),
        (b"text\n", "has a header but no rows"),
        (b"text\n\xff\xfe", "is not UTF-8"),
        (b'text\n"Profits', "are its quotes closed"),
        (b"id,text\n1,Profits rose, costs fell\n", "row 2 has 3 cells and the header 2"),
        (b"text\n" + b"a\n" * (MAX_ROWS + 1), f"at most {MAX_ROWS:,}"),
    ],
)
def test_what_is_no_table_is_refused(content: bytes, said: str) -> None:
    """With the file's name, what was found and what to do."""
    with pytest.raises(DataError, match=r"bad\.csv") as refused:
        read("bad.csv", content)
    assert said in str(refused.value)


def test_the_column_of_texts_is_found() -> None:
    """By its name, the likeliest first, else by the length of its cells."""
    assert read("a.csv", b"headline,Text,body\nlong headline,a,b\n").likely_column == 1
    assert read("a.csv", b"a,b\n1,Profits rose\n").likely_column == 1


def test_the_answered_table_keeps_every_cell_and_adds_five() -> None:
    """In the order of the rows; one without a text gets no answer, and a name that is taken another one."""
    upload = read("a.csv", b'text,sentiment\n"Up, ""and"" away\nfar",x\n ,y\n')
    assert upload.texts(0) == {0: 'Up, "and" away\nfar'}
    rows = list(csv.reader(io.StringIO(answered(upload, {0: ANSWER}).decode(), newline="")))
    assert rows == [
        ["text", "sentiment", "sentiment_finllm", "confidence", "p_negative", "p_neutral", "p_positive"],
        ['Up, "and" away\nfar', "x", "positive", "0.700000", "0.100000", "0.200000", "0.700000"],
        [" ", "y", "", "", "", "", ""],
    ]
