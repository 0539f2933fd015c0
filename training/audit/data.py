"""The pairs of an audit: read whole before anything heavy is imported, so that a bad row is reported at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.data.reading import Tell
from service.errors import DatasetError
from training.preferences import PreferencePair, read_pairs
from training.sources import Source, source_hashes

MIN_PAIRS = 20
"""With fewer pairs the interval of an accuracy would be more than 40 points wide."""


MAX_TRAIN_PAIRS = 1000
"""Training pairs that are scored for the over-training check; all of them are searched for leaked prompts."""


@dataclass(frozen=True, slots=True)
class AuditData:
    """The pairs of an audit and the files that they are from."""

    pairs: Sequence[PreferencePair] = field(repr=False)
    """Pairs that the model was not trained on."""

    train_pairs: Sequence[PreferencePair] | None = field(repr=False)
    """Pairs that it was trained on; None where none were given."""

    description: Mapping[str, Any]
    """Names and hashes of the files, for the reader of the report."""


def read_data(sources: Sequence[Source], train_sources: Sequence[Source] = (), tell: Tell | None = None) -> AuditData:
    """Read all pairs.

    Args:
        sources: pairs that the model was not trained on.
        train_sources: pairs that it was trained on, for the checks of leakage and over-training.
        tell: called with what was found in each file, see `service.data.reading.Reading`.

    Raises:
        DatasetError: a source cannot be read, a row is not a pair, or there are fewer than ``MIN_PAIRS`` pairs.
    """
    pairs = list(read_pairs(sources, tell))
    if len(pairs) < MIN_PAIRS:
        raise DatasetError(f"There are {len(pairs)} held-out pairs; an audit needs at least {MIN_PAIRS}.")
    return AuditData(
        pairs,
        list(read_pairs(train_sources, tell)) if train_sources else None,
        {"files": _files(sources), "train_files": _files(train_sources)},
    )


def _files(sources: Sequence[Source]) -> list[dict[str, str]]:
    return [{"name": name, "sha256": digest} for name, digest in source_hashes(sources).items()]
