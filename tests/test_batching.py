"""What many ask at once is read together, in order, within bounds."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError

import pytest

from finllm.service.batching import Batcher, ClosedError, QueueFullError, Work, WorkFailedError


class Gate:
    """Work that waits to be let through, and keeps what it was given."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[str], str | None]] = []
        self.began, self.open = threading.Semaphore(0), threading.Event()

    def answer(self, texts: list[str], target: str | None) -> list[str]:
        """The texts in capitals; a bad one raises ValueError."""
        self.began.release()
        assert self.open.wait(10)
        self.batches.append((texts, target))
        if "bad" in texts:
            raise ValueError("this text breaks the model")
        return [text.upper() for text in texts]


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def make(gate: Gate) -> Iterator[Callable[..., Batcher]]:
    made: list[Batcher] = []

    def batcher(batch_texts: int = 4, queue_texts: int = 8) -> Batcher:
        works = {"read": Work(gate.answer, batch_texts), "other": Work(gate.answer, batch_texts)}
        made.append(Batcher(works, queue_texts=queue_texts))
        return made[-1]

    yield batcher
    gate.open.set()
    for one in made:
        one.close()


def test_what_comes_while_the_model_works_is_read_together(make: Callable[..., Batcher], gate: Gate) -> None:
    """One asker alone is answered at once; four that wait share the next batch, and each gets its own answers."""
    batcher = make()
    first = batcher.submit("read", ["a"])
    assert gate.began.acquire(timeout=5)
    others = [batcher.submit("read", texts) for texts in (["b", "c"], ["d"], ["e"])]
    gate.open.set()
    assert first.future.result(5) == ["A"]
    assert [job.future.result(5) for job in others] == [["B", "C"], ["D"], ["E"]]
    assert [texts for texts, _ in gate.batches] == [["a"], ["b", "c", "d", "e"]]


def test_a_long_job_gives_way_to_those_that_came_after_it(make: Callable[..., Batcher], gate: Gate) -> None:
    """After its first batch it stands behind them, and still gets its answers in order."""
    batcher = make(batch_texts=2)
    long = batcher.submit("read", list("abcdef"))
    assert gate.began.acquire(timeout=5)
    short = batcher.submit("read", ["x"], "Acme")
    gate.open.set()
    assert long.future.result(5) == list("ABCDEF")
    assert short.future.result(5) == ["X"]
    assert gate.batches.index((["x"], "Acme")) < gate.batches.index((["e", "f"], None))


def test_texts_of_other_targets_and_verbs_are_not_mixed(make: Callable[..., Batcher], gate: Gate) -> None:
    """A batch has one verb and one target."""
    batcher = make()
    batcher.submit("read", ["first"])
    assert gate.began.acquire(timeout=5)
    jobs = [
        batcher.submit("read", ["a"], "Acme"),
        batcher.submit("read", ["b"], "Bolt"),
        batcher.submit("other", ["c"], "Acme"),
        batcher.submit("read", ["d"], "Acme"),
    ]
    gate.open.set()
    assert [job.future.result(5) for job in jobs] == [["A"], ["B"], ["C"], ["D"]]
    assert gate.batches[1:] == [(["a", "d"], "Acme"), (["b"], "Bolt"), (["c"], "Acme")]


def test_a_full_queue_takes_all_texts_of_a_job_or_none(make: Callable[..., Batcher], gate: Gate) -> None:
    """It says how long to stay away; what fits is still taken, and room that was left is used again."""
    batcher = make(queue_texts=4)
    batcher.submit("read", ["working"])
    assert gate.began.acquire(timeout=5)
    kept = batcher.submit("read", ["a", "b", "c"])
    with pytest.raises(QueueFullError) as refused:
        batcher.submit("read", ["d", "e"])
    assert refused.value.retry_after_seconds >= 1
    assert batcher.waiting == 3
    batcher.submit("read", ["d"])
    gate.open.set()
    assert kept.future.result(5) == ["A", "B", "C"]
    assert batcher.submit("read", ["e", "f"]).future.result(5) == ["E", "F"]


def test_what_is_withdrawn_is_never_read_and_makes_room(make: Callable[..., Batcher], gate: Gate) -> None:
    """An asker that gave up costs nothing more."""
    batcher = make(queue_texts=2)
    batcher.submit("read", ["working"])
    assert gate.began.acquire(timeout=5)
    gone = batcher.submit("read", ["a", "b"])
    assert gone.future.cancel()
    stays = batcher.submit("read", ["c", "d"])
    gate.open.set()
    assert stays.future.result(5) == ["C", "D"]
    assert ["a", "b"] not in [texts for texts, _ in gate.batches]
    with pytest.raises(CancelledError):
        gone.future.result(0)


def test_a_batch_that_fails_fails_its_askers_only(make: Callable[..., Batcher], gate: Gate) -> None:
    """The thread lives on; a long job with a failed batch is not read further."""
    gate.open.set()
    batcher = make(batch_texts=2)
    bad = batcher.submit("read", ["a", "bad", "never"])
    with pytest.raises(WorkFailedError, match="ValueError"):
        bad.future.result(5)
    assert batcher.submit("read", ["fine"]).future.result(5) == ["FINE"]
    assert batcher.alive
    assert batcher.waiting == 0
    assert ["never"] not in [texts for texts, _ in gate.batches]


def test_closing_answers_what_waits_and_takes_nothing_more(make: Callable[..., Batcher], gate: Gate) -> None:
    """As at SIGTERM."""
    batcher = make()
    jobs = [batcher.submit("read", [text]) for text in "abcdef"]
    gate.open.set()
    batcher.close()
    assert [job.future.result(0) for job in jobs] == [[text] for text in "ABCDEF"]
    assert not batcher.alive
    with pytest.raises(ClosedError):
        batcher.submit("read", ["late"])


def test_many_threads_get_each_their_own_answers(make: Callable[..., Batcher], gate: Gate) -> None:
    """Sixteen askers, fifty questions each, of one to three texts."""
    gate.open.set()
    batcher = make(batch_texts=8, queue_texts=100)
    wrong: list[str] = []

    def ask(name: int) -> None:
        for number in range(50):
            texts = [f"t{name}.{number}.{i}" for i in range(number % 3 + 1)]
            answers = batcher.submit("read", texts, "Acme" if number % 2 else None).future.result(10)
            if answers != [text.upper() for text in texts]:
                wrong.append(f"{texts}: {answers}")

    askers = [threading.Thread(target=ask, args=(name,)) for name in range(16)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert not wrong
    assert sum(len(texts) for texts, _ in gate.batches) == 16 * sum(number % 3 + 1 for number in range(50))
