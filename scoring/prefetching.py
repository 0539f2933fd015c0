"""Reads an iterator ahead in a thread, so that reading and tokenizing overlap with the forward pass."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import Generic, TypeVar

T = TypeVar("T")

_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class _Value(Generic[T]):
    value: T


@dataclass(frozen=True, slots=True)
class _End:
    error: BaseException | None


@contextmanager
def prefetched(source: Iterable[T], num_ahead: int) -> Iterator[Iterator[T]]:
    """Yield an iterator over ``source`` that holds up to ``num_ahead`` entries, read in a thread.

    An exception of the source is raised where its entry would be. The thread ends with the block.
    """
    entries: Queue[_Value[T] | _End] = Queue(num_ahead)
    stopped = threading.Event()
    thread = threading.Thread(target=_read, args=(source, entries, stopped), name="prefetch", daemon=True)
    thread.start()
    try:
        yield _values(entries)
    finally:
        stopped.set()
        thread.join()


def _read(source: Iterable[T], entries: Queue[_Value[T] | _End], stopped: threading.Event) -> None:
    error: BaseException | None = None
    try:
        for value in source:
            if not _put(_Value(value), entries, stopped):
                return
    except BaseException as raised:  # noqa: BLE001 - it is raised again in the consumer's thread
        error = raised
    _put(_End(error), entries, stopped)


def _put(entry: _Value[T] | _End, entries: Queue[_Value[T] | _End], stopped: threading.Event) -> bool:
    while not stopped.is_set():
        try:
            entries.put(entry, timeout=_POLL_S)
        except Full:
            continue
        return True
    return False


def _values(entries: Queue[_Value[T] | _End]) -> Iterator[T]:
    while True:
        try:
            entry = entries.get(timeout=_POLL_S)  # with a timeout, so that Ctrl-C is noticed
        except Empty:
            continue
        if isinstance(entry, _End):
            if entry.error is not None:
                raise entry.error
            return
        yield entry.value
