"""The tree of exceptions. Each class has an HTTP status and a code on the wire; its branch defines who can act on it.

    RewardServiceError
    ├── RequestRefused                    the caller can act on it; nothing was computed
    │   ├── MalformedBody          400    the body is not JSON, not UTF-8, or holds NaN
    │   ├── Unauthenticated        401    no API key, or one that is not known
    │   ├── Forbidden              403    the key's scope does not cover the route
    │   ├── RouteNotFound          404
    │   ├── RunNotFound            404    no monitor has items of that training run
    │   ├── ModelNotFound          404    another model is named, and names are strict
    │   ├── MethodNotAllowed       405
    │   ├── BodyTooSlow            408    the body does not arrive in time
    │   ├── BodyTooLarge           413    more bytes than one request may have
    │   ├── TooManyItems           413    more items than one request may have
    │   ├── ItemTooLong            413    more characters than one item may have
    │   ├── UnsupportedMediaType   415    a Content-Type or Content-Encoding that is not supported
    │   ├── InvalidRequest         422    a field is missing, unknown, of the wrong type or out of range
    │   ├── CompletionNotRendered  422    the chat template leaves out a part of the completion
    │   ├── WeightsMissing         422    the model has several outputs, and nothing says how they make one reward
    │   ├── SequenceTooLong        422    more tokens than the model's limit, and truncation cannot help
    │   └── RetryLater                    no room for it now; carries retry_after_s
    │       ├── QuotaExceeded      429    the items per minute of the API key are used up
    │       └── Overloaded         503    the queue is full
    ├── ScoringFailed                     the service fails on it, or cannot accept it now
    │   ├── ClientGone             499    the client disconnected; for logs and metrics only
    │   ├── EngineFailed           500    the forward pass raised on this item
    │   │   └── EngineOutOfMemory  500    the device does not have enough memory for it, even alone
    │   ├── NonFiniteReward        500    the model returned NaN or infinity
    │   ├── OutputMismatch         500    the numbers of rewards and of sequences differ
    │   ├── InternalError          500    a bug in the service; the details are in the log only
    │   ├── EngineUnavailable      503    the engine thread has died; the replica must be replaced
    │   ├── NotReady               503    still loading or warming up
    │   ├── Draining               503    shutting down; another replica will answer
    │   └── DeadlineExceeded       504    the answer would come too late
    ├── StartupError                      the process exits with one sentence; never sent over HTTP
    │   ├── SettingsError                 a setting is unknown, malformed or contradicts another
    │   ├── CheckpointError               the checkpoint is invalid or cannot be read
    │   ├── CalibrationError              a calibration cannot be read, or cannot be fitted to the data
    │   ├── DatasetError                  a data file cannot be read, or a row is not what the command needs
    │   │   └── UnusableRow               a row without a usable completion; such rows are left out and counted
    │   ├── OutputError                   an output exists already, cannot be written, or the disk is full
    │   ├── JobError                      a scoring job cannot go on, such as after too many rows with errors
    │   ├── ParityError                   no forward path agrees with plain transformers
    │   ├── InvarianceError               batch-invariant rewards are requested, and no forward path gives them
    │   ├── TrainingError                 training cannot continue, such as after a loss that is not finite
    │   ├── ServerStartError              Ray or the HTTP server did not start
    │   │   └── RayStartError             for a reason that may not exist at the next try
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
    """An error that can be sent over HTTP as an RFC 9457 problem.

    ``status``: HTTP status. ``code``: the stable identifier that programs compare. ``title``: the stable sentence for
    people. ``retryable``: whether the same request may succeed later, unchanged.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "The service failed"
    retryable: ClassVar[bool] = True

    @property
    def detail(self) -> str:
        """Description of this occurrence, in sizes, limits and positions."""
        return str(self)


class RequestRefused(HttpError):
    """The caller can act on it; nothing was computed."""

    retryable = False


class MalformedBody(RequestRefused):
    """The body is not JSON, not UTF-8, or holds a number that JSON does not have."""

    status, code, title = 400, "malformed_body", "The body cannot be parsed"


class Unauthenticated(RequestRefused):
    """The request has no API key, or one that is not known."""

    status, code, title = 401, "unauthenticated", "An API key is needed"


class Forbidden(RequestRefused):
    """The scope of the API key does not cover the route."""

    status, code, title = 403, "forbidden", "The API key may not use this route"


class RouteNotFound(RequestRefused):
    """No such route."""

    status, code, title = 404, "not_found", "No such route"


class RunNotFound(RequestRefused):
    """No monitor has items of that training run."""

    status, code, title = 404, "run_not_found", "No such run"


class ModelNotFound(RequestRefused):
    """The request names another model than the served one, and the settings say that names are strict."""

    status, code, title = 404, "model_not_found", "No such model"


class MethodNotAllowed(RequestRefused):
    """The route exists, but not for this method."""

    status, code, title = 405, "method_not_allowed", "The route does not support this method"


class BodyTooSlow(RequestRefused):
    """The bytes of the body do not arrive in time; the connection held a place that others wait for."""

    status, code, title, retryable = 408, "body_too_slow", "The body arrives too slowly", True


class BodyTooLarge(RequestRefused):
    """The body has more bytes than the limit."""

    status, code, title = 413, "body_too_large", "The body is too large"


class TooManyItems(RequestRefused):
    """The request has more items than the limit."""

    status, code, title = 413, "too_many_items", "The request has too many items"


class ItemTooLong(RequestRefused):
    """An item has more characters than the limit; checked before tokenization, which is the expensive step."""

    status, code, title = 413, "item_too_long", "An item has too many characters"


class UnsupportedMediaType(RequestRefused):
    """The Content-Type or Content-Encoding is not supported."""

    status, code, title = 415, "unsupported_media_type", "The media type is not supported"


@dataclass(frozen=True, slots=True)
class Violation:
    """One violation in a request: an RFC 6901 pointer to the value, and what is wrong with it."""

    pointer: str
    code: str


class InvalidRequest(RequestRefused):
    """A field is missing, unknown, of the wrong type or out of range."""

    status, code, title = 422, "invalid_request", "The request is not valid"

    def __init__(self, detail: str, violations: Sequence[Violation] = ()) -> None:
        super().__init__(detail)
        self.violations = tuple(violations)

    def __reduce__(self) -> tuple[type[InvalidRequest], tuple[str, Sequence[Violation]]]:
        return type(self), (self.detail, self.violations)


class CompletionNotRendered(RequestRefused):
    """The chat template leaves out a part of the completion, so its reward would be that of another text."""

    status, code = 422, "completion_not_rendered"
    title = "The chat template leaves out a part of the completion"


class WeightsMissing(RequestRefused):
    """The model has several outputs, and no weights of them are known, so there is no reward to answer with."""

    status, code, title = 422, "weights_missing", "The model has several outputs and no weights of them are known"


class SequenceTooLong(RequestRefused):
    """The item has more tokens than the model's limit; an item error on the native route."""

    status, code, title = 422, "sequence_too_long", "The item has too many tokens"


class RetryLater(RequestRefused):
    """There is no room for the request now. ``retry_after_s``: estimated seconds until there is."""

    retryable = True

    def __init__(self, detail: str, retry_after_s: float) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[RetryLater], tuple[str, float]]:
        return type(self), (self.detail, self.retry_after_s)


class QuotaExceeded(RetryLater):
    """The items per minute of the API key are used up."""

    status, code, title = 429, "quota_exceeded", "The quota of the API key is used up"


class Overloaded(RetryLater):
    """The queue is full; the seconds are computed from its length."""

    status, code, title = 503, "overloaded", "The service is overloaded"


class ScoringFailed(HttpError):
    """The service fails on the request or the item, or cannot accept it now."""


class ClientGone(ScoringFailed):
    """The client disconnected before the answer, so it does not receive this error."""

    status, code, title = 499, "client_gone", "The client has disconnected"


class EngineFailed(ScoringFailed):
    """The forward pass raised on this item, also when it ran alone."""

    status, code, title = 500, "engine_failed", "The forward pass failed on this item"


class EngineOutOfMemory(EngineFailed):
    """The device does not have enough memory for the batch; as an item's error: not even for that item alone."""

    code, title = "engine_out_of_memory", "The device does not have enough memory for this item"


class NonFiniteReward(ScoringFailed):
    """The model returned NaN or infinity, which is never sent as a reward."""

    status, code, title = 500, "non_finite_reward", "The model returned no finite reward"


class OutputMismatch(ScoringFailed):
    """The number of rewards that the engine returned differs from the number of sequences."""

    status, code, title = 500, "output_mismatch", "The engine returned the wrong number of rewards"


class InternalError(ScoringFailed):
    """A bug in the service. The details are in the log; the response has only the request id."""


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
    """The answer would come too late. The status is 504 because some trainers treat every 4xx as fatal."""

    status, code, title = 504, "deadline_exceeded", "The deadline has passed"


class StartupError(RewardServiceError):
    """The process exits with this message."""


class SettingsError(StartupError):
    """A setting is unknown, malformed or contradicts another."""


class CheckpointError(StartupError):
    """The checkpoint is invalid or cannot be read; the message contains the remedy."""


class CalibrationError(StartupError):
    """A calibration cannot be read, or cannot be fitted to the data; the service also starts without one."""


class DatasetError(StartupError):
    """A data file cannot be read, or a row is invalid; the message names file and line, never the text."""


class OutputError(StartupError):
    """An output exists already, cannot be written, or the disk is full; nothing is left under its name."""


class UnusableRow(DatasetError):
    """A row has an accepted form, but no completion that can be scored; such rows are left out and counted.

    ``reason``: a clause without sizes and positions, so that equal reasons can be counted.
    """

    def __init__(self, location: str, reason: str) -> None:
        super().__init__(f"{location}: {reason}.")
        self.location, self.reason = location, reason

    def __reduce__(self) -> tuple[type[UnusableRow], tuple[str, str]]:
        return type(self), (self.location, self.reason)


class JobError(StartupError):
    """A scoring job cannot go on or be resumed; what is finished can be resumed unless the message says otherwise."""


class ParityError(StartupError):
    """No forward path agrees with plain transformers on this checkpoint."""


class InvarianceError(StartupError):
    """Batch-invariant rewards are requested, and on this machine no forward path gives this checkpoint such rewards."""


class TrainingError(StartupError):
    """Training cannot continue; the message contains the remedy."""


class ServerStartError(StartupError):
    """Ray or the HTTP server did not start."""


class RayStartError(ServerStartError):
    """Ray did not start, for a reason of the machine: time, memory, a port. The next try may succeed."""


class WarmUpFailed(StartupError):
    """The largest legal batch does not run on this device."""
