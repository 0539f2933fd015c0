"""A queue in front of a model that scores one batch at a time: a batch is what waits, oldest first, up to a limit.

It imports the standard library only, so that it runs in any environment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

MAX_BATCH_ITEMS = 16

AnyItem = TypeVar("AnyItem")


class ItemBatcher(Generic[AnyItem]):
    """Queues items and scores up to sixteen of them at a time in a thread.

    Args:
        score: returns the reward of each item of a batch, in order.
    """

    def __init__(self, score: Callable[[list[AnyItem]], list[float]]) -> None:
        self._score = score
        self._waiting: asyncio.Queue[tuple[AnyItem, asyncio.Future[float]]] = asyncio.Queue()

    async def score(self, items: list[AnyItem]) -> list[float]:
        """Queue the items and return their rewards, in order; raises what their batch raised."""
        futures: list[asyncio.Future[float]] = [asyncio.get_running_loop().create_future() for _ in items]
        for waiting in zip(items, futures, strict=True):
            self._waiting.put_nowait(waiting)
        return list(await asyncio.gather(*futures))

    async def run(self) -> None:
        """Score waiting items until cancelled."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < MAX_BATCH_ITEMS and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            try:
                rewards = await asyncio.to_thread(self._score, [item for item, _ in batch])
            except Exception as error:  # noqa: BLE001  (any error must reach the waiting callers)
                for _, future in batch:
                    future.set_exception(error)
                continue
            for (_, future), reward in zip(batch, rewards, strict=True):
                future.set_result(reward)
