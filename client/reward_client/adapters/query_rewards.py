"""Rewards of whole texts in the actor's template, in the form of OpenRLHF's reward functions."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

from reward_client.adapters.columns import level_of, numbers
from reward_client.adapters.options import AdapterOptions, read_options
from reward_client.errors import ClientError, InvalidArgument
from reward_client.synchronous import RewardClient

LOGGER = logging.getLogger("reward_client")

WHERE = "REMOTE_REWARD_URL in the environment of every worker"


def score_queries(queries: Sequence[str], prompts: Sequence[Any] | None, labels: Any = None) -> dict[str, Any]:
    """Return rewards and diagnostics in OpenRLHF's form.

    Args:
        queries: whole texts in the actor's template, special tokens included; they are not rendered again.
        prompts: the templated prompts. Where a query begins with its prompt, the diagnostics know its completion.
        labels: ignored.

    Returns:
        ``rewards`` and ``scores``, the raw reward of each query, and ``extra_logs``, the diagnostics of
        ``REMOTE_REWARD_EXTRAS``: lists of floats, NaN where a value is unknown.

    Raises:
        ClientError: see ``AsyncRewardClient.score_items``.
    """
    del labels
    try:
        return _score(list(queries), [None] * len(queries) if prompts is None else list(prompts))
    except ClientError as error:
        LOGGER.error("No rewards for %d queries: %s", len(queries), error)  # noqa: TRY400 - the message says it all
        raise


def _score(queries: list[str], prompts: list[Any]) -> dict[str, Any]:
    if len(prompts) != len(queries):
        raise InvalidArgument(f"{len(queries)} queries, but {len(prompts)} prompts")
    client, options = _client()
    items = [_item(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
    scored = client.score_items(
        items, diagnostics=level_of(options.extras), truncation=options.score["truncation"], template="concat"
    )
    rows = [numbers(item, options.extras) for item in scored]
    rewards = [item.known_reward for item in scored]
    return {
        "rewards": rewards,
        "scores": list(rewards),
        "extra_logs": {name: [row[name] for row in rows] for name in (rows[0] if rows else {})},
    }


def _item(query: str, prompt: object) -> dict[str, str]:
    """Return the wire item of a query: the same text in both forms, split where its completion begins."""
    if isinstance(prompt, str) and prompt and query.startswith(prompt):
        return {"prompt": prompt, "completion": query[len(prompt) :]}
    return {"text": query}


@functools.cache
def _client() -> tuple[RewardClient, AdapterOptions]:
    options = read_options({}, WHERE)
    if options.score["template"] not in (None, "concat"):
        raise InvalidArgument("OpenRLHF sends templated texts: REMOTE_REWARD_TEMPLATE can only be concat")
    return RewardClient(options.url, **options.client), options
