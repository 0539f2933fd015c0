"""The text rule of a model: what turns a prompt and a completion into token ids, and how that was decided.

A reward is only valid for the rendering that the model was trained with, so the rule is a record of its own: it is
shown by ``/v1/model``, covered by the model's version and stored in calibrations.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any, Literal

from reward_client.options import SpecialTokenText, TemplateChoice

from service.errors import CheckpointError, SettingsError
from service.records import ModelInputs
from service.settings import TokenizationSettings


@dataclass(frozen=True, slots=True)
class TextRule:
    """How the text of an item becomes token ids unless a request chooses otherwise."""

    template: TemplateChoice
    """Rendering of a plain-string prompt."""

    decided_by: Literal["settings", "tokenizer"]
    """``tokenizer``: its chat template, its form for pairs, or the lack of both decided about ``template``."""

    before: tuple[int, ...]
    """Ids of the special tokens before a text that no chat template renders."""

    between: tuple[int, ...]
    """Ids of the special tokens between the two texts of a pair; empty where the tokenizer has no form for pairs."""

    after: tuple[int, ...]
    """Ids of the special tokens after a text that no chat template renders."""

    token_types: bool
    """Whether the model reads that the two texts of a pair have different types."""

    adds_end: bool
    """Whether ``after`` follows from the tokenizer of a decoder, where it moves the token that the head reads."""

    special_tokens: Literal["tokenizer", "leading"] = "tokenizer"
    """The setting of that name."""

    content: Literal["text", "parts"] = "text"
    """Form of a message's content that the chat template prints: a string, or a list with one part of type text."""

    completion_special_tokens: SpecialTokenText = "read"
    """The setting of that name."""

    @property
    def has_pairs(self) -> bool:
        """Whether the tokenizer has a form for pairs of texts."""
        return bool(self.between)

    @property
    def name(self) -> str:
        """A name that differs between rules that give the same item different ids, on one tokenizer."""
        details = {
            "with token types": self.template == "pair" and self.token_types,
            "content as parts": self.template == "chat" and self.content == "parts",
            "with the tokenizer's end token": self.template == "concat" and self.adds_end and bool(self.after),
            "leading special tokens only": self.template != "chat" and self.special_tokens == "leading",
            "special tokens in completions as text": self.completion_special_tokens == "escape",
        }
        return ", ".join([self.template, *(detail for detail, is_so in details.items() if is_so)])

    @property
    def sentence(self) -> str:
        """The rule in one sentence, for terminals and logs."""
        by = f"decided by the {'setting tokenization.template' if self.decided_by == 'settings' else 'tokenizer'}"
        if self.template == "chat":
            form = " with contents as lists of parts, since it prints no strings" if self.content == "parts" else ""
            return f"Prompt and completion are rendered by the chat template{form} ({by})."
        if self.template == "pair":
            types = " and token types" if self.token_types else ""
            return f"Prompt and completion are a pair of texts with the tokenizer's separators{types} ({by})."
        added = (
            f"ids {list(self.before)} before and {list(self.after)} after" if self.before or self.after else "nothing"
        )
        return f"Prompt and completion are joined; the special tokens added are {added} ({by})."

    def description(self) -> dict[str, Any]:
        """Return the rule as JSON-ready values for ``/v1/model``."""
        return {"name": self.name, **asdict(self)}


def decide_rule(
    tokenizer: Any, backend: Any, settings: TokenizationSettings, inputs: ModelInputs, content: Literal["text", "parts"]
) -> TextRule:
    """Return the text rule of a model.

    Args:
        tokenizer: of transformers.
        backend: its Rust tokenizer without padding and truncation.
        settings: may choose the template and leave out trailing special tokens.
        inputs: what the model reads.
        content: the form of contents that the chat template prints.

    Raises:
        SettingsError: the settings choose a template that the tokenizer does not have.
        CheckpointError: the tokenizer gives the texts of a pair types that the model has no embeddings for.
    """
    before, after = _around(backend.encode("a", add_special_tokens=True))
    between, types = _between(backend)
    has_pairs = bool(between)
    asked_for = "token_type_ids" in tokenizer.model_input_names
    # A tokenizer of the generic class returns types only if asked since transformers 5, and always did before. So for
    # an encoder with embeddings of types the tokenizer's form for pairs decides.
    reads_types = settings.token_types and (
        (inputs.num_token_types > 1 and (inputs.is_encoder or asked_for)) or (inputs.num_token_types == 1 and asked_for)
    )
    template = _template(tokenizer, settings, inputs, has_pairs=has_pairs)
    if template == "pair" and reads_types and max(types) >= inputs.num_token_types:
        raise CheckpointError(
            f"The tokenizer gives the second text of a pair the type {max(types)}, but the model has "
            f"{inputs.num_token_types} token types: correct the tokenizer, or set tokenization.template to concat."
        )
    is_encoder = inputs.is_encoder or (tokenizer.cls_token_id in before and tokenizer.sep_token_id in after)
    return TextRule(
        template=template,
        decided_by="settings" if settings.template else "tokenizer",
        before=before,
        between=between,
        after=after if settings.special_tokens == "tokenizer" else (),
        token_types=reads_types and any(types),
        adds_end=bool(after) and not is_encoder,
        special_tokens=settings.special_tokens,
        content=content,
        completion_special_tokens=settings.completion_special_tokens,
    )


def _template(
    tokenizer: Any, settings: TokenizationSettings, inputs: ModelInputs, *, has_pairs: bool
) -> TemplateChoice:
    if settings.template == "chat" and not tokenizer.chat_template:
        raise SettingsError("tokenization.template is chat, but the tokenizer has no chat template: set concat.")
    if settings.template == "pair" and not has_pairs:
        raise SettingsError("tokenization.template is pair, but the tokenizer has no form for pairs: set concat.")
    if settings.template == "pair" and settings.special_tokens == "leading":
        raise SettingsError("tokenization.special_tokens is leading, but a pair has all its special tokens: set one.")
    if settings.template is not None:
        return settings.template
    if tokenizer.chat_template:
        return "chat"
    is_pair = inputs.is_encoder and has_pairs and settings.special_tokens == "tokenizer"
    return "pair" if is_pair else "concat"


def _around(encoded: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids of the special tokens before and after an encoded text."""
    num_before = sum(1 for _ in takewhile(bool, encoded.special_tokens_mask))
    num_after = sum(1 for _ in takewhile(bool, reversed(encoded.special_tokens_mask)))
    return tuple(encoded.ids[:num_before]), tuple(encoded.ids[len(encoded) - num_after :])


def _between(backend: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids of the special tokens between the texts of a pair, and the types of all tokens of a pair."""
    pair = backend.encode("a", "a", add_special_tokens=True)
    segments = pair.sequence_ids
    first = [index for index, segment in enumerate(segments) if segment == 0]
    second = [index for index, segment in enumerate(segments) if segment == 1]
    if not first or not second:
        return (), tuple(pair.type_ids)
    return tuple(pair.ids[first[-1] + 1 : second[0]]), tuple(pair.type_ids)
