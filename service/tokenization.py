"""Turns Items into TokenSequences: chat templates, special tokens and truncation.

The token ids must be those of training, or every reward is wrong. So this follows TRL and transformers exactly: a
conversation is rendered by the model's chat template and gets no further special tokens; a plain text gets the special
tokens that the tokenizer puts in front of it. A special token written out in a text becomes that token, as in training,
unless those in completions are escaped.
Nothing is appended to a decoder's text, because the reward is read at the last token: for a model that was trained on
plain texts with EOS at the end (as TRL does), the caller writes the EOS into the completion. The exception are tokens
that the checkpoint's ``reward_model.json`` names.

No call changes any state, so several threads may encode at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import Any

from reward_client.options import TemplateChoice

from service.conversations import OTHER_COMPLETION, SAMPLE_COMPLETION, SAMPLE_PROMPT, ConversationRenderer
from service.errors import CheckpointError, HttpError, InvalidRequest
from service.item_texts import ItemTexts, PreparedPair, PreparedText
from service.records import (
    PLAIN_INPUTS,
    Encoding,
    Exchange,
    Item,
    ModelInputs,
    Steps,
    TextProbe,
    TokenIds,
    TokenSequence,
)
from service.settings import TokenizationSettings
from service.special_tokens import SpecialTokens
from service.steps import (
    PLAIN_READING,
    StepEnds,
    StepReading,
    check_count,
    find_positions,
)
from service.text_rule import decide_rule
from service.token_pattern import last_occurrence
from service.tokenizer_copy import TokenizerCopy
from service.truncation import UncutTokens, fit, too_long

__all__ = ["SAMPLE", "SAMPLE_COMPLETION", "SAMPLE_PROMPT", "Tokenization"]

SAMPLE = Item(Exchange(SAMPLE_PROMPT, SAMPLE_COMPLETION))
"""A fixed item; its token ids show whether two services tokenize in the same way."""


class Tokenization:
    """Encodes Items for one model.

    Args:
        tokenizer: a fast tokenizer of transformers; it is not changed.
        settings: the defaults of the service.
        max_input_tokens: maximal length of a TokenSequence.
        vocab_size: rows of the embedding; token ids that callers send must be less.
        append_token_ids: stand after every text that does not end in them, such as a reward token.
        gate_pattern: token ids between prompt and completion, of which the head reads one; every item must have them.
        inputs: what the model reads.
        step_reading: how the model is read at steps.

    ``rule`` is how text becomes token ids by default. ``sample_token_ids`` are the ids of ``SAMPLE`` with the default
    settings.

    Raises:
        SettingsError: a template is set as default that the tokenizer does not have.
        CheckpointError: the chat template cannot render one user turn and one assistant turn, or does not print it; or
            the tokenizer's own call, by the rule, gives other ids.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: TokenizationSettings,
        *,
        max_input_tokens: int,
        vocab_size: int,
        append_token_ids: tuple[int, ...] = (),
        gate_pattern: tuple[int, ...] = (),
        inputs: ModelInputs = PLAIN_INPUTS,
        step_reading: StepReading = PLAIN_READING,
    ) -> None:
        self._tokenizer = tokenizer
        self._inputs = inputs
        self._step_reading = step_reading
        special = SpecialTokens(self.special_tokens)
        self._copy = TokenizerCopy(tokenizer, special.separator)
        self._conversations = ConversationRenderer(tokenizer, accepts_partial=settings.unrendered == "accept")
        self.rule = decide_rule(tokenizer, self._copy.backend, settings, inputs, self._conversations.content)
        self._refuse_unrenderable()
        self._texts = ItemTexts(
            self.rule,
            self._conversations,
            frozenset(settings.chat_template_kwargs),
            inputs,
            step_reading,
            appends_tokens=bool(append_token_ids),
            special=special,
        )
        if self.rule.template == "pair" and append_token_ids:
            raise CheckpointError(
                "The checkpoint's reward_model.json appends tokens to a text, and its template is a pair of texts: set "
                "tokenization.template to concat."
            )
        self.reads_token_types = self.rule.token_types and (self.rule.template == "pair" or inputs.is_encoder)
        """Whether token sequences may have token types, which the engine then must read."""
        self._leading_special_ids = frozenset({tokenizer.bos_token_id, *self.rule.before})
        self._max_input_tokens = max_input_tokens
        self._vocab_size = vocab_size
        self._appended = append_token_ids
        self._gate_pattern = gate_pattern
        self.sample_token_ids = self._encode_sample()
        if gate_pattern and last_occurrence(self.sample_token_ids, gate_pattern) is None:
            raise CheckpointError(
                "The gate of the checkpoint's head reads the end of the prompt, but a text as it is served "
                f"({self.rule.template}) does not have the tokens that reward_model.json names there: give the "
                "tokenizer the chat template of training."
            )
        self._refuse_other_ids()
        self._tokens_per_char, self._extra_tokens = self._measure_sample()

    @property
    def special_tokens(self) -> frozenset[str]:
        """The texts of the tokenizer's special tokens."""
        added = self._tokenizer.added_tokens_decoder.values()
        return frozenset(token.content for token in added if token.special)

    @property
    def unadded_bos(self) -> str | None:
        """The BOS that the chat template writes and the tokenizer's own call does not add; None: there is none.

        A client that cuts the BOS of a rendered conversation, because servers add it, sends a text without any.
        """
        bos, bos_id = self._tokenizer.bos_token, self._tokenizer.bos_token_id
        is_written = self.rule.template == "chat" and bos_id is not None and self.sample_token_ids[:1] == (bos_id,)
        return str(bos) if is_written and bos_id not in self.rule.before else None

    def step_description(self) -> dict[str, Any]:
        """Return how the model is read at steps as JSON-ready values for ``/v1/model``."""
        reading = self._step_reading
        return {
            "readable": not (reading.refusal or self._inputs.is_encoder),
            "marker": reading.marker.text,
            "marker_token_id": reading.marker.token_id,
            "separate": reading.marker.separate,
        }

    @property
    def reads_markers(self) -> bool:
        """Whether the model rewards steps, each at a marker token that is known."""
        description = self.step_description()
        return bool(description["readable"]) and description["marker_token_id"] is not None

    def template_for(self, encoding: Encoding) -> TemplateChoice:
        """Return how a prompt that is a plain string is rendered with this encoding."""
        return self._texts.template_for(encoding)

    def encode(self, items: Sequence[Item], encoding: Encoding) -> list[TokenSequence | HttpError]:
        """Tokenize the items in one call of the tokenizer; an item that cannot be encoded yields its error.

        A model that rewards steps is read at its markers unless an item says otherwise: it was trained nowhere else.

        An Exchange whose prompt is a string becomes a user turn and an assistant turn of the chat template, with
        ``concat`` the two strings joined, or with ``pair`` the tokenizer's pair of texts. A prompt or completion of
        messages is always rendered by the chat template. A text that no template renders gets the special tokens that
        the tokenizer's own call adds; those in front are not added to a text that begins with them. Templated text gets
        those that are put behind only where the model has no chat template, and none without ``add_bos``. Token ids are
        not changed. Joined strings get no special token without ``add_bos``.

        Truncation ``prompt_left`` drops the excess tokens from the left, after the BOS. It drops no token of the
        completion. In templated text it is unknown where the completion begins, so it may be cut into. Token ids are
        never truncated.

        Args:
            items: any number, zero included.
            encoding: the options of the request.

        Returns:
            One entry per item, in order: a TokenSequence, or one of
            InvalidRequest: messages without a chat template, or messages that it rejects; a template or variables that
            the model does not have; ids outside the vocabulary; no tokens at all.
            InvalidRequest too: an item without the tokens that the gate of the model's head reads; steps of which the
            last token cannot be determined.
            CompletionNotRendered: the chat template leaves out a part of the completion.
            SequenceTooLong: more than ``max_input_tokens`` where truncation was not requested or is not possible.
        """
        if self.reads_markers:
            items = [replace(item, steps=Steps("marker")) if item.steps is None else item for item in items]
        return self._encode(items, encoding)

    def _encode(self, items: Sequence[Item], encoding: Encoding) -> list[TokenSequence | HttpError]:
        prompts: dict[tuple[object, str], Any] = {}
        prepared = [self._texts.prepare(item, encoding, prompts) for item in items]
        encoded = iter(
            self._copy.encode_all([entry for entry in prepared if isinstance(entry, PreparedText | PreparedPair)])
        )
        outcomes: list[TokenSequence | HttpError] = []
        for item, entry in zip(items, prepared, strict=True):
            match entry:
                case PreparedText() | PreparedPair():
                    tokens = self._tokens(entry, next(encoded))
                    fitted = (
                        fit(tokens, encoding.truncation, self._max_input_tokens, self._leading_special_ids)
                        if isinstance(tokens, UncutTokens)
                        else tokens
                    )
                    outcomes.append(self._with_double_bos(self._gated(fitted)))
                case TokenIds():
                    outcomes.append(self._with_double_bos(self._gated(self._check_ids(entry, item.steps))))
                case HttpError():
                    outcomes.append(entry)
        return outcomes

    def _with_double_bos(self, outcome: TokenSequence | HttpError) -> TokenSequence | HttpError:
        """Note that a sequence begins with two BOS; nothing is taken from what the caller sent."""
        bos_id = self._tokenizer.bos_token_id
        if isinstance(outcome, HttpError) or bos_id is None or outcome.token_ids[:2] != (bos_id, bos_id):
            return outcome
        return replace(outcome, double_bos=True)

    def token_spans(self, text: str) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """Return the token ids of a text alone, and for each its first character and the character after its last."""
        return self._copy.spans_of(text)

    def estimate_tokens(self, items: Sequence[Item]) -> int:
        """Estimate the tokens of the items from their characters; at least one per item, exact for token ids.

        Used for admission: tokenizing requests that are then refused would make an overload expensive.
        """
        return sum(self._estimate(item) for item in items)

    def _estimate(self, item: Item) -> int:
        if isinstance(item.content, TokenIds):
            return max(1, len(item.content.ids))
        return max(1, self._extra_tokens + ceil(item.content.num_chars * self._tokens_per_char))

    def _tokens(self, entry: PreparedText | PreparedPair, encoded: Any) -> UncutTokens | HttpError:
        return (
            self._pair_tokens(entry, encoded) if isinstance(entry, PreparedPair) else self._text_tokens(entry, encoded)
        )

    def _text_tokens(self, text: PreparedText, encoded: Any) -> UncutTokens | HttpError:
        ids = tuple(encoded.ids)
        num_prompt_tokens = None if text.prompt_chars is None else _tokens_before(text.prompt_chars, encoded)
        positions: tuple[int, ...] = ()
        if text.steps is not None:
            if text.steps.texts:
                ids, positions = self._with_separate_steps(ids, text.steps)
            else:
                found = self._step_positions(text, ids, num_prompt_tokens)
                if isinstance(found, HttpError):
                    return found
                positions = found
        if ids[: len(text.before)] != text.before:
            ids = text.before + ids
            positions = tuple(position + len(text.before) for position in positions)
            if num_prompt_tokens is not None:
                num_prompt_tokens += len(text.before)
        ids = self._with_appended(ids + text.after)
        sequence = TokenSequence(
            ids,
            num_prompt_tokens,
            completion_chars=text.completion_chars,
            step_positions=positions,
            partly_rendered=not text.is_whole,
            num_written_special=text.num_special,
        )
        if num_prompt_tokens is not None:
            return UncutTokens(sequence, num_prompt_tokens)
        # Where an exchange has no known border nothing is dropped: it might be of the completion.
        return UncutTokens(sequence, 0 if text.is_exchange else len(ids))

    def _with_separate_steps(self, ids: tuple[int, ...], steps: StepEnds) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids of a text with those of steps that are tokenized alone, and the index of each one's marker."""
        positions: list[int] = []
        for step in steps.texts:
            ids += (*self._copy.ids_of(step), *(() if steps.token_id is None else (steps.token_id,)))
            positions.append(len(ids) - 1)
        return ids, tuple(positions)

    def _step_positions(
        self, text: PreparedText, ids: tuple[int, ...], num_prompt_tokens: int | None
    ) -> tuple[int, ...] | HttpError:
        assert text.steps is not None  # noqa: S101 - the caller has checked it
        found = find_positions(text.steps, ids, text.text, num_prompt_tokens, self._copy.ids_of)
        if isinstance(found, HttpError):
            return found
        return check_count(found, self._step_reading) or found

    def _with_appended(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ids of a text with what the model's description puts behind it, which is not put there twice."""
        appended = self._appended
        return ids + appended if appended and ids[-len(appended) :] != appended else ids

    def _pair_tokens(self, pair: PreparedPair, encoded: Any) -> UncutTokens:
        ids, rule = tuple(encoded.ids), self.rule
        num_prompt = len(rule.before) + encoded.sequence_ids.count(0)
        types = tuple(encoded.type_ids) if self.reads_token_types and any(encoded.type_ids) else ()
        sequence = TokenSequence(
            ids,
            num_prompt + len(rule.between),
            completion_chars=pair.completion_chars,
            token_types=types,
            num_written_special=pair.num_special,
        )
        return UncutTokens(sequence, num_prompt)

    def _gated(self, outcome: TokenSequence | HttpError) -> TokenSequence | HttpError:
        """Refuse a sequence without the tokens that the gate of the head reads: it has no reward."""
        if not self._gate_pattern or isinstance(outcome, HttpError):
            return outcome
        if last_occurrence(outcome.token_ids, self._gate_pattern) is None:
            return InvalidRequest(
                "The model weights its objectives by the state at the end of the prompt, and the item does not have "
                "the tokens that its chat template writes there: send prompt and completion, or a text rendered by it."
            )
        return outcome

    def _check_ids(self, content: TokenIds, steps: Steps | None) -> TokenSequence | HttpError:
        ids = content.ids
        if not ids:
            return InvalidRequest("The item has no tokens.")
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            index = next(index for index, token_id in enumerate(ids) if not 0 <= token_id < self._vocab_size)
            return InvalidRequest(f"The token id at index {index} is not in the vocabulary of {self._vocab_size:,}.")
        if len(ids) > self._max_input_tokens:
            return too_long(len(ids), self._max_input_tokens)
        ends = self._texts.marker_ends(steps)
        if ends is None:
            return TokenSequence(ids)
        positions = self._step_positions(PreparedText("", is_exchange=False, steps=ends), ids, None)
        return positions if isinstance(positions, HttpError) else TokenSequence(ids, step_positions=positions)

    def _refuse_unrenderable(self) -> None:
        refusal = self._conversations.refusal
        if refusal is not None and self.rule.template == "chat":
            raise CheckpointError(f"{refusal}: correct it, or set tokenization.template to concat.")

    def _encode_sample(self) -> tuple[int, ...]:
        prepared = self._texts.prepare(SAMPLE, Encoding(), {})
        if not isinstance(prepared, PreparedText | PreparedPair):
            raise CheckpointError(
                "The tokenizer's chat template cannot render one user turn and one assistant turn: "
                "correct it, or set tokenization.template to concat."
            )
        (encoded,) = self._copy.encode_all([prepared])
        tokens = self._tokens(prepared, encoded)
        if isinstance(tokens, HttpError):
            raise CheckpointError(f"The service cannot encode a sample: {tokens}")
        return tokens.sequence.token_ids

    def probes(self) -> list[TextProbe]:
        """Return sample texts as they are served, with what the tokenizer's own call gives for them.

        With ``special_tokens: leading``, which overrules the tokenizer's own call, there are none.
        """
        if self.rule.special_tokens == "leading" and self.rule.template != "chat":
            return []
        probes = []
        for completion in (SAMPLE_COMPLETION, OTHER_COMPLETION):
            (outcome,) = self._encode([Item(Exchange(SAMPLE_PROMPT, completion))], Encoding())
            if isinstance(outcome, TokenSequence):
                probes.append(TextProbe(outcome.row, self._own_call(completion)))
        return probes

    def _own_call(self, completion: str) -> dict[str, Sequence[int]]:
        if self.rule.template == "chat":
            turns = self._conversations.sample_turns(completion)
            encoded = self._tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)
        elif self.rule.template == "pair":
            encoded = self._tokenizer(SAMPLE_PROMPT, completion, return_token_type_ids=self.rule.token_types)
        else:
            encoded = self._tokenizer(SAMPLE_PROMPT + completion)
        ids = tuple(encoded["input_ids"])
        if self.rule.template != "pair":
            return {"input_ids": self._with_appended(ids)}
        return {"input_ids": ids} | ({"token_type_ids": encoded["token_type_ids"]} if self.rule.token_types else {})

    def _refuse_other_ids(self) -> None:
        for probe in self.probes():
            own = TokenSequence(
                tuple(probe.inputs["input_ids"]), token_types=tuple(probe.inputs.get("token_type_ids", ()))
            )
            if own.row != probe.row:
                raise CheckpointError(
                    "The service gives a sample other token ids than the tokenizer's own call: save the tokenizer "
                    "again, or set tokenization.template."
                )

    def _measure_sample(self) -> tuple[float, int]:
        """Return the tokens per character of plain text, and the tokens that the template adds to an item."""
        plain = SAMPLE_PROMPT + SAMPLE_COMPLETION
        num_tokens = len(self._copy.ids_of(plain))
        return num_tokens / len(plain), max(0, len(self.sample_token_ids) - num_tokens)


def _tokens_before(char: int, encoded: Any) -> int:
    """Count the tokens that end at or before a character; a token that spans it belongs to the completion."""
    return bisect_right(range(len(encoded)), char, key=lambda token: encoded.token_to_chars(token)[1])
