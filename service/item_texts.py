"""Items as texts that the tokenizer reads: rendered, joined or as they are, with the special tokens around them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, assert_never

from reward_client.options import TemplateChoice

from service.conversations import ConversationRenderer
from service.errors import HttpError, InvalidRequest
from service.records import (
    Encoding,
    Exchange,
    Item,
    ModelInputs,
    Steps,
    TemplatedText,
    TokenIds,
)
from service.special_tokens import SpecialTokens
from service.steps import (
    StepEnds,
    StepReading,
    ends_of_texts,
    marked_completion,
    refuse_steps,
)
from service.text_rule import TextRule


@dataclass(frozen=True, slots=True)
class PreparedText:
    """The text of one item, ready for the tokenizer."""

    text: str = field(repr=False)

    before: tuple[int, ...] = ()
    """Special tokens that are put in front, unless the text begins with them."""

    after: tuple[int, ...] = ()
    """Special tokens that are put behind."""

    prompt_chars: int | None = None
    """Characters before the completion; None where unknown."""

    completion_chars: int | None = None
    """Characters of the completion; None where unknown."""

    is_exchange: bool = True
    """Whether it has a completion, which is never truncated."""

    is_whole: bool = True
    """Whether it contains the whole completion."""

    steps: StepEnds | None = None
    """Where its steps end; None: it has none."""

    num_special: int | None = None
    """Special tokens that are written in its completion; None where that is not known as text."""

    is_escaped: bool = False
    """Whether separators in these special tokens make them text."""


@dataclass(frozen=True, slots=True)
class PreparedPair:
    """The two texts of an item, ready for the tokenizer, which puts special tokens around and between them."""

    prompt: str = field(repr=False)
    completion: str = field(repr=False)
    completion_chars: int
    """Characters of the completion, without separators."""

    num_special: int | None = None
    is_escaped: bool = False


@dataclass(frozen=True, slots=True)
class ItemTexts:
    """Makes texts of items by the rule of one model; no call changes any state."""

    rule: TextRule
    """How text becomes token ids unless the request chooses otherwise."""

    conversations: ConversationRenderer
    """The chat template."""

    allowed_variables: frozenset[str]
    """Names that ``chat_template_kwargs`` of a request may hold."""

    inputs: ModelInputs
    """What the model reads."""

    step_reading: StepReading
    """How the model is read at steps."""

    appends_tokens: bool
    """Whether token ids stand behind every text."""

    special: SpecialTokens
    """Those of the tokenizer."""

    @property
    def may_pair(self) -> bool:
        """Whether a request may choose the tokenizer's form for pairs."""
        rule = self.rule
        return (
            rule.has_pairs
            and not self.appends_tokens
            and (rule.template == "pair" or self.inputs.is_encoder or not rule.token_types)
        )

    def template_for(self, encoding: Encoding) -> TemplateChoice:
        """Return how a prompt that is a plain string is rendered with this encoding."""
        return encoding.template or self.rule.template

    def prepare(
        self, item: Item, encoding: Encoding, prompts: dict[tuple[object, str], Any]
    ) -> PreparedText | PreparedPair | TokenIds | HttpError:
        """Return what the tokenizer reads of an item, its token ids, or the error of one that has no text.

        Args:
            item: any item.
            encoding: the options of the request.
            prompts: rendered prompts of the same request, which are looked up and added.
        """
        content = item.content
        refusal = refuse_steps(item, self.step_reading, self.inputs)
        if refusal is not None:
            return refusal
        match content:
            case Exchange():
                return self._with_special_tokens(content, item.steps, encoding, prompts)
            case TemplatedText() | TokenIds() if encoding.special_tokens == "escape":
                return InvalidRequest(
                    "Special tokens are escaped in completions only, and the item has no completion: send prompt and "
                    "completion."
                )
            case TemplatedText():
                rule, ends = self.rule, self.marker_ends(item.steps)
                if not encoding.add_bos:
                    return PreparedText(content.text, is_exchange=False, steps=ends)
                after = () if rule.template == "chat" and rule.adds_end else rule.after
                return PreparedText(content.text, rule.before, after, is_exchange=False, steps=ends)
            case TokenIds():
                return content
            case _:
                assert_never(content)

    def _with_special_tokens(
        self,
        exchange: Exchange,
        steps: Steps | None,
        encoding: Encoding,
        prompts: dict[tuple[object, str], Any],
    ) -> PreparedText | PreparedPair | HttpError:
        """Prepare an exchange of which the special tokens in the completion are counted, and escaped if so chosen."""
        num_special = self.special.count(exchange.completion)
        chosen = encoding.special_tokens or self.rule.completion_special_tokens
        is_escaped = num_special > 0 and chosen == "escape"
        if is_escaped and (steps is not None or not self.special.can_escape(exchange.completion)):
            return InvalidRequest(
                f"The completion has {num_special} special tokens, which cannot be escaped in an item with steps, or "
                "where one is a single character."
            )
        given = self.special.escaped(exchange) if is_escaped else exchange
        prepared = (
            self._prepare_exchange(given, encoding, prompts)
            if steps is None
            else self._prepare_steps(given, steps, encoding, prompts)
        )
        if isinstance(prepared, HttpError):
            return prepared
        if is_escaped:
            prepared = replace(prepared, completion_chars=len(exchange.completion_text))
        return replace(prepared, num_special=num_special, is_escaped=is_escaped)

    def marker_ends(self, steps: Steps | None) -> StepEnds | None:
        """Return where steps end that each end with a marker token; None: there are no steps."""
        if steps is None:
            return None
        return StepEnds(self.step_reading.marker.token_id if steps.token_id is None else steps.token_id)

    def _prepare_steps(
        self, exchange: Exchange, steps: Steps, encoding: Encoding, prompts: dict[tuple[object, str], Any]
    ) -> PreparedText | HttpError:
        marker = self.step_reading.marker
        if steps.kind == "texts":
            exchange = replace(exchange, completion=marked_completion(steps, marker))
        prepared = self._prepare_exchange(exchange, encoding, prompts)
        if isinstance(prepared, HttpError):
            return prepared
        if isinstance(prepared, PreparedPair) or (steps.kind == "turns" and self.appends_tokens):
            return InvalidRequest("The model reads pairs of texts or an appended token, so its steps cannot be read.")
        ends: StepEnds | HttpError | None
        match steps.kind:
            case "texts" | "marker" if prepared.prompt_chars is None:
                ends = InvalidRequest("It is unknown where the completion begins, so its steps cannot be read.")
            case "texts" if marker.separate and prepared.prompt_chars != len(prepared.text):
                ends = InvalidRequest(
                    "The chat template writes text behind a completion, where steps that are tokenized alone would "
                    "stand: send token ids, or give the tokenizer the chat template of training."
                )
            case "texts":
                ends = ends_of_texts(steps, marker, prepared.text, prepared.prompt_chars or 0)
            case "marker":
                ends = self.marker_ends(steps)
            case "turns":
                ends = self._turn_ends(exchange, encoding, prepared.text)
        return ends if isinstance(ends, HttpError) else replace(prepared, steps=ends)

    def _turn_ends(self, exchange: Exchange, encoding: Encoding, text: str) -> StepEnds | HttpError:
        is_plain = isinstance(exchange.prompt, str) and isinstance(exchange.completion, str)
        if is_plain and self.template_for(encoding) != "chat":
            return InvalidRequest("A text that no chat template renders has no turns.")
        ends = self.conversations.turn_ends(exchange, dict(encoding.template_variables), text)
        if isinstance(ends, HttpError):
            return ends
        return StepEnds(chars=ends, skipped_id=self.step_reading.pad_token_id)

    def _prepare_exchange(
        self, exchange: Exchange, encoding: Encoding, prompts: dict[tuple[object, str], Any]
    ) -> PreparedText | PreparedPair | HttpError:
        prompt, completion, template = exchange.prompt, exchange.completion, self.template_for(encoding)
        is_plain = isinstance(prompt, str) and isinstance(completion, str) and not exchange.tools
        if template != "chat" and isinstance(prompt, str) and isinstance(completion, str) and is_plain:
            if template == "concat":
                before, after = (self.rule.before, self.rule.after) if encoding.add_bos else ((), ())
                return PreparedText(prompt + completion, before, after, len(prompt), len(completion))
            if not self.may_pair:
                return InvalidRequest("The model reads no pairs of texts: its template is one of the others.")
            return PreparedPair(prompt, completion, len(completion))
        unknown = len({name for name, _ in encoding.template_variables} - self.allowed_variables)
        if unknown:
            return InvalidRequest(
                f"{unknown} names in chat_template_kwargs are not allowed; tokenization.chat_template_kwargs allows: "
                f"{', '.join(sorted(self.allowed_variables)) or 'none'}."
            )
        rendered = self.conversations.render(exchange, dict(encoding.template_variables), prompts)
        if isinstance(rendered, HttpError):
            return rendered
        return PreparedText(
            rendered.text,
            prompt_chars=rendered.completion_start,
            completion_chars=len(exchange.completion_text),
            is_whole=rendered.is_whole,
        )
