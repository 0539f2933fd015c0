"""The exceptions that the client raises, and the root that it shares with the service.

    RewardServiceError
    └── ClientError                       raised by the client inside the caller's process
        ├── RequestRejected               the service refused the request (4xx)
        ├── ItemsFailed                   some items have no reward; carries them and the rewards of the others
        ├── BadAnswer                     the response violates the protocol
        ├── ReferenceMismatch             the KL reference is not the checkpoint that the model was initialised from
        ├── ServiceUnavailable            all attempts ended in a 5xx or a broken connection
        └── ClientDeadlineExceeded        the caller's own deadline passed

Messages give sizes, limits and positions, never the text of a user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class RewardServiceError(Exception):
    """The root of all exceptions that this project raises on purpose."""


class ClientError(RewardServiceError):
    """Raised by the client inside the caller's process."""


class RequestRejected(ClientError):
    """The service refused the request (4xx). ``problem`` is the RFC 9457 body, or empty if there was none."""

    def __init__(self, status: int, problem: Mapping[str, object]) -> None:
        super().__init__(f"{status} {problem.get('code', 'unknown')}: {problem.get('detail', 'no detail was given')}")
        self.status = status
        self.problem = dict(problem)

    def __reduce__(self) -> tuple[type[RequestRejected], tuple[int, Mapping[str, object]]]:
        return type(self), (self.status, self.problem)


@dataclass(frozen=True, slots=True)
class ItemFailure:
    """An item without a reward: its index in the caller's list, and the reason."""

    index: int
    code: str
    detail: str


class ItemsFailed(ClientError):
    """Some items have no reward. ``rewards`` holds the others in input order, with None for the failed ones."""

    def __init__(self, failures: Sequence[ItemFailure], rewards: Sequence[float | None]) -> None:
        first = failures[0]
        super().__init__(
            f"{len(failures)} of {len(rewards)} items have no reward; "
            f"the first is item {first.index}: {first.code}: {first.detail}"
        )
        self.failures = tuple(failures)
        self.rewards = tuple(rewards)

    def __reduce__(self) -> tuple[type[ItemsFailed], tuple[Sequence[ItemFailure], Sequence[float | None]]]:
        return type(self), (self.failures, self.rewards)


class BadAnswer(ClientError):
    """The response violates the protocol: wrong count, wrong order, no finite reward, not JSON."""


class ReferenceMismatch(ClientError):
    """The caller requires that the reward model was initialised from its KL reference, which is false or unknown."""


class ServiceUnavailable(ClientError):
    """All attempts ended in a 5xx or a broken connection; the cause is chained."""


class ClientDeadlineExceeded(ClientError):
    """The caller's deadline passed before a complete response had arrived."""
