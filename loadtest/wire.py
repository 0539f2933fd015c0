"""How items are put to a server and rewards read from its answer: one wire format for each kind of server.

Bodies are made before the clock starts and answers are read after it has stopped; nothing here sends anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from reward_client.errors import RewardServiceError

from loadtest.rendering import adds_special_tokens, render


class UnexpectedAnswer(RewardServiceError):
    """The server answered something else than rewards; a measurement of that would mean nothing."""


class WireFormat(Protocol):
    """What must be known of a server to have items scored. ``path``: where requests are posted."""

    path: ClassVar[str]

    def body(self, items: Sequence[Mapping[str, str]]) -> bytes:
        """Return the JSON body of one request for items with ``prompt`` and ``completion``."""
        ...

    def rewards(self, content: bytes) -> list[float]:
        """Read the raw rewards from the content of a 200 answer, in the order of the items.

        Raises:
            UnexpectedAnswer: an item has no finite reward.
        """
        ...


class NativeWire:
    """Our own format, of which the plain server speaks what a comparison needs: prompts and completions as they are."""

    path: ClassVar[str] = "/v1/score"

    def body(self, items: Sequence[Mapping[str, str]]) -> bytes:
        """Return the items as they are."""
        return json.dumps({"items": list(items)}).encode()

    def rewards(self, content: bytes) -> list[float]:
        """Read ``results``, which stand in the order of the items."""
        results = json.loads(content)["results"]
        errors = sorted({str(result["error"].get("title")) for result in results if "error" in result})
        if errors:
            raise UnexpectedAnswer(f"Items were answered with errors: {', '.join(errors)}")
        return _finite([result.get("reward", math.nan) for result in results])


class VllmWire:
    """vLLM's ``/classify`` with raw logits.

    It takes one conversation a request or many texts, so it gets texts that are already rendered: less work than the
    servers have that render for themselves.
    """

    path: ClassVar[str] = "/classify"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def body(self, items: Sequence[Mapping[str, str]]) -> bytes:
        """Return one request for all texts; one text alone is also a list."""
        texts = [render(self._tokenizer, item["prompt"], item["completion"]) for item in items]
        asked = {
            "input": texts,
            "use_activation": False,
            "add_special_tokens": adds_special_tokens(self._tokenizer),
        }
        return json.dumps(asked).encode()

    def rewards(self, content: bytes) -> list[float]:
        """Read ``data`` by index; its ``probs`` are logits, for no activation was asked for."""
        answers = sorted(json.loads(content)["data"], key=lambda answer: int(answer["index"]))
        if any(len(answer["probs"]) != 1 for answer in answers):
            raise UnexpectedAnswer("The server's model has more than one label")
        return _finite([answer["probs"][0] for answer in answers])


NATIVE = NativeWire()


def _finite(rewards: list[float]) -> list[float]:
    missing = sum(not math.isfinite(reward) for reward in rewards)
    if missing:
        raise UnexpectedAnswer(f"{missing} items of an answer have no reward")
    return rewards
