"""What two servers' figures say: ratios round by round, and whether the rewards behind them are right.

It computes and prints; nothing is measured here.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from loadtest.agreement import Agreement, agreement_between
from loadtest.load_shapes import LoadShape
from loadtest.server_rounds import Measurement

OURS = "ours"


@dataclass(frozen=True, slots=True)
class ServerReport:
    """All that was found about a peer and our service.

    ``agreements``: what was compared with what, and how it agreed; ``dtype`` says how closely it must.
    """

    peer: str
    dtype: str
    shapes: Sequence[LoadShape]
    found: Sequence[Measurement]
    agreements: Mapping[str, Agreement]

    @property
    def agrees(self) -> bool:
        """Whether all rewards are equal but for rounding. If not, no ratio means anything."""
        return all(agreement.holds(self.dtype) for agreement in self.agreements.values())

    def as_json(self) -> dict[str, object]:
        """The report for machines, with every round of every shape, without the rewards."""
        return {
            "peer": self.peer,
            "dtype": self.dtype,
            "shapes": [self._shape_as_json(shape) for shape in self.shapes],
            "measurements": [
                {name: value for name, value in asdict(one).items() if name != "rewards"} for one in self.found
            ],
            "agreements": {
                between: asdict(agreement) | {"agrees": agreement.holds(self.dtype)}
                for between, agreement in self.agreements.items()
            },
            "agrees": self.agrees,
        }

    def print(self, console: Console) -> None:
        """Print the report for people."""
        table = Table("work", "server", "items/s", "p50 s", "p95 s", "cores", "ratio (each round)")
        for shape in self.shapes:
            per_round = ratios(self.found, shape.name, self.peer)
            said = f"{statistics.median(per_round):.2f} ({', '.join(f'{ratio:.2f}' for ratio in per_round)})"
            table.add_row(shape.title, self.peer, *self._medians(shape, self.peer), "")
            table.add_row("", OURS, *self._medians(shape, OURS), said)
        console.print(table)
        console.print(
            f"Meanwhile the generator used at most {max(one.client_cpu for one in self.found):.2f} cores, "
            f"the idle server at most {max(one.idle_cpu for one in self.found):.2f}."
        )
        for between, agreement in self.agreements.items():
            agrees = agreement.holds(self.dtype)
            console.print(
                f"{between}: rewards {'agree' if agrees else 'DISAGREE'} on {agreement.num_items} items, largest "
                f"difference {agreement.max_difference:.2g} (their spread is {agreement.spread:.2g}), Spearman "
                f"{agreement.spearman:.5f}",
                style=None if agrees else "red",
            )

    def _shape_as_json(self, shape: LoadShape) -> dict[str, object]:
        per_round = ratios(self.found, shape.name, self.peer)
        return asdict(shape) | {"ratios": per_round, "ratio": statistics.median(per_round)}

    def _medians(self, shape: LoadShape, server: str) -> list[str]:
        mine = [one for one in self.found if (one.shape, one.server) == (shape.name, server)]
        columns = ("items_per_s", "latency_p50_s", "latency_p95_s", "server_cpu")
        return [f"{statistics.median(getattr(one, name) for one in mine):.2f}" for name in columns]


def ratios(found: Sequence[Measurement], shape: str, peer: str) -> list[float]:
    """Return our items per second over those of the peer, per round."""
    by_server = {
        server: {one.round: one.items_per_s for one in found if one.shape == shape and one.server == server}
        for server in (peer, OURS)
    }
    return [by_server[OURS][round_] / speed for round_, speed in sorted(by_server[peer].items())]


def rewards_of(found: Sequence[Measurement], server: str) -> list[float]:
    """Return all rewards that a server gave, in the order in which the passes were planned."""
    return [reward for one in found if one.server == server for reward in one.rewards]


def compare_rewards(found: Sequence[Measurement], peer: str, reference: Mapping[int, float]) -> dict[str, Agreement]:
    """Return how both servers agree with each other on all items, and with fp32 where that is known.

    ``reference``: fp32 rewards by the item's place among all that were sent; at least two.
    """
    said = {server: rewards_of(found, server) for server in (OURS, peer)}
    wanted = list(reference.values())
    against_fp32 = {
        f"{server} against transformers in fp32": agreement_between(wanted, [rewards[place] for place in reference])
        for server, rewards in said.items()
    }
    return {f"{OURS} against {peer}": agreement_between(said[peer], said[OURS]), **against_fp32}
