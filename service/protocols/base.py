"""What a compatibility protocol consists of: routes, how a body becomes items, how Scores become a body.

Pure: it depends neither on a web framework nor on an engine. On these routes an answer carries a reward for every item,
or no reward at all, because none of their clients can read an error in the place of one reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import msgspec
from reward_client.options import DiagnosticsLevel, Truncation

from service.diagnostics.item_state import Outcome
from service.errors import (
    HttpError,
    ItemTooLong,
    ModelNotFound,
    NonFiniteReward,
    SequenceTooLong,
    TooManyItems,
)
from service.protocols.problem import problem
from service.protocols.reward_weights import weights_missing
from service.protocols.violations import invalid
from service.records import Encoding, Item, ModelIdentity, Score, ScoreRequest, Usage
from service.settings import LimitSettings, ProtocolName, ProtocolSettings

Activation: TypeAlias = Literal["none", "sigmoid"]
"""What was applied to the rewards of an answer; header ``X-Reward-Activation``."""

Rendering: TypeAlias = Literal["chat", "concat"]
"""``chat``: as the model renders a plain prompt; ``concat``: rendered by the caller already."""

UNKNOWN = -1.0
"""In answers that must have a number in each place: the value is not known. No known value is negative."""

AS_IT_IS = Encoding(template="concat", add_bos=False)
"""The text of the client gets no special tokens."""

AS_THE_TOKENIZER = Encoding(template="concat")
"""The text of the client gets the special tokens that the tokenizer adds, but no second BOS."""


@dataclass(frozen=True, slots=True)
class WireRequest:
    """The parts of an HTTP request that a protocol reads."""

    body: bytes = field(repr=False, default=b"")
    path: Mapping[str, str] = field(default_factory=dict)
    """Parameters in the path."""
    query: Mapping[str, str] = field(default_factory=dict)
    """Parameters after the question mark."""
    headers: Mapping[str, str] = field(repr=False, default_factory=dict)
    """Headers; names in lower case."""


@dataclass(frozen=True, slots=True)
class ProtocolContext:
    """The facts about the served model and its settings that a protocol needs."""

    model: ModelIdentity
    max_input_tokens: int
    limits: LimitSettings
    truncation: Truncation
    """Default for items over the token limit."""
    is_calibrated: bool
    """Whether OOD p-values are known."""
    special_tokens: frozenset[str]
    """The tokenizer's special tokens, as text."""
    settings: ProtocolSettings
    unadded_bos: str | None = None
    """The BOS that the chat template writes and the tokenizer does not add; None: there is none."""
    outputs: tuple[str, ...] = ("reward",)
    """Names of the numbers that the model gives for an item."""
    has_reward: bool = True
    """Whether they make one reward: there is one, or weights of them are known."""
    reads_markers: bool = False
    """Whether the model rewards steps, each at a marker token: then every item is read at its markers."""
    gives_probabilities: bool = False
    """Whether the reward is the probability of one of several outputs."""

    @property
    def item_outputs(self) -> tuple[str, ...]:
        """Names of the numbers of an item; of a model that rewards steps that is the aggregate of its steps alone."""
        return ("reward",) if self.reads_markers else self.outputs

    @property
    def level(self) -> DiagnosticsLevel:
        """Level of diagnostics for protocols whose answers have OOD p-values."""
        return "full" if self.is_calibrated else "basic"

    def check_count(self, num_items: int) -> None:
        """Return if a request may have so many items; called before they are made.

        Raises:
            TooManyItems: over the limit.
        """
        limit = self.limits.max_request_items
        if num_items > limit:
            raise TooManyItems(f"The request has {num_items} items; the limit is {limit}")

    def truncating(self, encoding: Encoding) -> Encoding:
        """The encoding with the truncation that the settings give to these routes."""
        return replace(encoding, truncation=self.truncation)


@dataclass(frozen=True, slots=True)
class Call:
    """A decoded request of a protocol."""

    items: tuple[Item, ...]
    encoding: Encoding
    level: DiagnosticsLevel = "basic"
    model: str | None = None
    """Name of the model in the request."""
    max_tokens: int | None = None
    """Longest item that the request allows, in tokens; a longer one is refused."""
    activation: Activation = "none"
    softmax: bool = False
    """Whether the outputs at steps are given as probabilities."""
    rendering: Rendering | None = None
    """How a prompt whose form the route had to decide about is taken; None: the route had nothing to decide."""
    bos_added: frozenset[int] = frozenset()
    """Indices of the items to which the route added the BOS that the client had cut."""
    wire: Any = field(default=None, repr=False)
    """What the encoding of the answer needs of the request."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an answer is encoded from: a Score with a finite reward for each item, in input order."""

    scores: tuple[Score, ...]
    usage: Usage
    model: ModelIdentity
    request_id: str
    created_s: int
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class ScoringRoute:
    """A route that computes rewards, with POST."""

    path: str
    summary: str
    decode: Callable[[WireRequest, ProtocolContext], Call]
    """Raises MalformedBody or RequestRefused."""
    encode: Callable[[Call, Answer], bytes]
    request_schema: type[msgspec.Struct]
    answer_schema: Mapping[str, Any] = field(hash=False)
    """JSON schema of the answer."""
    aliases: tuple[str, ...] = ()
    recognises: Callable[[bytes], bool] | None = None
    """On the native scoring route: whether a body is of this protocol. None: the path is the protocol's own."""
    allows_empty: bool = False
    """Whether a request without items is answered with none."""
    answers_vectors: bool = False
    """Whether an answer has every output of the model and needs no reward."""


@dataclass(frozen=True, slots=True)
class ReadingRoute:
    """A route that describes the service, with GET."""

    path: str
    summary: str
    encode: Callable[[WireRequest, ProtocolContext], bytes]
    needs_ready: bool = False
    """Whether it is refused with 503 while no requests are accepted."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """The HTTP interface of another server, or that some client expects."""

    name: ProtocolName
    deadline_s: float
    """Time to an answer; less than the time after which its clients give up."""
    scoring: tuple[ScoringRoute, ...]
    reading: tuple[ReadingRoute, ...] = ()
    waits_for_room: bool = False
    """Whether its requests wait for room in the queue, because its clients do not repeat what is refused."""
    takes_any_media_type: bool = False
    """Whether bodies need not be declared as JSON."""
    error_members: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda _: {}
    """Members that the protocol adds to a problem."""

    def encode_error(self, error: HttpError, request_id: str) -> bytes:
        """Return the body of an answer without rewards."""
        members = problem(error, request_id)
        return msgspec.json.encode(members | dict(self.error_members(members)))


def score_request(call: Call, protocol: Protocol, context: ProtocolContext, route: ScoringRoute) -> ScoreRequest:
    """Return what the scorer gets for a call.

    Raises:
        ModelNotFound: the request names another model and ``strict_model_names`` is set.
        WeightsMissing: the model has several outputs without weights, and the route answers with one reward.
        InvalidRequest: there are no items, and the route needs one.
        TooManyItems, ItemTooLong: over a limit of the service.
    """
    check_model(call.model, context)
    if not context.has_reward and (context.reads_markers or not route.answers_vectors):
        raise weights_missing(context.outputs, "")
    limits = context.limits
    if not call.items and not route.allows_empty:
        raise invalid("", "too_few", "The request has 0 items; it needs at least 1")
    context.check_count(len(call.items))
    for index, item in enumerate(call.items):
        if item.content.num_chars > limits.max_item_chars:
            raise ItemTooLong(
                f"Item {index} has {item.content.num_chars} characters; the limit is {limits.max_item_chars}"
            )
    timeout_s = min(protocol.deadline_s, limits.deadline_s)
    return ScoreRequest(call.items, call.encoding, call.level, timeout_s, waits_for_room=protocol.waits_for_room)


def check_model(name: str | None, context: ProtocolContext) -> None:
    """Refuse the name of another model where ``strict_model_names`` is set; otherwise any name is the served model's.

    Raises:
        ModelNotFound: the names differ.
    """
    if name is not None and context.settings.strict_model_names and name != context.model.name:
        raise ModelNotFound("The request names a model that is not served; /v1/model has the name of the served one")


def scores_of(call: Call, outcomes: Sequence[Outcome]) -> tuple[Score, ...]:
    """Return the Score of every item.

    Raises:
        HttpError: the error of the first item without a reward.
        NonFiniteReward: a reward is NaN or infinite, which the scorer should have turned into an error.
        SequenceTooLong: an item has more tokens than the request allows.
    """
    scores = []
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, HttpError):
            raise outcome
        if not all(map(math.isfinite, outputs_of(outcome))):
            raise NonFiniteReward(f"Item {index} has no finite reward")
        if call.max_tokens is not None and num_tokens(outcome) > call.max_tokens:
            raise SequenceTooLong(
                f"Item {index} has {num_tokens(outcome):,} tokens; the request allows {call.max_tokens:,}, and no text "
                "is cut to fewer than the model reads."
            )
        scores.append(outcome)
    return tuple(scores)


def reward_of(score: Score) -> float:
    """The reward of an item on a route that needs one; `score_request` has refused models without."""
    assert score.reward is not None  # noqa: S101
    return score.reward


def outputs_of(score: Score) -> tuple[float, ...]:
    """All numbers of an item: the outputs of a model with several, else the reward alone."""
    return score.outputs or (reward_of(score),)


def num_tokens(score: Score) -> int:
    """Tokens that the model read of an item that was scored at level ``basic`` or ``full``."""
    assert score.length is not None  # noqa: S101 - every level of these routes includes the length
    return score.length.scored_tokens


def is_truncated(score: Score) -> bool:
    """Whether the model read less than the caller sent."""
    return score.length is not None and score.length.truncated


def ood_p(score: Score) -> float:
    """The conformal p-value of an item; UNKNOWN where it has none."""
    return UNKNOWN if score.ood is None else score.ood.p_value


def activation_for(flags: Mapping[str, bool | None], settings: ProtocolSettings) -> Activation:
    """Return what is applied to the rewards, given the flags of a request that ask for a sigmoid.

    Args:
        flags: by the name of the field; None: not in the request.
        settings: say whether a sigmoid may be asked for.

    Raises:
        InvalidRequest: a sigmoid is asked for and the settings refuse it.
    """
    asked = next((name for name, value in flags.items() if value), None)
    if asked is None:
        return "none"
    if settings.activation == "refuse":
        raise invalid(
            f"/{asked}",
            "activation_refused",
            "A reward is the raw output of the scalar head; the setting protocols.activation allows a sigmoid",
        )
    return "sigmoid"


def sigmoid(reward: float) -> float:
    """1 / (1 + exp(-reward)), without overflow."""
    if reward >= 0:
        return 1.0 / (1.0 + math.exp(-reward))
    odds = math.exp(reward)
    return odds / (1.0 + odds)


def softmax(logits: Sequence[float]) -> list[float]:
    """The probabilities of logits; of numbers up to zero, so that no exponential overflows."""
    largest = max(logits)
    odds = [math.exp(logit - largest) for logit in logits]
    return [one / math.fsum(odds) for one in odds]
