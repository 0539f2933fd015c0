"""The records that travel through the service: plain data with a few derived facts.

Nothing here knows a tokenizer, a device or a socket, and nothing beyond the standard library is imported, so the
client can use these records inside a trainer that has pins of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from reward_client.options import DiagnosticsLevel, TemplateChoice, Truncation

Pooling: TypeAlias = Literal["hf", "last"]
BatchCost: TypeAlias = Literal["packed", "padded"]
StatePooling: TypeAlias = Literal["last", "mean"]
OodMode: TypeAlias = Literal["single", "group"]
Scope: TypeAlias = Literal["pooled", "within"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""Of a correlation: over all items, or about the means of the prompts."""

CalibrationGap: TypeAlias = Literal["missing", "inapplicable"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, as chat templates take it."""

    role: str
    content: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt (plain text, or the turns of a conversation) and the completion that answers it."""

    prompt: str | tuple[Message, ...] = field(repr=False)
    completion: str = field(repr=False)

    @property
    def num_chars(self) -> int:
        """Characters of prompt and completion together, before any template."""
        prompt = self.prompt
        prompt_chars = len(prompt) if isinstance(prompt, str) else sum(len(turn.content) for turn in prompt)
        return prompt_chars + len(self.completion)


@dataclass(frozen=True, slots=True)
class TemplatedText:
    """A text that already went through a chat template; only a BOS token may still be put before it."""

    text: str = field(repr=False)

    @property
    def num_chars(self) -> int:
        """Characters of the text."""
        return len(self.text)


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Token ids of the served model's own tokenizer; scored exactly as they are."""

    ids: tuple[int, ...] = field(repr=False)

    @property
    def num_chars(self) -> int:
        """Zero: ids have no characters; their number is checked against the token limit instead."""
        return 0


Content: TypeAlias = Exchange | TemplatedText | TokenIds


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of a request: what is to be scored, and the names under which the caller knows it.

    ``id`` is echoed; ``group`` names items that answer one prompt (where the prompt alone does not tell).
    """

    content: Content
    id: str | None = None
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Encoding:
    """How Items become Sequences; decided by the route and the request, never guessed from a text.

    ``template``: None lets the served model decide (its chat template when it has one, plain concatenation otherwise).
    ``add_bos``: whether a templated text gets the BOS token that its tokenizer would put in front.
    """

    template: TemplateChoice | None = None
    truncation: Truncation = "error"
    add_bos: bool = True


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """What a protocol module makes of a request body.

    ``timeout_s``: seconds from arrival after which no answer is wanted. ``run_id``: the training run that asks, where
    it names itself; its monitors are kept apart.
    """

    items: tuple[Item, ...]
    encoding: Encoding
    diagnostics: DiagnosticsLevel
    timeout_s: float
    run_id: str | None = None


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A tokenised Item.

    ``num_prompt_tokens`` counts the leading tokens that belong to the prompt (template included), after truncation;
    None where the border is unknown (templated text and token ids). ``num_dropped`` counts prompt tokens cut from the
    left.
    ``completion_chars`` is None where the completion is not known as text.
    """

    token_ids: tuple[int, ...] = field(repr=False)
    num_prompt_tokens: int | None = None
    num_dropped: int = 0
    completion_chars: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads."""
        return len(self.token_ids)

    @property
    def num_completion_tokens(self) -> int | None:
        """Tokens after the prompt, template suffix included; None where the border is unknown."""
        return None if self.num_prompt_tokens is None else self.num_tokens - self.num_prompt_tokens

    @property
    def truncated(self) -> bool:
        """Whether the model saw less than the caller sent."""
        return self.num_dropped > 0


@dataclass(frozen=True, slots=True)
class StateTap:
    """A place of the forward pass at which hidden states are read for the diagnostics.

    ``layer``: 0 is the embeddings, n the output of the n-th block; the last one is read behind the final norm, as the
    head does. ``pooling``: ``last`` is the token whose state the head reads; ``mean`` is the mean over the completion's
    tokens, or over all where the border to the prompt is unknown.
    """

    layer: int
    pooling: StatePooling


@dataclass(frozen=True, slots=True)
class LengthReport:
    """The length block of an item's diagnostics; field names are the wire's.

    Prompt and completion counts are of the full text; ``scored_tokens`` is what the model read. None where unknown.
    ``length_z`` (in standard deviations of the log length) and ``length_percentile`` (0 to 1) place the completion
    among the calibration's; None without one.
    """

    prompt_tokens: int | None
    completion_tokens: int | None
    completion_chars: int | None
    scored_tokens: int
    truncated: bool
    length_z: float | None = None
    length_percentile: float | None = None


@dataclass(frozen=True, slots=True)
class StyleReport:
    """The style block of an item's diagnostics: tells of formatting, flattery and repetition in the completion.

    Counts are of the whole completion; hedges and flattery are hits of an English lexicon. The fractions are those of
    level ``full``, None below it. ``style_p``: conformal p-value of the style as a whole; None without a calibration.
    """

    headers: int
    list_items: int
    bold: int
    emoji: int
    hedges: int
    flattery: int
    words: int
    repeat4: float | None = None
    zlib_ratio: float | None = None
    non_ascii: float | None = None
    prompt_overlap: float | None = None
    style_p: float | None = None


@dataclass(frozen=True, slots=True)
class LayerPValues:
    """Conformal p-values of the pooled states in the middle of the model and at its end; None where not admitted."""

    mid: float | None = None
    last: float | None = None


@dataclass(frozen=True, slots=True)
class OodReport:
    """The out-of-distribution block: how typical an item is of the calibration's. Field names are the wire's.

    ``p_value`` decides: the share of calibration items at least as unusual as this one, within [``resolution``, 1].
    ``flag``: whether it is at most the set rate of false alarms. ``surprise``: the score behind it, a -ln p that
    goes on where ranks end, beyond all calibration items; its mean is the most sensitive signal of drift. ``p_*``: the
    components' own p-values, None where a component is not in the calibration or does not apply. ``score``: raw squared
    distance of the feature component. ``reason``: the component that decided. ``valid_for_tail``: False where the model
    read a part only.
    """

    p_value: float
    flag: bool
    mode: OodMode
    surprise: float
    reason: str
    resolution: float
    calibration_id: str
    valid_for_tail: bool
    p_text: float | None = None
    p_feature: float | None = None
    p_layers: LayerPValues = LayerPValues()
    p_oe: float | None = None
    p_group: float | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class GroupReport:
    """The group block: an item beside the other completions of its prompt in the same request.

    ``n``: completions with a reward, this one included. ``length_corr``: Pearson correlation of reward and log length
    within the group; None for fewer than three, or where either does not vary. ``reward_centered``: the reward less the
    group's mean.
    """

    n: int
    length_corr: float | None
    reward_centered: float


@dataclass(frozen=True, slots=True)
class Score:
    """All we say of one Item: the raw output of the scalar head, and what is known about its trustworthiness.

    What is None was not asked for, or could not be known: nothing here is ever guessed. ``reward_z`` (standard
    deviations), ``reward_percentile`` (0 to 1), ``reward_length_adjusted`` and ``reward_std_epistemic`` (both in units
    of the reward) and ``ood`` need a calibration. ``gap``: why calibrated diagnostics that were asked for are None:
    there is no calibration, or the item shows no border between prompt and completion. ``traits``: the statistics by
    which siblings are compared; never leaves the service.
    """

    reward: float
    length: LengthReport | None = None
    reward_z: float | None = None
    reward_percentile: float | None = None
    reward_length_adjusted: float | None = None
    reward_std_epistemic: float | None = None
    ood: OodReport | None = None
    style: StyleReport | None = None
    group: GroupReport | None = None
    gap: CalibrationGap | None = None
    traits: tuple[float, ...] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. Prompt and completion count the full texts; ``scored`` what the model read."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    scored_tokens: int = 0
    shared_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that a request spent in each stage; ``queue_s`` and ``engine_s`` are those of its slowest item."""

    parse_s: float = 0.0
    tokenize_s: float = 0.0
    queue_s: float = 0.0
    engine_s: float = 0.0
    total_s: float = 0.0

    @property
    def by_stage(self) -> dict[str, float]:
        """Seconds by the name of the stage; spelt out, since every answer asks for it three times."""
        return {
            "parse": self.parse_s,
            "tokenize": self.tokenize_s,
            "queue": self.queue_s,
            "engine": self.engine_s,
            "total": self.total_s,
        }


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """The served model's name and the hash over everything that can change its rewards."""

    name: str
    version: str
