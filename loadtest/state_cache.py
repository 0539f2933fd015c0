"""State statistics of completions, computed once for each distinct text and stored on disk.

A measurement that is interrupted continues where it was, and another one of the same model reuses what it has.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from service.errors import CalibrationError
from service.records import Score, TokenSequence

BLOCK_ITEMS = 256
"""Items that are scored before what is known of them is stored."""

Traits = tuple[float, ...]
ScoreBlock = Callable[[Sequence[TokenSequence]], Iterator[tuple[int, object]]]
"""Returns the index and the outcome of each sequence of a block."""


class StateCache:
    """State statistics by text.

    Args:
        path: an SQLite file, which is made if there is none.
        subject: what determines the statistics beside the text: versions of the model and of its calibration.
    """

    def __init__(self, path: Path, subject: Sequence[str]) -> None:
        self._path = path
        self._subject = "\n".join(subject).encode()

    def complete(
        self, sequences: Sequence[TokenSequence], score: ScoreBlock, advance: Callable[[int], None]
    ) -> list[Traits]:
        """Return the statistics of each sequence; those that are not known yet are computed.

        Sequences with a common prefix are computed together, because a forward pass shares it.

        Args:
            sequences: of items at level ``full``.
            score: computes a block.
            advance: called with the number of distinct sequences that have become known.

        Raises:
            CalibrationError: an item has no score, or a score has no statistics.
        """
        keys = [self._key(sequence) for sequence in sequences]
        distinct = dict(zip(keys, sequences, strict=True))
        with closing(sqlite3.connect(self._path)) as database:
            database.execute("CREATE TABLE IF NOT EXISTS states (key BLOB PRIMARY KEY, traits BLOB) WITHOUT ROWID")
            known = {key: traits for key, traits in _read(database) if key in distinct}
            advance(len(known))
            missing = sorted(distinct.keys() - known.keys(), key=lambda key: distinct[key].row)
            for start in range(0, len(missing), BLOCK_ITEMS):
                block = missing[start : start + BLOCK_ITEMS]
                found = _scored(block, distinct, score)
                with database:  # one transaction
                    database.executemany(
                        "INSERT INTO states VALUES (?, ?)",
                        [(key, np.array(traits, np.float32).tobytes()) for key, traits in found.items()],
                    )
                advance(len(found))
            known = dict(_read(database))
        return [known[key] for key in keys]

    def _key(self, sequence: TokenSequence) -> bytes:
        tokens = np.array((sequence.num_prompt_tokens or 0, *sequence.row), np.int64).tobytes()
        return hashlib.sha256(self._subject + b"\n" + tokens).digest()


def _read(database: sqlite3.Connection) -> Iterator[tuple[bytes, Traits]]:
    for key, traits in database.execute("SELECT key, traits FROM states"):
        yield key, tuple(np.frombuffer(traits, np.float32).tolist())


def _scored(block: Sequence[bytes], sequences: Mapping[bytes, TokenSequence], score: ScoreBlock) -> dict[bytes, Traits]:
    found = {
        block[index]: outcome.traits
        for index, outcome in score([sequences[key] for key in block])
        if isinstance(outcome, Score) and outcome.traits is not None
    }
    if len(found) < len(block):
        raise CalibrationError(f"The model gave no states for {len(block) - len(found)} items.")
    return found
