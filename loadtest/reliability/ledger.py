"""A client-side ledger: items with known rewards through the shipped client, and an account of every single answer."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from reward_client import AsyncRewardClient, ChunkLimits
from reward_client.errors import ClientError
from rich.console import Console

from loadtest.traffic.execution import NO_ANSWER, Tally
from loadtest.traffic.items import EqualItems, Item
from loadtest.traffic.progress import shown_progress
from service.engines.oracle import oracle_reward_of_text

DEADLINE_S = 600.0


@dataclass(slots=True)
class Ledger:
    """What became of the items."""

    num_items: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    """Answers of each item, by its id."""
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """Exceptions of the client by their class; the items of such a call have no answer."""
    seconds: float = 0.0
    tally: Tally = field(default_factory=lambda: Tally("items"))
    """Items for the display of progress."""

    @property
    def lost(self) -> int:
        """Items without an answer."""
        return self.num_items - len(self.answers)

    @property
    def duplicated(self) -> int:
        """Items with more than one answer."""
        return sum(count > 1 for count in self.answers.values())


async def keep_ledger(
    url: str,
    num_items: int,
    *,
    clients: int,
    items_per_call: int,
    item_bytes: int,
    console: Console | None = None,
) -> Ledger:
    """Score so many items through ``clients`` clients and account for every answer.

    Args:
        url: of the service.
        num_items: in all.
        clients: that send at the same time.
        items_per_call: of each request.
        item_bytes: of each item.
        console: where progress is shown; None: standard error.
    """
    ledger, source = Ledger(num_items), EqualItems(item_bytes, seed=11)
    calls = _calls(source, num_items, items_per_call)
    began = time.monotonic()

    async def work() -> None:
        async with AsyncRewardClient(
            url,
            deadline_s=DEADLINE_S,
            max_connections=1,
            chunks=ChunkLimits(max_items=2048),
            # A fault may come before a client's first answer.
            wait_for_start_s=DEADLINE_S,
        ) as client:
            for items in calls:
                await _score(client, items, ledger)

    async with (
        shown_progress(console or Console(stderr=True, soft_wrap=True), ledger.tally),
        asyncio.TaskGroup() as group,
    ):
        for _ in range(clients):
            group.create_task(work())
    ledger.seconds = time.monotonic() - began
    return ledger


def _calls(source: EqualItems, num_items: int, items_per_call: int) -> Iterator[list[Item]]:
    for begin in range(0, num_items, items_per_call):
        items = source.take(min(items_per_call, num_items - begin))
        yield [{**item, "id": f"item-{begin + index}"} for index, item in enumerate(items)]


async def _score(client: AsyncRewardClient, items: list[Item], ledger: Ledger) -> None:
    ledger.tally.sent += len(items)
    try:
        scored = await client.score_items(items, diagnostics="none")
    except ClientError as error:
        ledger.errors[type(error).__name__] += 1
        ledger.tally.by_status[NO_ANSWER] = ledger.tally.by_status.get(NO_ANSWER, 0) + len(items)
        return
    ledger.tally.by_status[200] = ledger.tally.by_status.get(200, 0) + len(items)
    for item, answer in zip(items, scored, strict=True):
        ledger.answers[str(answer.id)] += 1
        expected = oracle_reward_of_text(item["prompt"], item["completion"])
        ledger.wrong += (answer.id, answer.reward) != (item["id"], expected)
