"""Load shapes: how the same amount of work is sent, singly or in bulk, in groups or independent, in order or shuffled.

Pure and seeded: it assigns texts to requests and sends none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loadtest.workload import cut_into_requests, draw_groups

GROUP_SIZE = 8
NUM_CONNECTIONS = 32


@dataclass(frozen=True, slots=True)
class LoadShape:
    """How the items of one round are sent."""

    name: str
    num_groups: int
    items_per_request: int
    num_connections: int

    group_size: int = GROUP_SIZE
    """Completions of one prompt; 1 for independent items."""

    is_shuffled: bool = False

    @property
    def title(self) -> str:
        """The shape in a few words, for the report."""
        num_items = self.num_groups * self.group_size
        items = f"{self.num_groups} groups of {self.group_size}" if self.group_size > 1 else f"{num_items} independent"
        order = ", shuffled" if self.is_shuffled else ""
        requests = "1 request" if self.items_per_request >= num_items else f"singly, {self.num_connections} connections"
        return f"{items}{order}: {requests}"

    def requests(self, seed: int) -> list[list[dict[str, str]]]:
        """Return the items of each request of one pass."""
        groups = draw_groups(self.num_groups, self.group_size, seed)
        return cut_into_requests(groups, self.items_per_request, seed if self.is_shuffled else None)


@dataclass(frozen=True, slots=True)
class Pass:
    """One shape in one round, with its own texts, so that no server has them cached from an earlier pass."""

    shape: LoadShape
    round: int
    requests: Sequence[Sequence[dict[str, str]]]

    @property
    def items(self) -> list[dict[str, str]]:
        """All items, in the order of the requests."""
        return [item for request in self.requests for item in request]


def shapes_against_plain(single_groups: int, bulk_groups: int) -> list[LoadShape]:
    """Return shapes that show the gain of batching and packing over padding in arrival order."""
    return [_singly("single", single_groups), _bulk("bulk", bulk_groups), _bulk("bulk shuffled", bulk_groups, True)]


def shapes_of_prefixes(single_groups: int, bulk_groups: int) -> list[LoadShape]:
    """Return shapes that show the gain of shared prefixes, and the speed where nothing can be shared."""
    return [
        _singly("single shuffled", single_groups, is_shuffled=True),
        _bulk("bulk", bulk_groups),
        _singly("independent single", single_groups * GROUP_SIZE, group_size=1),
        _bulk("independent bulk", bulk_groups * GROUP_SIZE, group_size=1),
    ]


def passes(shapes: Sequence[LoadShape], rounds: int, seed: int) -> Iterator[Pass]:
    """Yield every shape of every round. No two passes have a text in common, also not those of different seeds."""
    for round_ in range(rounds):
        for number, shape in enumerate(shapes):
            yield Pass(shape, round_, shape.requests(seed * 1000 + round_ * len(shapes) + number))


def _singly(name: str, num_groups: int, group_size: int = GROUP_SIZE, is_shuffled: bool = False) -> LoadShape:
    return LoadShape(name, num_groups, 1, NUM_CONNECTIONS, group_size, is_shuffled)


def _bulk(name: str, num_groups: int, is_shuffled: bool = False, group_size: int = GROUP_SIZE) -> LoadShape:
    return LoadShape(name, num_groups, num_groups * group_size, 1, group_size, is_shuffled)
