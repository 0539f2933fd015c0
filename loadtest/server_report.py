"""Compares the measurements of two servers: ratios by round, and differences of rewards.

It computes and prints; nothing is measured here.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table

from loadtest.load_shapes import LoadShape
from loadtest.reward_comparison import RewardComparison, compare_rewards
from loadtest.server_rounds import Measurement

OURS = "ours"


@dataclass(frozen=True, slots=True)
class ServerReport:
    """The results of a comparison of the service with a peer."""

    peer: str
    """Name of the other server."""

    dtypes: tuple[str, str]
    """Of the service and of the peer; they determine how large a difference counts as rounding."""

    shapes: Sequence[LoadShape]
    measurements: Sequence[Measurement]

    comparisons: Mapping[str, RewardComparison]
    """Differences of rewards, by what was compared with what."""

    peer_versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the peer's packages."""

    @property
    def dtype(self) -> str:
        """The dtype whose rounding is allowed: the coarser of both."""
        return next((dtype for dtype in self.dtypes if dtype != "float32"), "float32")

    @property
    def rewards_match(self) -> bool:
        """Whether all rewards are equal up to rounding; otherwise the ratios have no meaning."""
        return all(comparison.is_rounding(self.dtype) for comparison in self.comparisons.values())

    def as_json(self) -> dict[str, object]:
        """Return the report JSON-ready, with every round of every shape, without the rewards."""
        return {
            "peer": self.peer,
            "dtype": self.dtypes[0],
            "peer_dtype": self.dtypes[1],
            "peer_versions": dict(self.peer_versions),
            "shapes": [self._shape_as_json(shape) for shape in self.shapes],
            "measurements": [
                {name: value for name, value in asdict(one).items() if name != "rewards"} for one in self.measurements
            ],
            "comparisons": {
                name: asdict(comparison) | {"rewards_match": comparison.is_rounding(self.dtype)}
                for name, comparison in self.comparisons.items()
            },
            "rewards_match": self.rewards_match,
        }

    def print(self, console: Console) -> None:
        """Print the report."""
        table = Table("work", "server", "items/s", "p50 s", "p95 s", "cores", "ratio (each round)")
        for shape in self.shapes:
            per_round = ratios(self.measurements, shape.name, self.peer)
            ratio = f"{statistics.median(per_round):.2f} ({', '.join(f'{each:.2f}' for each in per_round)})"
            table.add_row(shape.title, self.peer, *self._medians(shape, self.peer), "")
            table.add_row("", OURS, *self._medians(shape, OURS), ratio)
        table.caption = self._caption()
        console.print(table)
        console.print(
            f"The generator used at most {max(one.client_cpu for one in self.measurements):.2f} cores, "
            f"the idle server at most {max(one.idle_cpu for one in self.measurements):.2f}."
        )
        for name, comparison in self.comparisons.items():
            is_rounding = comparison.is_rounding(self.dtype)
            console.print(
                f"{name}: rewards {'match' if is_rounding else 'DIFFER'} on {comparison.num_items} items, largest "
                f"difference {comparison.max_difference:.2g} (standard deviation of the rewards "
                f"{comparison.spread:.2g}), Spearman {comparison.spearman:.5f}",
                style=None if is_rounding else "red",
            )

    def _caption(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.peer_versions.items())
        ours, peer = self.dtypes
        return f"{OURS} in {ours}; {self.peer} in {peer}{' with ' if versions else ''}{versions}"

    def _shape_as_json(self, shape: LoadShape) -> dict[str, object]:
        per_round = ratios(self.measurements, shape.name, self.peer)
        return asdict(shape) | {"ratios": per_round, "ratio": statistics.median(per_round)}

    def _medians(self, shape: LoadShape, server: str) -> list[str]:
        own = [one for one in self.measurements if (one.shape, one.server) == (shape.name, server)]
        columns = ("items_per_s", "latency_p50_s", "latency_p95_s", "server_cpu")
        return [f"{statistics.median(getattr(one, name) for one in own):.2f}" for name in columns]


def ratios(measurements: Sequence[Measurement], shape: str, peer: str) -> list[float]:
    """Return the service's items per second divided by those of the peer, by round."""
    by_server = {
        server: {one.round: one.items_per_s for one in measurements if one.shape == shape and one.server == server}
        for server in (peer, OURS)
    }
    return [by_server[OURS][round_] / speed for round_, speed in sorted(by_server[peer].items())]


def rewards_of(measurements: Sequence[Measurement], server: str) -> list[float]:
    """Return all rewards of a server, in the order of the planned passes."""
    return [reward for one in measurements if one.server == server for reward in one.rewards]


def compare_servers(
    measurements: Sequence[Measurement], peer: str, reference: Mapping[int, float]
) -> dict[str, RewardComparison]:
    """Compare the rewards of both servers with each other on all items, and with fp32 where that is known.

    Args:
        measurements: of both servers.
        peer: name of the other server.
        reference: fp32 rewards by the item's index among all that were sent; at least two.
    """
    rewards = {server: rewards_of(measurements, server) for server in (OURS, peer)}
    expected = list(reference.values())
    with_fp32 = {
        f"{server} against transformers in fp32": compare_rewards(expected, [found[index] for index in reference])
        for server, found in rewards.items()
    }
    return {f"{OURS} against {peer}": compare_rewards(rewards[peer], rewards[OURS]), **with_fp32}
