"""The exceptions that the client raises, and the root that it shares with the service.

    RewardServiceError
    └── ClientError                       raised by the client inside the caller's process
        ├── InvalidArgument               an argument is wrong, and nothing was sent; also a ValueError
        ├── RequestRejected               the service refused the request (4xx)
        ├── ItemsFailed                   some items have no reward; carries them and the rewards of the others
        ├── RewardMissing                 several rewards came and no weights are known, where one reward is needed
        ├── BadAnswer                     the response violates the protocol
        ├── ReferenceMismatch             the KL reference is not the checkpoint that the model was initialised from
        └── NoAnswer                      no complete response; carries url, reason and attempts
            ├── ServiceUnavailable        all attempts ended in a 5xx or a broken connection
            │   └── ServiceUnreachable    no connection to it ever succeeded: wrong URL, or it does not run
            └── ClientDeadlineExceeded    the caller's own deadline passed

Messages give sizes, limits and positions, never the text of a user.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reward_client.answers import ScoredItem


class RewardServiceError(Exception):
    """The root of all exceptions that this project raises on purpose."""


class ClientError(RewardServiceError):
    """Raised by the client inside the caller's process."""


class InvalidArgument(ClientError, ValueError):
    """An argument of the caller is wrong; nothing was sent. The message says what is wanted."""


class RequestRejected(ClientError):
    """The service refused the request (4xx). ``problem`` is the RFC 9457 body, or empty if there was none."""

    def __init__(self, status: int, problem: Mapping[str, object], url: str = "") -> None:
        asked = f"{url} answered " if url else ""
        if "code" in problem:
            reason = f"{problem['code']}: {problem.get('detail', 'no detail was given')}"
        else:
            reason = "without a problem document; a proxy may have answered instead of the service"
        super().__init__(f"{asked}{status} {reason}")
        self.status = status
        self.problem = dict(problem)
        self.url = url

    def __reduce__(self) -> tuple[type[RequestRejected], tuple[int, Mapping[str, object], str]]:
        return type(self), (self.status, self.problem, self.url)


@dataclass(frozen=True, slots=True)
class ItemFailure:
    """An item without a reward: its index in the caller's list, and the reason."""

    index: int
    code: str
    detail: str


class ItemsFailed(ClientError):
    """Some items have no reward.

    ``rewards`` holds the others in input order, with None for the failed ones; ``items`` holds them with their
    diagnostics in the same way.
    """

    def __init__(
        self,
        failures: Sequence[ItemFailure],
        rewards: Sequence[float | None],
        items: Sequence[ScoredItem | None] = (),
    ) -> None:
        first = failures[0]
        super().__init__(
            f"{len(failures)} of {len(rewards)} items have no reward; "
            f"the first is item {first.index}: {first.code}: {first.detail}"
        )
        self.failures = tuple(failures)
        self.rewards = tuple(rewards)
        self.items = tuple(items)

    def __reduce__(self) -> tuple[type[ItemsFailed], tuple[object, ...]]:
        return type(self), (self.failures, self.rewards, self.items)


class RewardMissing(ClientError):
    """One reward is needed, but the model gives several and neither the call nor the service has weights of them."""

    def __init__(self, rewards: Iterable[str]) -> None:
        self.names = tuple(rewards)
        """Names of the rewards that the model gives."""
        super().__init__(
            f"The model gives the rewards {', '.join(self.names)} and no weighted sum of them: pass weights, or set "
            "model.reward_weights of the service"
        )

    def __reduce__(self) -> tuple[type[RewardMissing], tuple[tuple[str, ...]]]:
        return type(self), (self.names,)


class BadAnswer(ClientError):
    """The response violates the protocol: wrong count, wrong order, no finite reward, not JSON."""

    url: str = ""
    """What was asked; empty where the answer was read without asking."""


class ReferenceMismatch(ClientError):
    """The caller requires that the reward model was initialised from its KL reference, which is false or unknown."""


class NoAnswer(ClientError):
    """The common part of the two ways in which a call ends without an answer; the last cause is chained."""

    def __init__(self, message: str, *, url: str = "", reason: str = "", attempts: int = 0) -> None:
        super().__init__(message)
        self.url = url
        """The root URL of the service."""
        self.reason = reason
        """Why the last attempt failed; empty if none had ended."""
        self.attempts = attempts
        """Attempts that had failed, over all requests of the call."""


class ServiceUnavailable(NoAnswer):
    """All attempts ended in a 5xx or a broken connection."""


class ServiceUnreachable(ServiceUnavailable):
    """No connection to the service succeeded within ``wait_for_start_s``: a wrong URL, or it does not run (yet)."""


class ClientDeadlineExceeded(NoAnswer):
    """The caller's deadline passed before a complete response had arrived."""
