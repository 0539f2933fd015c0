"""Single requests of the experiments that count what becomes of each item; no proxy of the environment is used."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from typing import Any

from loadtest.traffic.items import Item
from service.engines.oracle import oracle_reward_of_text

ANSWER_WITHIN_S = 60.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def read(url: str) -> str:
    """Return the text at a URL."""
    with _DIRECT.open(url, timeout=ANSWER_WITHIN_S) as answer:
        return str(answer.read().decode())


def score(url: str, items: Sequence[Item]) -> str:
    """Score items and return the text of the answer.

    Raises:
        OSError: there is no answer, or one without rewards.
    """
    body = json.dumps({"items": items}).encode()
    request = urllib.request.Request(f"{url}/v1/score", body, {"Content-Type": "application/json"})  # noqa: S310
    with _DIRECT.open(request, timeout=ANSWER_WITHIN_S) as answer:
        return str(answer.read().decode())


def is_right(item: Item, result: dict[str, Any]) -> bool:
    """Whether a result has the oracle's reward of its item."""
    return bool(result.get("reward") == oracle_reward_of_text(item["prompt"], item["completion"]))
