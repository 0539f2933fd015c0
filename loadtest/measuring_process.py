"""A process that holds one contender and scores on request; between requests it waits without using the CPU.

Requests and results go through a pipe. What is measured is decided by the caller.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from loadtest.contenders import Contender, Outcome, Setup
from loadtest.engine_work import Work
from service.errors import StartupError

STOP_WITHIN_S = 30.0


class ContenderFailedError(StartupError):
    """A contender could not be loaded or raised while it scored; the message is that of its exception.

    Args:
        message: of the exception.
        details: its traceback; empty where the process died.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details or message


class MeasuringProcess:
    """The caller's end of the pipe."""

    def __init__(self, name: str, pipe: Connection) -> None:
        self._name = name
        self._pipe = pipe

    def wait_until_loaded(self) -> list[str]:
        """Wait until the contender is loaded and return the names of its ways, which `score` takes."""
        ways: list[str] = self._receive()
        return ways

    def score(self, way: str, work: Work) -> Outcome:
        """Score the work in this way and return the outcome.

        Raises:
            ContenderFailedError: it raised, or its process died.
        """
        outcome: Outcome = self._receive((way, work))
        return outcome

    def _receive(self, request: tuple[str, Work] | None = None) -> Any:
        try:
            if request is not None:
                self._pipe.send(request)
            succeeded, result = self._pipe.recv()
        except (EOFError, OSError):
            raise ContenderFailedError(f"The process of {self._name} died") from None
        if not succeeded:
            message, details = result
            raise ContenderFailedError(f"{self._name}: {message}", details)
        return result


@contextmanager
def running(contender: Contender, setup: Setup, name: str) -> Iterator[MeasuringProcess]:
    """Start the contender in a new process, which loads while the caller continues; it ends with the block."""
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
    """Load the contender, then serve requests until the other end is closed. Exceptions are sent as messages."""
    try:
        ways = contender(setup)
    except Exception as error:  # noqa: BLE001 - the other end waits for a result, whatever was raised
        pipe.send((False, _in_words(error)))
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
            pipe.send((False, _in_words(error)))


def _in_words(error: Exception) -> tuple[str, str]:
    """Return an exception's message and its traceback."""
    return f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
