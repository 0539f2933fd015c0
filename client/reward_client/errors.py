"""The exceptions that the client raises, and the root that it shares with the service.

    RewardServiceError
    └── ClientError                       raised by our client inside the caller's process
        ├── RequestRejected               the service refused the request for good (4xx)
        ├── ItemsFailed                   some items have no reward; carries them and the rewards of the others
        ├── BadAnswer                     the answer is not what the protocol promises
        ├── ReferenceMismatch             the KL reference is not the checkpoint that the model was initialised from
        ├── ServiceUnavailable            5xx or broken connections until the tries were spent
        └── ClientDeadlineExceeded        the caller's own deadline passed

Messages give sizes, limits and positions, never the text of a user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class RewardServiceError(Exception):
    """The root: catch this to catch everything that this project raises on purpose."""


class ClientError(RewardServiceError):
    """Raised by our client inside the caller's process."""


class RequestRejected(ClientError):
    """The service refused the request for good. ``problem`` is the RFC 9457 body, or empty if there was none."""

    def __init__(self, status: int, problem: Mapping[str, object]) -> None:
        super().__init__(f"{status} {problem.get('code', 'unknown')}: {problem.get('detail', 'no detail was given')}")
        self.status = status
        self.problem = dict(problem)


@dataclass(frozen=True, slots=True)
class ItemFailure:
    """An item without a reward: its place in the caller's list, and why."""

    index: int
    code: str
    detail: str


class ItemsFailed(ClientError):
    """Some items have no reward. ``rewards`` holds the others in input order, with None at the failed places."""

    def __init__(self, failures: Sequence[ItemFailure], rewards: Sequence[float | None]) -> None:
        first = failures[0]
        super().__init__(
            f"{len(failures)} of {len(rewards)} items have no reward; "
            f"the first is item {first.index}: {first.code}: {first.detail}"
        )
        self.failures = tuple(failures)
        self.rewards = tuple(rewards)


class BadAnswer(ClientError):
    """The answer is not what the protocol promises: wrong count, wrong order, no finite reward, not JSON."""


class ReferenceMismatch(ClientError):
    """The caller requires its KL reference to be what the reward model was initialised from, and that is not shown."""


class ServiceUnavailable(ClientError):
    """5xx or broken connections until the tries were spent; the cause is chained."""


class ClientDeadlineExceeded(ClientError):
    """The caller's own deadline passed before a whole answer had come."""
