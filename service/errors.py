"""The one tree of exceptions. Each class knows its HTTP status, its code on the wire and who can act on it.

    RewardServiceError
    ├── RequestRefused                    the caller can act on it; nothing was computed
    │   ├── MalformedBody          400    the body is not JSON, not UTF-8, or holds NaN
    │   ├── RouteNotFound          404
    │   ├── RunNotFound            404    no items of that training run are remembered
    │   ├── MethodNotAllowed       405
    │   ├── BodyTooLarge           413    more bytes than one request may have
    │   ├── TooManyItems           413    more items than one request may have
    │   ├── ItemTooLong            413    more characters than one item may have
    │   ├── UnsupportedMediaType   415    a Content-Type or Content-Encoding that we do not read
    │   ├── InvalidRequest         422    a field is missing, unknown, of the wrong type or out of range
    │   ├── SequenceTooLong        422    more tokens than the model takes, and truncation cannot help
    │   └── Overloaded             503    the line is full; carries retry_after_s
    ├── ScoringFailed                     we accepted it and failed, or cannot accept it now
    │   ├── ClientGone             499    the caller has left; for logs and metrics only
    │   ├── EngineFailed           500    the forward pass raised on this item
    │   │   └── EngineOutOfMemory  500    the device had no room for it, even alone
    │   ├── NonFiniteReward        500    the model answered NaN or infinity
    │   ├── OutputMismatch         500    the engine returned another number of rewards than it was given
    │   ├── InternalError          500    a bug of ours; details are in the log only
    │   ├── EngineUnavailable      503    the engine thread has died; the replica must be replaced
    │   ├── NotReady               503    still loading or warming up
    │   ├── Draining               503    shutting down; another replica will answer
    │   └── DeadlineExceeded       504    the answer would come too late
    ├── StartupError                      the process ends with one clear sentence; never crosses HTTP
    │   ├── SettingsError                 a setting is unknown, malformed or contradicts another
    │   ├── CheckpointError               the checkpoint cannot be trusted or read
    │   ├── CalibrationError              a calibration cannot be read, or cannot be made of the data
    │   ├── DatasetError                  a data file cannot be read, or a row is not what the command needs
    │   ├── ParityError                   no forward path agrees with plain transformers
    │   ├── ServerStartError              Ray or the HTTP server did not come up
    │   └── WarmUpFailed                  the largest legal batch does not run on this device
    └── ClientError                       raised by the client in the caller's process; see reward_client.errors

Messages give sizes, limits and positions, never the text of a user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from reward_client.errors import RewardServiceError


class HttpError(RewardServiceError):
    """An error that can cross HTTP as an RFC 9457 problem.

    ``status``: HTTP status. ``code``: the stable word that programs compare. ``title``: the stable sentence for people.
    ``retryable``: whether the same request may succeed later, unchanged.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "The service failed"
    retryable: ClassVar[bool] = True

    @property
    def detail(self) -> str:
        """What happened this time, in sizes, limits and positions."""
        return str(self)


class RequestRefused(HttpError):
    """The caller can act on it; nothing was computed."""

    retryable = False


class MalformedBody(RequestRefused):
    """The body is not JSON, not UTF-8, or holds a number that JSON does not have."""

    status, code, title = 400, "malformed_body", "The body does not parse"


class RouteNotFound(RequestRefused):
    """No such route."""

    status, code, title = 404, "not_found", "No such route"


class RunNotFound(RequestRefused):
    """No items of that training run are remembered."""

    status, code, title = 404, "run_not_found", "No such run"


class MethodNotAllowed(RequestRefused):
    """The route exists, but not for this method."""

    status, code, title = 405, "method_not_allowed", "The route does not take this method"


class BodyTooLarge(RequestRefused):
    """The body has more bytes than the limit."""

    status, code, title = 413, "body_too_large", "The body is too large"


class TooManyItems(RequestRefused):
    """The request has more items than the limit."""

    status, code, title = 413, "too_many_items", "The request has too many items"


class ItemTooLong(RequestRefused):
    """An item has more characters than the limit; checked before tokenizing, which is what costs."""

    status, code, title = 413, "item_too_long", "An item has too many characters"


class UnsupportedMediaType(RequestRefused):
    """The Content-Type or Content-Encoding is one that we do not read."""

    status, code, title = 415, "unsupported_media_type", "The media type is not supported"


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule of a request: an RFC 6901 pointer to the place, and what is wrong there."""

    pointer: str
    code: str


class InvalidRequest(RequestRefused):
    """A field is missing, unknown, of the wrong type or out of range."""

    status, code, title = 422, "invalid_request", "The request is not valid"

    def __init__(self, detail: str, violations: Sequence[Violation] = ()) -> None:
        super().__init__(detail)
        self.violations = tuple(violations)


class SequenceTooLong(RequestRefused):
    """More tokens than the model takes; an item error on the native route."""

    status, code, title = 422, "sequence_too_long", "The item has too many tokens"


class Overloaded(RequestRefused):
    """The line is full. ``retry_after_s``: seconds until there should be room, computed from the queue."""

    status, code, title, retryable = 503, "overloaded", "The service is overloaded", True

    def __init__(self, detail: str, retry_after_s: float) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class ScoringFailed(HttpError):
    """We accepted it and failed, or cannot accept it now."""


class ClientGone(ScoringFailed):
    """The caller has left before the answer; nobody reads this."""

    status, code, title = 499, "client_gone", "The client has gone"


class EngineFailed(ScoringFailed):
    """The forward pass raised on this item, also when it ran alone."""

    status, code, title = 500, "engine_failed", "The forward pass failed on this item"


class EngineOutOfMemory(EngineFailed):
    """The device had no room for the batch; for an item: not even alone."""

    code, title = "engine_out_of_memory", "The device has no room for this item"


class NonFiniteReward(ScoringFailed):
    """The model answered NaN or infinity. Never passed on as a number."""

    status, code, title = 500, "non_finite_reward", "The model gave no finite reward"


class OutputMismatch(ScoringFailed):
    """The engine returned another number of rewards than it was given sequences."""

    status, code, title = 500, "output_mismatch", "The engine returned the wrong number of rewards"


class InternalError(ScoringFailed):
    """A bug of ours. The log has the details; the wire has the request id."""


class EngineUnavailable(ScoringFailed):
    """The engine thread has died; the replica reports itself unhealthy and will be replaced."""

    status, code, title = 503, "engine_unavailable", "The engine is not running"


class NotReady(ScoringFailed):
    """Still loading or warming up."""

    status, code, title = 503, "not_ready", "The model is not ready yet"


class Draining(ScoringFailed):
    """Shutting down; another replica will answer."""

    status, code, title = 503, "draining", "The replica is shutting down"


class DeadlineExceeded(ScoringFailed):
    """The answer would come too late. 504, because some trainers take any 4xx for fatal."""

    status, code, title = 504, "deadline_exceeded", "The deadline has passed"


class StartupError(RewardServiceError):
    """The process ends with this one sentence."""


class SettingsError(StartupError):
    """A setting is unknown, malformed or contradicts another."""


class CheckpointError(StartupError):
    """The checkpoint cannot be trusted or read; the message says what to do."""


class CalibrationError(StartupError):
    """A calibration cannot be read, or cannot be made of the data; the service starts without one all the same."""


class DatasetError(StartupError):
    """A data file cannot be read, or a row is not what the command needs; names file and line, never the text."""


class ParityError(StartupError):
    """No forward path of ours agrees with plain transformers on this checkpoint."""


class ServerStartError(StartupError):
    """Ray or the HTTP server did not come up."""


class WarmUpFailed(StartupError):
    """The largest legal batch does not run on this device."""
