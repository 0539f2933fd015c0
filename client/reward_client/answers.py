"""Parses and validates responses against the request.

Pure: bytes in, records out; a response that violates the protocol raises BadAnswer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from reward_client.diagnostics import Diagnostics
from reward_client.errors import BadAnswer, ItemFailure, ItemsFailed, RewardMissing
from reward_client.fields import read_fields

_NOT_DIAGNOSTICS = frozenset(
    {"index", "id", "digest", "reward", "rewards", "reward_members", "reward_std", "step_rewards", "step_outputs"}
)


@dataclass(frozen=True, slots=True)
class ScoredItem:
    """The result of one item."""

    reward: float | None
    """The raw output of the scalar head, finite; of a model with several outputs their weighted sum. None only where
    neither the call nor the service has weights of them."""

    model_version: str
    """Version of the model that computed it."""

    id: str | int | None = None
    """The item's own id, echoed."""

    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    """Every further field of the result, as the service sent it."""

    rewards: Mapping[str, float] = field(default_factory=dict)
    """The raw outputs of a model with several, by name; empty for a model with one."""

    step_rewards: tuple[float, ...] = ()
    """The reward of each step, in order; empty for an item without steps."""

    step_outputs: tuple[Mapping[str, float], ...] = ()
    """The raw outputs at each step, by name, of a model with several; empty for a model with one."""

    reward_members: tuple[float, ...] = ()
    """The rewards of the members of an ensemble, in order; empty for other models."""

    reward_std: float | None = None
    """Their standard deviation, with divisor n; None for other models."""

    @property
    def known_reward(self) -> float:
        """The reward, for a caller that needs one.

        Raises:
            RewardMissing: the model has several outputs, and no weights of them are known.
        """
        if self.reward is None:
            raise RewardMissing(self.rewards)
        return self.reward

    @property
    def details(self) -> Diagnostics:
        """The diagnostics as a record with typed fields.

        Raises:
            BadAnswer: the service sent a member with another type than the protocol's.
        """
        return read_fields(Diagnostics, self.diagnostics, "the diagnostics")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Comparison of the completions of one prompt."""

    rewards: tuple[float, ...]
    """[n], in the order sent."""

    probabilities: tuple[tuple[float, ...], ...]
    """`[n][n]`; entry `[a][b]` is sigma(reward_a - reward_b), the Bradley-Terry probability that a is preferred."""

    model_version: str
    """Version of the model that computed the rewards."""


@dataclass(frozen=True, slots=True)
class ChunkScores:
    """A valid response of ``/v1/score``: one result per item, each with either a finite reward or an error."""

    model_version: str
    results: list[dict[str, Any]]


def read_scores(content: bytes, num_items: int, digests: Sequence[str] = ()) -> ChunkScores:
    """Parse a response of ``/v1/score`` to a request of ``num_items`` items.

    Args:
        content: the response.
        num_items: items of the request.
        digests: one for each item, which its result must have; empty: they were not asked for.

    Raises:
        BadAnswer: not JSON, no model version, another count or order, a reward that is not a finite number, or the
            digest of another item.
    """
    answer = read_object(content)
    results = answer.get("results")
    if not isinstance(results, list) or len(results) != num_items:
        found = len(results) if isinstance(results, list) else "no"
        raise BadAnswer(f"{num_items} items were sent, {found} results came back")
    for index, result in enumerate(results):
        if not isinstance(result, dict) or result.get("index") != index:
            raise BadAnswer(f"Result {index} does not have index {index}")
        if ("error" in result) == any(name in result for name in ("reward", "rewards", "step_outputs")):
            raise BadAnswer(f"Result {index} must have either a reward or an error")
        if "reward" in result:
            _finite(result["reward"], f"The reward of result {index}")
        if "rewards" in result:
            _check_named(result["rewards"], f"The rewards of result {index}")
        if "reward_members" in result:
            _check_members(result, f"result {index}")
        _check_steps(result, index)
        if digests and result.get("digest") != digests[index]:
            raise BadAnswer(f"Result {index} does not have the digest of item {index}: it is the result of another one")
    return ChunkScores(_model_version(answer), results)


def join_scores(chunks: Sequence[ChunkScores]) -> list[ScoredItem]:
    """Return the items of all chunks in input order.

    Raises:
        ItemsFailed: some items have an error instead of a reward.
    """
    results = [(chunk.model_version, result) for chunk in chunks for result in chunk.results]
    failures = [_failure(index, result["error"]) for index, (_, result) in enumerate(results) if "error" in result]
    if failures:
        items = [None if "error" in result else _scored(version, result) for version, result in results]
        raise ItemsFailed(failures, [None if item is None else item.reward for item in items], items)
    return [_scored(version, result) for version, result in results]


def read_comparison(content: bytes, num_completions: int) -> Comparison:
    """Parse a response of ``/v1/compare`` to a request of ``num_completions`` completions.

    Raises:
        BadAnswer: not JSON, no model version, another count, a number that is not finite.
    """
    answer = read_object(content)
    rewards = _vector(answer.get("rewards"), num_completions)
    rows = answer.get("probabilities")
    if not isinstance(rows, list) or len(rows) != num_completions:
        raise BadAnswer(f"{num_completions} completions were sent; the probabilities are of another number")
    return Comparison(rewards, tuple(_vector(row, num_completions) for row in rows), _model_version(answer))


def read_object(content: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        BadAnswer: it is something else, or holds NaN or infinity, which Python's decoder would accept.
    """
    try:
        answer = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        # The cause is suppressed because it contains the content.
        raise BadAnswer(f"The response of {len(content)} bytes is not JSON") from None
    if not isinstance(answer, dict):
        raise BadAnswer("The response is not a JSON object")
    return answer


def read_problem(content: bytes) -> dict[str, Any]:
    """Parse an RFC 9457 problem; empty where there is none, because a proxy may answer plain text."""
    try:
        answer = read_object(content)
    except BadAnswer:
        return {}
    return answer if isinstance(answer.get("code"), str) else {}


def _scored(version: str, result: Mapping[str, Any]) -> ScoredItem:
    diagnostics = {name: value for name, value in result.items() if name not in _NOT_DIAGNOSTICS}
    reward = float(result["reward"]) if "reward" in result else None
    rewards = {name: float(value) for name, value in result.get("rewards", {}).items()}
    steps = tuple(map(float, result.get("step_rewards", ())))
    outputs = tuple({name: float(one) for name, one in step.items()} for step in result.get("step_outputs", ()))
    members = tuple(map(float, result.get("reward_members", ())))
    std = float(result["reward_std"]) if members else None
    return ScoredItem(reward, version, result.get("id"), diagnostics, rewards, steps, outputs, members, std)


def _failure(index: int, error: object) -> ItemFailure:
    fields = error if isinstance(error, dict) else {}
    return ItemFailure(index, str(fields.get("code", "unknown")), str(fields.get("detail", "no detail was given")))


def _model_version(answer: Mapping[str, Any]) -> str:
    model = answer.get("model")
    version = model.get("version") if isinstance(model, dict) else None
    if not isinstance(version, str):
        raise BadAnswer("The response does not name its model version")
    return version


def _vector(values: object, length: int) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) != length:
        raise BadAnswer(f"{length} completions were sent; a row of the response has another length")
    return tuple(_finite(value, "A number of the comparison") for value in values)


def _check_named(values: object, name: str) -> None:
    if not isinstance(values, dict) or not values:
        raise BadAnswer(f"{name} are not an object with a number for each output")
    for value in values.values():
        _finite(value, f"One of {name[0].lower()}{name[1:]}")


def _check_members(result: Mapping[str, Any], name: str) -> None:
    members = result["reward_members"]
    if not isinstance(members, list) or not members:
        raise BadAnswer(f"The reward_members of {name} are not a list of numbers")
    for value in (*members, result.get("reward_std")):
        _finite(value, f"A member of the ensemble of {name}, or their deviation,")


def _check_steps(result: Mapping[str, Any], index: int) -> None:
    rewards, outputs = result.get("step_rewards", []), result.get("step_outputs", [])
    if not isinstance(rewards, list) or not isinstance(outputs, list):
        raise BadAnswer(f"The steps of result {index} are not a list")
    for reward in rewards:
        _finite(reward, f"A step reward of result {index}")
    for values in outputs:
        _check_named(values, f"The step outputs of result {index}")


def _finite(value: object, name: str) -> float:
    # A bool is an int to Python but not a reward; an int too large for a float is not finite here.
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise BadAnswer(f"{name} is not a finite number")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")
