"""Compares answers with what their items must get: one result for each item, in order, and the reward of its text.

Rewards can be computed from the texts where the server runs the oracle engine; of other models only number, order and
finiteness are checked.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loadtest.traffic.execution import Exchange
from loadtest.traffic.items import Item
from service.engines.oracle import oracle_reward_of_text

ORACLE = "oracle"

ExpectedReward = Callable[[Item, str], float]
"""The reward that a model version must give an item."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What an answer holds."""

    num_rewards: int = 0
    """Items with a reward that is not known to be wrong."""

    num_wrong: int = 0
    """Items with the reward of another text, without a finite reward, or without a result."""

    item_errors: Counter[str] = field(default_factory=Counter)
    """Codes of items that have an error in place of a reward."""

    code: str = ""
    """Code of the problem, where the answer is one."""

    is_malformed: bool = False
    """Whether the answer is neither rewards nor a problem."""


def oracle_reward_of_item(item: Item, version: str) -> float:
    """Return the oracle's reward of an item; the version names the salt."""
    return oracle_reward_of_text(item["prompt"], item["completion"], version.removeprefix(ORACLE).removeprefix("-"))


def check(exchange: Exchange, expected: ExpectedReward | None) -> Checked:
    """Read the answer of an exchange.

    Args:
        exchange: with an answer.
        expected: gives the right rewards; None: they are unknown.
    """
    try:
        answer = json.loads(exchange.content)
        if exchange.status != 200:
            return Checked(code=str(answer["code"]))
        return _check_results(exchange.request.items, answer["results"], answer["model"]["version"], expected)
    except (ValueError, KeyError, TypeError):
        return Checked(num_wrong=exchange.num_items if exchange.status == 200 else 0, is_malformed=True)


def _check_results(
    items: Sequence[Item], results: Sequence[dict[str, object]], version: str, expected: ExpectedReward | None
) -> Checked:
    rewards, wrong, errors = 0, abs(len(items) - len(results)), Counter[str]()
    for index, (item, result) in enumerate(zip(items, results, strict=False)):
        error = result.get("error")
        if isinstance(error, dict):
            errors[str(error["code"])] += 1
            continue
        reward = result["reward"]
        is_right = (
            result["index"] == index
            and isinstance(reward, float | int)
            and math.isfinite(reward)
            and (expected is None or reward == expected(item, version))
        )
        rewards, wrong = rewards + is_right, wrong + (not is_right)
    return Checked(rewards, wrong, errors)
