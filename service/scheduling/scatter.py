"""Which replica computes which sequences of a large request: shards of about equal time, prefix groups whole.

Pure functions on planned work and on what the replicas report of their load.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from service.records import TokenSequence
from service.scheduling.work import Work

OVERSIZED_GROUP = 1.25
"""A prefix group that costs more than this many fair shares is cut: each cut computes its prefix once more, but a group
in one place would keep the other replicas waiting."""


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What a replica reports of its queue."""

    name: str

    waiting_tokens: int
    """Tokens that wait for its engine."""


ShardPlan: TypeAlias = dict[str, tuple[int, ...]]
"""By the name of a replica the indices of the sequences that it computes, in order; every index occurs once."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences that are computed in one place."""

    indices: tuple[int, ...]
    cost: int


def num_tokens(work: Work) -> int:
    """Return the tokens of all sequences of a request, shared prefixes counted for each."""
    return sum(sequence.num_tokens for sequence in work.sequences)


def plan_shards(
    work: Work, own: ReplicaLoad, siblings: Sequence[ReplicaLoad], *, min_tokens: int, shares_prefixes: bool
) -> ShardPlan:
    """Divide the sequences of a request among replicas, so that all finish at about the same time.

    The groups go, the most expensive first, to the replica that would start them first (longest processing time first;
    Graham, 1969), which takes the tokens that wait there into account.

    Args:
        work: of the request.
        own: the replica that received it.
        siblings: the other replicas that may compute shards.
        min_tokens: no more replicas take part than there are shards of this many tokens.
        shares_prefixes: whether the engine computes the common prefix of a group once.

    Returns:
        The indices by replica, without replicas that get none.
    """
    groups = _groups_of(work, shares_prefixes=shares_prefixes)
    total = sum(group.cost for group in groups)
    num_replicas = min(1 + len(siblings), total // min_tokens)
    if num_replicas < 2:
        return {own.name: tuple(range(len(work.sequences)))}
    replicas = [own, *sorted(siblings, key=lambda sibling: sibling.waiting_tokens)[: num_replicas - 1]]
    fair_share = total / num_replicas
    pieces = [piece for group in groups for piece in _cut(group, work, fair_share, shares_prefixes=shares_prefixes)]
    assigned: dict[str, list[int]] = {}
    # The position keeps the order of equal loads: this replica first.
    loads = [(replica.waiting_tokens, position) for position, replica in enumerate(replicas)]
    heapq.heapify(loads)
    for piece in sorted(pieces, key=lambda piece: -piece.cost):
        load, position = heapq.heappop(loads)
        assigned.setdefault(replicas[position].name, []).extend(piece.indices)
        heapq.heappush(loads, (load + piece.cost, position))
    return {name: tuple(sorted(indices)) for name, indices in assigned.items()}


def own_tokens(num_tokens: int, own_waiting: int, sibling_waiting: Sequence[int], *, min_tokens: int) -> int:
    """Estimate how many tokens of a request this replica computes itself, before the request is tokenized.

    As `plan_shards`: the replicas that take part, those of the siblings with the least waiting work, finish at about
    the same time. A replica on which more waits than that gets nothing.

    Args:
        num_tokens: an estimate of the request's tokens.
        own_waiting: tokens that wait for the own engine.
        sibling_waiting: tokens that wait for the engine of each sibling.
        min_tokens: as for `plan_shards`.
    """
    num_siblings = min(1 + len(sibling_waiting), num_tokens // min_tokens) - 1
    if num_siblings < 1:
        return num_tokens
    waiting = sorted([own_waiting, *sorted(sibling_waiting)[:num_siblings]])
    while (level := (num_tokens + sum(waiting)) / len(waiting)) < waiting[-1]:
        waiting.pop()
    return max(0, math.ceil(level) - own_waiting)


def select(work: Work, indices: Sequence[int]) -> Work:
    """Return the part of the work with these sequences; it answers no items itself."""
    return Work(
        sequences=tuple(work.sequences[index] for index in indices),
        prefixes=tuple(work.prefixes[index] for index in indices),
        item_indices=((),) * len(indices),
    )


def _groups_of(work: Work, *, shares_prefixes: bool) -> list[_Group]:
    members: dict[object, list[int]] = {}
    for index, prefix in enumerate(work.prefixes):
        members.setdefault(prefix, []).append(index)
    return [_group(indices, work, shares_prefixes=shares_prefixes) for indices in members.values()]


def _group(indices: Sequence[int], work: Work, *, shares_prefixes: bool) -> _Group:
    sequences = [work.sequences[index] for index in indices]
    cost = sum(sequence.num_tokens for sequence in sequences)
    if shares_prefixes:
        cost -= (len(sequences) - 1) * _prefix_tokens(sequences[0])
    return _Group(tuple(indices), cost)


def _cut(group: _Group, work: Work, fair_share: float, *, shares_prefixes: bool) -> list[_Group]:
    """Cut a group that is too expensive for one replica into pieces of about a fair share; others stay whole."""
    if group.cost <= OVERSIZED_GROUP * fair_share or len(group.indices) == 1:
        return [group]
    num_pieces = min(math.ceil(group.cost / fair_share), len(group.indices))
    bounds = [len(group.indices) * piece // num_pieces for piece in range(num_pieces + 1)]
    return [_group(group.indices[begin:end], work, shares_prefixes=shares_prefixes) for begin, end in pairwise(bounds)]


def _prefix_tokens(sequence: TokenSequence) -> int:
    return sequence.num_prompt_tokens or 0
