"""The start-up check of ``batching.batch_invariant``: rewards alone and in batches, compared bit by bit.

Which sequences and batches are compared is decided in pure functions; ``InvarianceProbe`` runs them on a forward path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from service.engines.paths.base import ForwardPath
from service.errors import InvarianceError

Row: TypeAlias = tuple[int, ...]

MAX_COMPARED = 8
"""Sequences whose rewards are compared; each has a pass of its own."""

FILL_TOKENS = {"cpu": 512, "cuda": 12_000}
"""Tokens of further sequences in the batches: on CUDA enough for blocks of every size, on a CPU few, since it is slow.
"""

CACHED_PASSES = 3
"""Passes over a batch where prefixes are cached: as in ``parity``, the third one reads what the second one cached."""


@dataclass(slots=True)
class InvarianceProbe:
    """Checks forward paths, and holds what was found on the last one that passed."""

    probes: Sequence[Row]
    """Token ids; some share prefixes with others."""

    max_tokens: int
    """No sequence is longer."""

    fill_tokens: int
    """Tokens of the sequences that fill the batches."""

    evidence: dict[str, int] = field(default_factory=dict)
    """Numbers of compared sequences, of batches, and of tokens of the largest one; as in ``EngineInfo``."""

    def check(self, path: ForwardPath) -> None:
        """Check that no reward changes by a bit with the batch; the prefix cache of the path is empty afterwards.

        Raises:
            InvarianceError: a reward changes.
        """
        compared = compared_rows(self.probes)
        alone = {row: path.run([row]).at_pooled[0] for row in compared}
        batches = batches_of(self.probes, compared, accompanying_rows(self.probes, self.fill_tokens, self.max_tokens))
        gaps: dict[Row, float] = {}
        for batch in batches:
            for outputs in _outputs_of(path, batch):
                for row, found in zip(batch, outputs, strict=True):
                    if row in alone and found != alone[row]:
                        gap = max(abs(one - other) for one, other in zip(found, alone[row], strict=True))
                        gaps[row] = max(gap, gaps.get(row, 0.0))
        path.clear_cache()
        if gaps:
            raise InvarianceError(
                f"{len(gaps)} of {len(compared)} rewards change with the batch, by up to {max(gaps.values()):.3g}"
            )
        self.evidence = {
            "num_sequences": len(compared),
            "num_batches": len(batches),
            "max_batch_tokens": max(sum(map(len, batch)) for batch in batches),
        }


def compared_rows(probes: Sequence[Row]) -> list[Row]:
    """Return different probes, evenly chosen from all of them."""
    different = list(dict.fromkeys(probes))
    step = -(-len(different) // MAX_COMPARED)
    return different[::step]


def accompanying_rows(probes: Sequence[Row], num_tokens: int, max_tokens: int) -> list[Row]:
    """Return sequences of various lengths with that many tokens together, unless all would be too long.

    Each ends in a probe, so that a gate finds the tokens that it reads.
    """
    pool = [token for probe in probes for token in probe]
    rows: list[Row] = []
    total = 0
    for number in range(num_tokens):
        probe = probes[number % len(probes)]
        start, length = 3 * number % len(pool), 5 + 7 * number % 400
        row = (*(pool[start:] + pool)[:length], *probe)
        if len(row) <= max_tokens:
            rows.append(row)
            total += len(row)
        if total >= num_tokens:
            break
    return list(dict.fromkeys(rows))


def batches_of(probes: Sequence[Row], compared: Sequence[Row], fill: Sequence[Row]) -> list[list[Row]]:
    """Return batches of different sequences: few and many, in several orders, with the compared ones at other places.

    Args:
        probes: all of them, so that prefixes are shared.
        compared: some of them.
        fill: further sequences.
    """
    others = [row for row in dict.fromkeys((*fill, *probes)) if row not in set(compared)]
    half = len(compared) // 2
    return [
        list(dict.fromkeys(probes)),
        [*others, *reversed(compared)],
        [*compared[half:], *others[::2], *compared[:half]],
        list(reversed(compared)),
    ]


def _outputs_of(path: ForwardPath, batch: Sequence[Row]) -> Iterator[Sequence[Sequence[float]]]:
    """Yield the outputs of a batch: once, or with a prefix cache from a cold and a warm cache."""
    if not path.caches_prefixes:
        yield path.run(batch).at_pooled
        return
    for _ in range(CACHED_PASSES):
        yield path.run(batch, prompts=[len(row) // 2 for row in batch]).at_pooled
