"""Wire formats: request bodies for items and rewards from responses, one format for each kind of server.

Bodies are built before the clock starts and responses are parsed after it has stopped; nothing is sent here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from reward_client.errors import RewardServiceError

from loadtest.peer_servers.rendering import adds_special_tokens, render


class UnexpectedAnswer(RewardServiceError):
    """The server returned something other than rewards, so that a measurement would have no meaning."""


class WireFormat(Protocol):
    """The format of a server's requests and responses."""

    path: ClassVar[str]
    """To which requests are posted."""

    def body(self, items: Sequence[Mapping[str, str]]) -> bytes:
        """Return the JSON body of one request for items with ``prompt`` and ``completion``."""
        ...

    def rewards(self, content: bytes) -> list[float]:
        """Return the raw rewards of a response with status 200, in the order of the items.

        Raises:
            UnexpectedAnswer: an item has no finite reward.
        """
        ...


class NativeWire:
    """The service's format, which the plain server supports in part: prompts and completions, not rendered."""

    path: ClassVar[str] = "/v1/score"

    def body(self, items: Sequence[Mapping[str, str]]) -> bytes:
        """Return the items unchanged."""
        return json.dumps({"items": list(items)}).encode()

    def rewards(self, content: bytes) -> list[float]:
        """Return the rewards of ``results``, which are in the order of the items."""
        results = json.loads(content)["results"]
        errors = sorted({str(result["error"].get("title")) for result in results if "error" in result})
        if errors:
            raise UnexpectedAnswer(f"Items have errors instead of rewards: {', '.join(errors)}")
        return _finite([result.get("reward", math.nan) for result in results])


class VllmWire:
    """vLLM's ``/classify`` with raw logits.

    A request has either one conversation or many texts, so the texts are rendered in advance. vLLM thus has less work
    than the servers that render themselves.
    """

    path: ClassVar[str] = "/classify"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def body(self, items: Sequence[Mapping[str, str]]) -> bytes:
        """Return one request for all texts; a single text is a list too."""
        texts = [render(self._tokenizer, item["prompt"], item["completion"]) for item in items]
        body = {
            "input": texts,
            "use_activation": False,
            "add_special_tokens": adds_special_tokens(self._tokenizer),
        }
        return json.dumps(body).encode()

    def rewards(self, content: bytes) -> list[float]:
        """Return the rewards of ``data``, sorted by index; ``probs`` are logits, because no activation is requested."""
        results = sorted(json.loads(content)["data"], key=lambda result: int(result["index"]))
        if any(len(result["probs"]) != 1 for result in results):
            raise UnexpectedAnswer("The server's model has more than one label")
        return _finite([result["probs"][0] for result in results])


class LitServeWire:
    """The format of ``loadtest.peer_servers.litserve_server`` at LitServe's own path; the server renders the items."""

    path: ClassVar[str] = "/predict"

    def body(self, items: Sequence[Mapping[str, str]]) -> bytes:
        """Return the items unchanged."""
        return json.dumps({"items": list(items)}).encode()

    def rewards(self, content: bytes) -> list[float]:
        """Return ``rewards``, which are raw."""
        return _finite(list(json.loads(content)["rewards"]))


class OpenRlhfWire:
    """OpenRLHF's format: whole texts, as its agents send them one at a time."""

    path: ClassVar[str] = "/get_reward"

    def body(self, items: Sequence[Mapping[str, str]]) -> bytes:
        """Return prompt and completion of each item as one text."""
        queries = [item["prompt"] + item["completion"] for item in items]
        prompts = [item["prompt"] for item in items]
        return json.dumps({"query": queries, "prompts": prompts, "labels": [None] * len(items)}).encode()

    def rewards(self, content: bytes) -> list[float]:
        """Return ``rewards``, which are raw."""
        return _finite(list(json.loads(content)["rewards"]))


NATIVE = NativeWire()


def _finite(rewards: list[float]) -> list[float]:
    missing = sum(not math.isfinite(reward) for reward in rewards)
    if missing:
        raise UnexpectedAnswer(f"{missing} items of a response have no reward")
    return rewards
