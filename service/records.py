"""The records that the parts of the service exchange: plain data with a few derived values.

They depend on no tokenizer, device or protocol; only the standard library and the client's option types are imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from reward_client.options import DiagnosticsLevel, SpecialTokenText, TemplateChoice, Truncation

DEMO_MODEL = "demo"
"""``model.path`` of the demo model, in the settings and in the arguments of every command."""

MAX_PESSIMISM = 1000.0
"""Most standard deviations that ``reward_lower`` may be below the reward, so that it stays finite."""

KeyScope: TypeAlias = Literal["score", "admin"]
"""What an API key may use. ``score``: routes that score and describe the model; ``admin``: every route."""
KEY_SCOPES: tuple[KeyScope, ...] = get_args(KeyScope)

KEY_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
"""Of the name of an API key."""

Pooling: TypeAlias = Literal["hf", "last"]
"""Which token the scalar head reads. ``hf``: the rightmost that is not the pad token; ``last``: the last one."""

Activation: TypeAlias = Literal["none", "relu", "gelu", "gelu_tanh", "silu", "selu", "tanh", "sigmoid"]
"""The function after a linear layer of a head. ``gelu`` is exact, ``gelu_tanh`` its approximation."""

StepAggregate: TypeAlias = Literal["last", "min", "mean", "product"]
"""How the rewards of the steps of a text become its reward."""

BatchCost: TypeAlias = Literal["packed", "padded"]
"""How an engine computes a batch. ``packed``: without padding; ``padded``: all sequences padded to the longest."""

StatePooling: TypeAlias = Literal["last", "mean"]
"""``last``: the state of the token that the head reads; ``mean``: the mean over the completion's tokens."""

OodMode: TypeAlias = Literal["single", "group"]
"""``group``: the other completions of the item's prompt were used too; ``single``: the item alone."""

Scope: TypeAlias = Literal["pooled", "within"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""Scope of a correlation. ``pooled``: over all items; ``within``: of deviations from the means of the prompts."""

CalibrationGap: TypeAlias = Literal["missing", "inapplicable"]
"""Why an item has no calibrated diagnostics: there is no calibration, or its completion is unknown."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, in the form of chat templates."""

    role: str

    content: str | None = field(repr=False)
    """None only where the turn consists of tool calls."""

    fields: str = field(default="", repr=False)
    """Further fields (tool calls, names) as one JSON object; empty without any. JSON, so that messages are hashable."""

    @property
    def text(self) -> str:
        """The content, empty where there is none."""
        return self.content or ""

    @property
    def num_chars(self) -> int:
        """Characters of the role, the content and the further fields."""
        return len(self.role) + len(self.text) + len(self.fields)

    def as_dict(self) -> dict[str, Any]:
        """Return the turn in the form of chat templates."""
        return {"role": self.role, "content": self.content, **(json.loads(self.fields) if self.fields else {})}


Completion: TypeAlias = str | tuple[Message, ...]
"""The text of one assistant turn; or several turns, of which the first is an assistant's."""


def completion_text(completion: Completion) -> str:
    """Return a completion as one text: its string, or the contents of its assistant turns, one per line."""
    if isinstance(completion, str):
        return completion
    return "\n".join(turn.text for turn in completion if turn.role == "assistant")


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt and the completion that answers it."""

    prompt: str | tuple[Message, ...] = field(repr=False)
    """Plain text, or the turns of a conversation."""

    completion: Completion = field(repr=False)

    tools: str = field(default="", repr=False)
    """Descriptions of the tools that the assistant may call, as a JSON array; empty without tools."""

    @property
    def completion_text(self) -> str:
        """The completion as one text, see `completion_text`."""
        return completion_text(self.completion)

    def as_dict(self) -> dict[str, Any]:
        """Return the exchange in the form of an item of ``POST /v1/score``."""
        fields: dict[str, Any] = {"prompt": _as_wire(self.prompt), "completion": _as_wire(self.completion)}
        return fields | ({"tools": json.loads(self.tools)} if self.tools else {})

    @property
    def num_chars(self) -> int:
        """Characters of prompt, completion and tools together, before any template."""
        return _num_chars(self.prompt) + _num_chars(self.completion) + len(self.tools)


def _as_wire(text: str | tuple[Message, ...]) -> str | list[dict[str, Any]]:
    return text if isinstance(text, str) else [turn.as_dict() for turn in text]


def _num_chars(text: str | tuple[Message, ...]) -> int:
    return len(text) if isinstance(text, str) else sum(turn.num_chars for turn in text)


@dataclass(frozen=True, slots=True)
class TemplatedText:
    """A text that is tokenized as it is: rendered by the caller, or for a model without a chat template."""

    text: str = field(repr=False)

    @property
    def num_chars(self) -> int:
        """Characters of the text."""
        return len(self.text)


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Token ids of the served model's own tokenizer; scored unchanged."""

    ids: tuple[int, ...] = field(repr=False)

    @property
    def num_chars(self) -> int:
        """Zero: ids have no characters; their number is checked against the token limit instead."""
        return 0


Content: TypeAlias = Exchange | TemplatedText | TokenIds


StepKind: TypeAlias = Literal["texts", "marker", "turns"]
"""How an item says where its steps end. ``texts``: the completion is given as a list of steps; ``marker``: at each
marker token; ``turns``: with each assistant turn of the completion."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Where the steps of an item end, as the request says it."""

    kind: StepKind

    texts: tuple[str, ...] = field(default=(), repr=False)
    """The steps of kind ``texts``, without markers."""

    token_id: int | None = None
    """The marker token; None: the model's."""


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of a request."""

    content: Content
    """What is to be scored. With steps of kind ``texts`` its completion is these texts without markers, on lines."""

    steps: Steps | None = field(default=None, kw_only=True)
    """The steps that get rewards of their own; None: the whole text gets one."""

    id: str | int | None = None
    """The caller's name or number of the item; it is returned with the answer."""

    group: str | int | None = None
    """The caller's name of the items that answer one prompt, where the prompt alone does not identify them."""

    digest: str | None = None
    """SHA-256 of the item as it stands in the request; it is returned with the answer. None: it was not asked for."""


TemplateVariable: TypeAlias = str | int | float | bool | None
"""A value that a chat template gets beside the conversation."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How items become token sequences; set by the route and the request, never guessed from a text."""

    template: TemplateChoice | None = None
    """None: the served model's default, see ``TextRule``."""

    truncation: Truncation = "error"
    """What happens to an item that is too long."""

    add_bos: bool = True
    """Whether a text that no template renders gets the special tokens that its tokenizer adds."""

    template_variables: tuple[tuple[str, TemplateVariable], ...] = ()
    """Names and values that the chat template gets beside the conversation, in the order of their names."""

    special_tokens: SpecialTokenText | None = None
    """What becomes of special tokens that a completion's text contains; None: what the settings say."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A parsed request body."""

    items: tuple[Item, ...]
    encoding: Encoding
    diagnostics: DiagnosticsLevel

    timeout_s: float
    """Seconds from arrival after which the caller does not need an answer."""

    run_id: str | None = None
    """The training run that sends the request; each run has monitors of its own. None: it is not named."""

    waits_for_room: bool = False
    """Whether a request that finds the queue full waits for room, up to its timeout, instead of being refused."""

    weights: Mapping[str, float] | None = None
    """Weight of each output in the reward, by name; an output without one has weight 0. None: the model's own."""

    pessimism: float | None = None
    """Standard deviations that ``reward_lower`` of each result is below the reward; None: it is not asked for."""


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """What the text rule has to know about a model."""

    is_encoder: bool = False
    """Whether its head reads the first token, not the last one."""

    num_token_types: int = 0
    """Token types that it has embeddings for; 0: it reads no token types."""


PLAIN_INPUTS = ModelInputs()
"""Of a decoder without token types."""

TOKEN_TYPE_SHIFT = 32
"""In a row of an engine, the bits of an entry above these hold the token's type."""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A tokenized item."""

    token_ids: tuple[int, ...] = field(repr=False)

    num_prompt_tokens: int | None = None
    """Leading tokens that belong to the prompt, template included, after truncation.

    None where it is unknown where the prompt ends (templated text and token ids).
    """

    num_dropped: int = 0
    """Prompt tokens that truncation cut from the left."""

    completion_chars: int | None = None
    """Characters of the completion; None where it is not known as text."""

    token_types: tuple[int, ...] = field(default=(), repr=False)
    """The segment of each token (0: prompt, 1: completion), for models that read it; empty where all are 0."""

    step_positions: tuple[int, ...] = field(default=(), repr=False)
    """Indices of further tokens whose states the head reads, ascending: the last token of each step."""

    partly_rendered: bool = False
    """Whether the chat template left out a part of the completion, which the settings accept."""

    double_bos: bool = False
    """Whether it begins with two BOS tokens, which the caller sent: the service never adds a second one."""

    num_written_special: int | None = None
    """Special tokens that are written in the completion's text; None where that text is not known."""

    @property
    def row(self) -> tuple[int, ...]:
        """What an engine computes a reward from: sequences with equal rows have equal rewards.

        The token ids; where tokens have types, the type of each is in the bits from ``TOKEN_TYPE_SHIFT`` on.
        """
        if not self.token_types:
            return self.token_ids
        typed = zip(self.token_ids, self.token_types, strict=True)
        return tuple(token_id | token_type << TOKEN_TYPE_SHIFT for token_id, token_type in typed)

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads."""
        return len(self.token_ids)

    @property
    def num_completion_tokens(self) -> int | None:
        """Tokens after the prompt, template suffix included; None where it is unknown where the prompt ends."""
        return None if self.num_prompt_tokens is None else self.num_tokens - self.num_prompt_tokens

    @property
    def truncated(self) -> bool:
        """Whether the model read less than the caller sent."""
        return self.num_dropped > 0 or self.partly_rendered


@dataclass(frozen=True, slots=True)
class TextProbe:
    """A text as it is served, and as plain transformers would get it."""

    row: tuple[int, ...]
    """The row of its token sequence."""

    inputs: Mapping[str, Sequence[int]]
    """What the tokenizer's own call returns for it, by name: ``input_ids``, ``token_type_ids``."""


@dataclass(frozen=True, slots=True)
class StateTap:
    """A point of the forward pass where hidden states are read for the diagnostics."""

    layer: int
    """0: the embeddings; n: the output of the n-th block, where that of the last block is read after the final norm."""

    pooling: StatePooling
    """``mean`` is over all tokens where it is unknown where the prompt ends."""


@dataclass(frozen=True, slots=True)
class LengthReport:
    """The length block of an item's diagnostics; field names are those of the response."""

    prompt_tokens: int | None
    """Tokens of the full prompt, before truncation; None where unknown."""

    completion_tokens: int | None
    """Tokens of the completion; None where unknown."""

    completion_chars: int | None
    """Characters of the completion; None where unknown."""

    scored_tokens: int
    """Tokens that the model read."""

    truncated: bool
    """Whether that is less than the caller sent."""

    length_z: float | None = None
    """Log length of the completion, in standard deviations from the calibration's mean; None without a calibration."""

    length_percentile: float | None = None
    """Rank of the completion's length in the calibration, 0 to 1; None without a calibration."""

    last_token_id: int | None = None
    """The last token that the model read: a text that ends otherwise than in training has another reward."""

    double_bos: bool = False
    """Whether what the model read begins with two BOS tokens."""

    special_tokens: int | None = None
    """Special tokens that are written in the completion's text, also where they are escaped; None where unknown."""


@dataclass(frozen=True, slots=True)
class StyleReport:
    """The style block of an item's diagnostics: counts and fractions of the whole completion."""

    headers: int
    list_items: int
    bold: int
    emoji: int

    hedges: int
    """Matches of an English lexicon."""

    flattery: int
    """Matches of an English lexicon."""

    words: int

    repeat4: float | None = None
    """Fraction of 4-grams of tokens that occurred before; None below level ``full``."""

    zlib_ratio: float | None = None
    """Compressed by uncompressed size, of the start of the text; None below level ``full``."""

    non_ascii: float | None = None
    """Fraction of characters that are not ASCII; None below level ``full``."""

    prompt_overlap: float | None = None
    """Fraction of the completion's tokens that also occur in the prompt; None below level ``full``."""

    style_p: float | None = None
    """Conformal p-value of the style as a whole; None without a calibration."""


@dataclass(frozen=True, slots=True)
class LayerPValues:
    """Conformal p-values of the pooled states; None where the calibration does not include the component."""

    mid: float | None = None
    """p-value at a tap in the middle of the model."""

    last: float | None = None
    """p-value at the last tap of the model."""


@dataclass(frozen=True, slots=True)
class OodReport:
    """The out-of-distribution block: how typical an item is of the calibration; field names are the response's."""

    p_value: float
    """Fraction of calibration items that are at least as unusual as this one, within [``resolution``, 1]."""

    flag: bool
    """Whether ``p_value`` is at most the configured rate of false alarms."""

    mode: OodMode

    surprise: float
    """The score that ``p_value`` ranks: the largest -ln p of the components.

    It still grows beyond the most unusual calibration item, where ranks end. Its mean over items is the most sensitive
    signal of drift.
    """

    reason: str
    """The component with the largest -ln p; for the text statistics, which of them."""

    resolution: float
    """The lowest p-value that the size of the calibration allows."""

    calibration_id: str

    valid_for_tail: bool
    """Whether the model read the whole item; if not, its small p-values are not reliable."""

    p_text: float | None = None
    """p-value of the text statistics. Each ``p_*`` is None where its component is not calibrated or not applicable."""

    p_feature: float | None = None
    """p-value of text and state statistics together."""

    p_layers: LayerPValues = LayerPValues()

    p_oe: float | None = None
    """p-value of the detector that was trained on examples of reward hacking (outlier exposure)."""

    p_group: float | None = None
    """p-value of the comparison with the other completions of the prompt."""

    score: float | None = None
    """Squared Mahalanobis distance that ``p_feature`` ranks."""


@dataclass(frozen=True, slots=True)
class GroupReport:
    """The group block: an item compared with the other completions of its prompt in the same request."""

    n: int
    """Completions with a reward, this one included."""

    length_corr: float | None
    """Pearson correlation of reward and log length in the group; None for fewer than three, or a constant one."""

    reward_centered: float
    """The reward minus the mean of the group."""

    disagreement: float | None = None
    """Standard deviation of ``reward_centered`` over the resampled heads; None below level ``full`` or without them."""


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one item and its diagnostics. None: not requested, or unknown; no value is a guess."""

    reward: float | None
    """The reward that the reward rule gives; of a head with one output its raw output.

    None only where the head has several outputs and no weights are known."""

    length: LengthReport | None = None

    reward_z: float | None = None
    """The reward in standard deviations from the calibration's mean; needs a calibration."""

    reward_percentile: float | None = None
    """Rank of the reward in the calibration, 0 to 1; needs a calibration."""

    reward_length_adjusted: float | None = None
    """The reward without what the calibration's length curve explains, in units of the reward; needs a calibration."""

    reward_std_epistemic: float | None = None
    """Standard deviation of the reward due to limited training data, in units of the reward; needs a calibration."""

    reward_disagreement: float | None = None
    """Standard deviation of the reward over the resampled heads, in units of the reward; needs a calibration with
    them."""

    ood: OodReport | None = None
    """Needs a calibration."""

    style: StyleReport | None = None
    group: GroupReport | None = None

    gap: CalibrationGap | None = None
    """Why calibrated diagnostics that were requested are None."""

    outputs: tuple[float, ...] = ()
    """The head's outputs at the pooled token, where it has several and no steps are read; empty otherwise."""

    step_outputs: tuple[tuple[float, ...], ...] = ()
    """The head's outputs at the last token of each step, in order; empty without steps."""

    step_rewards: tuple[float, ...] = ()
    """The reward of each step, in order; empty without steps, and where ``reward`` is None."""

    reward_std: float | None = None
    """Standard deviation of the members of an ensemble, which are the outputs; None for other models."""

    own_weights: bool = False
    """Whether weights of the request made the reward: it is then on another scale than the calibration's rewards."""

    head_deviations: tuple[float, ...] | None = field(default=None, repr=False, compare=False)
    """Reward of each resampled head less the reward, for the comparison within a prompt; never part of a response."""

    traits: tuple[float, ...] | None = field(default=None, repr=False, compare=False)
    """State statistics that the detectors read once the whole request is known; never part of a response."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int = 0
    """Tokens of the full prompts, before truncation."""

    completion_tokens: int = 0
    """Tokens of the completions."""

    scored_tokens: int = 0
    """Tokens that the model read, of items with a reward."""

    shared_tokens: int = 0
    """The part of ``scored_tokens`` that was not computed for this request."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that a request spent in each stage."""

    parse_s: float = 0.0
    tokenize_s: float = 0.0

    queue_s: float = 0.0
    """Seconds of the request's slowest item in this stage."""

    engine_s: float = 0.0
    """Seconds of the request's slowest item in this stage."""

    total_s: float = 0.0
    """Seconds from arrival to answer."""

    admission_s: float = 0.0
    """Seconds of waiting for room in the queue, before tokenizing; no stage of its own in answers."""

    @property
    def by_stage(self) -> dict[str, float]:
        """Seconds by the name of the stage; written out because every answer needs it three times."""
        return {
            "parse": self.parse_s,
            "tokenize": self.tokenize_s,
            "queue": self.queue_s,
            "engine": self.engine_s,
            "total": self.total_s,
        }


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """The served model."""

    name: str

    version: str
    """Hash of everything that can change its rewards."""
