"""Many askers, one model: what waits is read together, by one thread, in batches.

One asker alone is answered at once, and under load the batches grow by themselves: what comes while the model works is
its next batch. Only after a batch of many does the model wait a moment, for the same askers to come back together.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)

GATHER_SHARE = 0.1
"""Of the time that a batch of many took: how long to wait for as many again, at most."""
PACE_MEMORY = 0.8
"""Weight of the past in the pace that tells when to come back."""


@dataclass(frozen=True)
class Work:
    """Something that a model does with texts."""

    answer: Callable[[list[str], str | None], Sequence[Any]]
    """Answers to texts that share a target, in their order."""
    batch_texts: int
    """Texts that it reads together, at most."""


class QueueFullError(Exception):
    """Too many texts wait already."""

    def __init__(self, waiting: int, retry_after_seconds: int) -> None:
        super().__init__(f"{waiting} texts wait already; come back in {retry_after_seconds} s")
        self.retry_after_seconds = retry_after_seconds


class ClosedError(Exception):
    """The service is ending and takes nothing new."""


class WorkFailedError(Exception):
    """The model failed on a batch that the asker's texts were in; the log has the traceback."""


@dataclass(eq=False)
class Job:
    """The texts of one asker."""

    verb: str
    texts: Sequence[str]
    target: str | None
    answers: list[Any] = field(default_factory=list)
    future: "Future[list[Any]]" = field(default_factory=Future)
    """All answers, in the order of the texts; cancel it to withdraw what still waits."""
    taken: int = 0
    """Texts given to the model so far."""


class Batcher:
    """A thread that answers jobs with `works`, by verb."""

    def __init__(
        self,
        works: Mapping[str, Work],
        *,
        queue_texts: int,
        watch: Callable[[str, int, float], None] = lambda *_: None,
    ) -> None:
        """`watch` is told of each batch: verb, texts, seconds."""
        self._works, self._watch = works, watch
        self._queue_texts = queue_texts
        self._jobs: deque[Job] = deque()
        self._waiting = 0
        self._seconds_a_text = 0.0
        self._gather_until, self._gathered = 0.0, 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="finllm-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Texts that the model has not been given yet."""
        return self._waiting

    @property
    def alive(self) -> bool:
        """Whether the model's thread works."""
        return self._thread.is_alive()

    def submit(self, verb: str, texts: Sequence[str], target: str | None = None) -> Job:
        """Queue texts, all or none; raises QueueFullError where they are too many, ClosedError at the end."""
        job = Job(verb, texts, target)
        if not texts:
            job.future.set_result([])
            return job
        with self._changed:
            if self._closed:
                raise ClosedError
            self._forget_withdrawn()
            if self._waiting + len(texts) > self._queue_texts:
                raise QueueFullError(self._waiting, max(1, math.ceil(self._waiting * self._seconds_a_text)))
            self._jobs.append(job)
            self._waiting += len(texts)
            self._changed.notify()
        return job

    def close(self) -> None:
        """Answer what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _serve(self) -> None:
        while batch := self._next():
            self._answer(batch)

    def _next(self) -> list[tuple[Job, int, int]]:
        """The next batch as (job, first, last) pieces of one verb and target; empty at the end."""
        with self._changed:
            while True:
                self._forget_withdrawn()
                gathering = self._gather_until - time.monotonic()
                if self._jobs and (gathering <= 0 or self._waiting >= self._gathered or self._closed):
                    return self._take()
                if self._closed:
                    return []
                self._changed.wait(gathering if self._jobs else None)

    def _take(self) -> list[tuple[Job, int, int]]:
        """Pieces of the oldest job and of those like it; a job that is not done goes to the end of the queue.

        So a long job gives way to those that came after it, and they share its next batch.
        """
        oldest = self._jobs[0]
        pieces, room = [], self._works[oldest.verb].batch_texts
        for job in [j for j in self._jobs if (j.verb, j.target) == (oldest.verb, oldest.target)]:
            last = min(len(job.texts), job.taken + room)
            pieces.append((job, job.taken, last))
            room -= last - job.taken
            self._waiting -= last - job.taken
            job.taken = last
            self._jobs.remove(job)
            if last < len(job.texts):
                self._jobs.append(job)
            if not room:
                break
        return pieces

    def _forget_withdrawn(self) -> None:
        for job in [j for j in self._jobs if j.future.done()]:
            self._jobs.remove(job)
            self._waiting -= len(job.texts) - job.taken

    def _answer(self, pieces: list[tuple[Job, int, int]]) -> None:
        oldest = pieces[0][0]
        texts = [text for job, first, last in pieces for text in job.texts[first:last]]
        began = time.perf_counter()
        try:
            found = self._works[oldest.verb].answer(texts, oldest.target)
            assert len(found) == len(texts), f"{len(found)} answers to {len(texts)} texts"
        except Exception as error:  # the border of the thread, which must go on for the other askers
            log.exception("the model failed on %d text(s)", len(texts))
            for job, _, _ in pieces:
                _finish(job, WorkFailedError(f"{type(error).__name__} in the model"))
            return
        seconds = time.perf_counter() - began
        before, now = self._seconds_a_text, seconds / len(texts)
        self._seconds_a_text = PACE_MEMORY * before + (1 - PACE_MEMORY) * now if before else now
        if len(texts) > 1:
            self._gather_until, self._gathered = time.monotonic() + GATHER_SHARE * seconds, len(texts)
        self._watch(oldest.verb, len(texts), seconds)
        answers = iter(found)
        for job, first, last in pieces:
            job.answers.extend(next(answers) for _ in range(last - first))
            if len(job.answers) == len(job.texts):
                _finish(job)


def _finish(job: Job, error: Exception | None = None) -> None:
    if not job.future.set_running_or_notify_cancel():
        return  # the asker has gone
    if error is None:
        job.future.set_result(job.answers)
    else:
        job.future.set_exception(error)
