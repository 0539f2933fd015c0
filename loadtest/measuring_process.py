"""A process that holds one contender and scores when it is asked to; between the questions it sleeps.

It knows how to ask and to answer over a pipe, and nothing of what is measured.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from loadtest.contenders import Contender, Outcome, Setup
from loadtest.engine_work import Work
from service.errors import StartupError

STOP_WITHIN_S = 30.0


class ContenderFailedError(StartupError):
    """A contender could not be loaded or raised while it scored; the message is its own."""


class MeasuringProcess:
    """The near end of the pipe. ``ways``: the names that ``score`` takes; known once the contender is loaded."""

    def __init__(self, name: str, pipe: Connection) -> None:
        self._name = name
        self._pipe = pipe

    def wait_until_loaded(self) -> list[str]:
        """Return the names of the contender's ways."""
        ways: list[str] = self._answer()
        return ways

    def score(self, way: str, work: Work) -> Outcome:
        """Have the work done in this way.

        Raises:
            ContenderFailedError: it raised, or its process died.
        """
        outcome: Outcome = self._answer((way, work))
        return outcome

    def _answer(self, question: tuple[str, Work] | None = None) -> Any:
        try:
            if question is not None:
                self._pipe.send(question)
            succeeded, answer = self._pipe.recv()
        except (EOFError, OSError):
            raise ContenderFailedError(f"The process of {self._name} died") from None
        if not succeeded:
            raise ContenderFailedError(f"{self._name}: {answer}")
        return answer


@contextmanager
def running(contender: Contender, setup: Setup, name: str) -> Iterator[MeasuringProcess]:
    """Start the contender in a fresh process, which loads while the caller goes on; it ends with the block."""
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=_serve, args=(far, contender, setup), name=name, daemon=True)
    process.start()
    far.close()
    try:
        yield MeasuringProcess(name, near)
    finally:
        near.close()
        process.join(STOP_WITHIN_S)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(pipe: Connection, contender: Contender, setup: Setup) -> None:
    """Load the contender, then answer until the other end is closed. What raises is told, not hidden."""
    try:
        ways = contender(setup)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other end is waiting for it
        pipe.send((False, f"{type(error).__name__}: {error}"))
        return
    pipe.send((True, list(ways)))
    while True:
        try:
            way, work = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            pipe.send((True, ways[way](work)))
        except Exception as error:  # noqa: BLE001 - as above
            pipe.send((False, f"{type(error).__name__}: {error}"))
