"""Options that all adapters take, from keyword arguments or from the environment of a worker process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, cast

from reward_client.adapters.columns import check_columns
from reward_client.checks import check_weights
from reward_client.errors import InvalidArgument
from reward_client.options import TemplateChoice, Truncation
from reward_client.references import Reference
from reward_client.requests import ChunkLimits, Weights
from reward_client.retries import RetryPolicy

PREFIX = "REMOTE_REWARD_"
"""Prefix of the environment variables; ``REWARD_`` is the service's, which refuses variables that it does not know."""

DEFAULT_EXTRAS = ("scored_tokens", "truncated")
"""Diagnostics that are known for every item, whatever is served."""


class ClientOptions(TypedDict, total=False):
    """Keyword arguments of ``RewardClient`` and ``AsyncRewardClient``."""

    deadline_s: float
    max_connections: int
    chunks: ChunkLimits
    retries: RetryPolicy
    headers: Mapping[str, str] | None
    reference: Reference | None
    require_reference: bool
    wait_for_start_s: float | None
    proxy: str | None


class ScoreOptions(TypedDict, total=False):
    """Keyword arguments of ``score`` and ``score_items``."""

    truncation: Truncation | None
    template: TemplateChoice | None
    weights: Weights | None


@dataclass(frozen=True, slots=True)
class AdapterOptions:
    """The options of an adapter, by what they are for."""

    url: str
    """Root URL of the service."""

    score: ScoreOptions
    """For each call."""

    extras: tuple[str, ...]
    """Names of the diagnostics that are returned beside the reward."""

    client: ClientOptions
    """For the client."""


def read_options(given: Mapping[str, Any], where: str, environ: Mapping[str, str] | None = None) -> AdapterOptions:
    """Return the options of an adapter; those that are given take precedence over the environment.

    The variables are ``REMOTE_REWARD_`` and one of URL, DEADLINE_S, MAX_CONNECTIONS, WAIT_FOR_START_S, PROXY, HEADERS
    (a JSON object), TRUNCATION, TEMPLATE, WEIGHTS (a JSON object) and EXTRAS (names separated by commas).

    Args:
        given: keyword arguments or the values of a configuration file.
        where: the place in which the framework's user sets the URL, for the message that it is missing.
        environ: the variables; None: those of the process.

    Raises:
        InvalidArgument: no URL is set, an option or variable is unknown, or a variable cannot be parsed.
    """
    variables = os.environ if environ is None else environ
    options = {
        _option_name(variable): _parsed(variable, text)
        for variable, text in variables.items()
        if variable.startswith(PREFIX)
    } | dict(given)
    unknown = sorted(options.keys() - _OPTIONS)
    if unknown:
        raise InvalidArgument(f"The option {unknown[0]} is unknown; the known ones are {', '.join(sorted(_OPTIONS))}")
    url = options.pop("url", None)
    if not url:
        raise InvalidArgument(f"The URL of the reward service is not set: set {where}")
    score = ScoreOptions(
        truncation=options.pop("truncation", None),
        template=options.pop("template", None),
        weights=check_weights(options.pop("weights", None)),
    )
    extras = check_columns(options.pop("extras", DEFAULT_EXTRAS))
    return AdapterOptions(str(url), score, extras, cast("ClientOptions", options))


def _option_name(variable: str) -> str:
    name = variable.removeprefix(PREFIX).lower()
    if name not in _PARSERS:
        known = ", ".join(PREFIX + option.upper() for option in _PARSERS)
        raise InvalidArgument(f"The environment variable {variable} is unknown; the known ones are {known}")
    return name


def _parsed(variable: str, text: str) -> Any:
    try:
        return _PARSERS[variable.removeprefix(PREFIX).lower()](text)
    except ValueError:
        # The cause is suppressed because it contains the value, which may be a secret.
        raise InvalidArgument(f"The value of the environment variable {variable} cannot be parsed") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


_PARSERS: Mapping[str, Callable[[str], Any]] = {
    "url": str,
    "deadline_s": float,
    "max_connections": int,
    "wait_for_start_s": float,
    "proxy": str,
    "headers": json.loads,
    "truncation": str,
    "template": str,
    "weights": json.loads,
    "extras": _names,
}

_OPTIONS = (
    frozenset(_PARSERS)
    | ClientOptions.__annotations__.keys()
    | {
        "url",
        "truncation",
        "template",
        "weights",
        "extras",
    }
)
