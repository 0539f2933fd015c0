"""The item that the tests of the protocols score, and its expected rewards."""

from __future__ import annotations

from service.engines.oracle import oracle_reward

PROMPT, COMPLETION = "How do I boil an egg?", "Put it into boiling water."
ITEM = {"prompt": PROMPT, "completion": COMPLETION}


def reward_of(text: str) -> float:
    """The reward that the oracle gives a text that is tokenized as it is."""
    return oracle_reward(text.encode())
