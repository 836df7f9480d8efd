"""Runs on the cluster that go on beside each other: while one waits for SLURM, the others use the cores."""

import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import pytest

AT_ONCE = 3
"""Scenes that are under way."""
Playing = Generator[None, None, None]
Scene = Callable[[Any], Playing]
"""What happens to a run, and what must come of it. It yields wherever it waits, and holds for the others as short as it can."""


class Stage:
    """Plays scenes beside each other, in one thread: each from one `yield` to its next."""

    def __init__(self, given: Any, scenes: Sequence[Scene]) -> None:
        self._given = given
        self._to_come = list(scenes)
        self._playing: dict[Scene, Playing] = {}
        self._over: dict[Scene, BaseException | None] = {}

    def see(self, scene: Scene) -> None:
        """Play until this scene is over; raises what it raised."""
        while scene not in self._over:
            while self._to_come and len(self._playing) < AT_ONCE:
                begun = self._to_come.pop(0)
                self._playing[begun] = begun(self._given)
            for each in list(self._playing):
                self._go_on(each)
            time.sleep(0.5)
        if (error := self._over[scene]) is not None:
            raise error

    def _go_on(self, scene: Scene) -> None:
        try:
            next(self._playing[scene])
        except StopIteration:
            self._over[scene] = None
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 -- its own test is told
            self._over[scene] = error
        if scene in self._over:
            del self._playing[scene]

    def close(self) -> None:
        """Break off what still plays."""
        for scene in self._playing.values():
            scene.close()


def until(condition: Callable[[], object], seconds: float = 600) -> Playing:
    """Wait, and let the others play; the limit is for cores that ten other processes want too."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has taken too long"
        yield
