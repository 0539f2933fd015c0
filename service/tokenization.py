"""Turns Items into TokenSequences: chat templates, special tokens and truncation.

The token ids must be those of training, or every reward is wrong. So this follows TRL and transformers exactly: a
conversation is rendered by the model's chat template and gets no further special tokens; a plain text gets the special
tokens that the tokenizer puts in front of it. A special token written out in a text becomes that token, as in training.
Nothing is appended to a decoder's text, because the reward is read at the last token: for a model that was trained on
plain texts with EOS at the end (as TRL does), the caller writes the EOS into the completion. The exception are tokens
that the checkpoint's ``reward_model.json`` names.

No call changes any state, so several threads may encode at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from math import ceil
from typing import Any, assert_never

from reward_client.options import TemplateChoice, Truncation

from service.conversations import OTHER_COMPLETION, SAMPLE_COMPLETION, SAMPLE_PROMPT, ConversationRenderer
from service.errors import CheckpointError, HttpError, InvalidRequest, SequenceTooLong
from service.records import (
    PLAIN_INPUTS,
    Encoding,
    Exchange,
    Item,
    ModelInputs,
    Steps,
    TemplatedText,
    TextProbe,
    TokenIds,
    TokenSequence,
)
from service.settings import TokenizationSettings
from service.steps import (
    PLAIN_READING,
    StepEnds,
    StepReading,
    check_count,
    ends_of_texts,
    find_positions,
    marked_completion,
    refuse_steps,
)
from service.text_rule import decide_rule
from service.token_pattern import last_occurrence

__all__ = ["SAMPLE", "SAMPLE_COMPLETION", "SAMPLE_PROMPT", "Tokenization"]

SAMPLE = Item(Exchange(SAMPLE_PROMPT, SAMPLE_COMPLETION))
"""A fixed item; its token ids show whether two services tokenize in the same way."""


@dataclass(frozen=True, slots=True)
class _Text:
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


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two texts of an item, ready for the tokenizer, which puts special tokens around and between them."""

    prompt: str = field(repr=False)
    completion: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of an item before truncation."""

    sequence: TokenSequence

    num_droppable: int
    """Tokens before this index may be dropped, except for the leading special ones."""


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
        self._backend = _private_backend(tokenizer)
        self._conversations = ConversationRenderer(tokenizer, accepts_partial=settings.unrendered == "accept")
        self.rule = decide_rule(tokenizer, self._backend, settings, inputs, self._conversations.content)
        self._refuse_unrenderable()
        self._may_pair = (
            self.rule.has_pairs
            and not append_token_ids
            and (self.rule.template == "pair" or inputs.is_encoder or not self.rule.token_types)
        )
        if self.rule.template == "pair" and append_token_ids:
            raise CheckpointError(
                "The checkpoint's reward_model.json appends tokens to a text, and its template is a pair of texts: set "
                "tokenization.template to concat."
            )
        self.reads_token_types = self.rule.token_types and (self.rule.template == "pair" or inputs.is_encoder)
        """Whether token sequences may have token types, which the engine then must read."""
        self._leading_special_ids = {tokenizer.bos_token_id, *self.rule.before}
        self._allowed_variables = frozenset(settings.chat_template_kwargs)
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
        return encoding.template or self.rule.template

    def encode(self, items: Sequence[Item], encoding: Encoding) -> list[TokenSequence | HttpError]:
        """Tokenize the items in one call of the tokenizer; an item that cannot be encoded yields its error.

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
        prompts: dict[tuple[object, str], Any] = {}
        prepared = [self._prepare(item, encoding, prompts) for item in items]
        encoded = iter(self._encode_all([entry for entry in prepared if isinstance(entry, _Text | _Pair)]))
        outcomes: list[TokenSequence | HttpError] = []
        for item, entry in zip(items, prepared, strict=True):
            match entry:
                case _Text() | _Pair():
                    tokens = self._tokens(entry, next(encoded))
                    fitted = self._fit(tokens, encoding.truncation) if isinstance(tokens, _Tokens) else tokens
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

    def _encode_all(self, entries: list[_Text | _Pair]) -> list[Any]:
        pairs = iter(self._encode_batch([(one.prompt, one.completion) for one in entries if isinstance(one, _Pair)]))
        texts = iter(self._encode_batch([one.text for one in entries if isinstance(one, _Text)]))
        return [next(pairs if isinstance(one, _Pair) else texts) for one in entries]

    def _encode_batch(self, inputs: list[Any]) -> list[Any]:
        if len(inputs) == 1:  # for a single text the batch call would start its thread pool
            return [self._encode_one(inputs[0])]
        of_pairs = bool(inputs) and isinstance(inputs[0], tuple)
        return list(self._backend.encode_batch(inputs, add_special_tokens=of_pairs))

    def _encode_one(self, text: str | tuple[str, str]) -> Any:
        if isinstance(text, tuple):
            return self._backend.encode(*text, add_special_tokens=True)
        return self._backend.encode(text, add_special_tokens=False)

    def estimate_tokens(self, items: Sequence[Item]) -> int:
        """Estimate the tokens of the items from their characters; at least one per item, exact for token ids.

        Used for admission: tokenizing requests that are then refused would make an overload expensive.
        """
        return sum(self._estimate(item) for item in items)

    def _estimate(self, item: Item) -> int:
        if isinstance(item.content, TokenIds):
            return max(1, len(item.content.ids))
        return max(1, self._extra_tokens + ceil(item.content.num_chars * self._tokens_per_char))

    def _prepare(
        self, item: Item, encoding: Encoding, prompts: dict[tuple[object, str], Any]
    ) -> _Text | _Pair | TokenIds | HttpError:
        content = item.content
        refusal = refuse_steps(item, self._step_reading, self._inputs)
        if refusal is not None:
            return refusal
        match content:
            case Exchange():
                if item.steps is not None:
                    return self._prepare_steps(content, item.steps, encoding, prompts)
                return self._prepare_exchange(content, encoding, prompts)
            case TemplatedText():
                rule, ends = self.rule, self._marker_ends(item.steps)
                if not encoding.add_bos:
                    return _Text(content.text, is_exchange=False, steps=ends)
                after = () if rule.template == "chat" and rule.adds_end else rule.after
                return _Text(content.text, rule.before, after, is_exchange=False, steps=ends)
            case TokenIds():
                return content
            case _:
                assert_never(content)

    def _marker_ends(self, steps: Steps | None) -> StepEnds | None:
        if steps is None:
            return None
        return StepEnds(self._step_reading.marker.token_id if steps.token_id is None else steps.token_id)

    def _prepare_steps(
        self, exchange: Exchange, steps: Steps, encoding: Encoding, prompts: dict[tuple[object, str], Any]
    ) -> _Text | HttpError:
        marker = self._step_reading.marker
        if steps.kind == "texts":
            exchange = replace(exchange, completion=marked_completion(steps, marker))
        prepared = self._prepare_exchange(exchange, encoding, prompts)
        if isinstance(prepared, HttpError):
            return prepared
        if isinstance(prepared, _Pair) or (steps.kind == "turns" and self._appended):
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
                ends = self._marker_ends(steps)
            case "turns":
                ends = self._turn_ends(exchange, encoding, prepared.text)
        return ends if isinstance(ends, HttpError) else replace(prepared, steps=ends)

    def _turn_ends(self, exchange: Exchange, encoding: Encoding, text: str) -> StepEnds | HttpError:
        is_plain = isinstance(exchange.prompt, str) and isinstance(exchange.completion, str)
        if is_plain and self.template_for(encoding) != "chat":
            return InvalidRequest("A text that no chat template renders has no turns.")
        ends = self._conversations.turn_ends(exchange, dict(encoding.template_variables), text)
        if isinstance(ends, HttpError):
            return ends
        return StepEnds(chars=ends, skipped_id=self._step_reading.pad_token_id)

    def _prepare_exchange(
        self, exchange: Exchange, encoding: Encoding, prompts: dict[tuple[object, str], Any]
    ) -> _Text | _Pair | HttpError:
        prompt, completion, template = exchange.prompt, exchange.completion, self.template_for(encoding)
        is_plain = isinstance(prompt, str) and isinstance(completion, str) and not exchange.tools
        if template != "chat" and isinstance(prompt, str) and isinstance(completion, str) and is_plain:
            if template == "concat":
                before, after = (self.rule.before, self.rule.after) if encoding.add_bos else ((), ())
                return _Text(prompt + completion, before, after, len(prompt), len(completion))
            if not self._may_pair:
                return InvalidRequest("The model reads no pairs of texts: its template is one of the others.")
            return _Pair(prompt, completion)
        unknown = len({name for name, _ in encoding.template_variables} - self._allowed_variables)
        if unknown:
            return InvalidRequest(
                f"{unknown} names in chat_template_kwargs are not allowed; tokenization.chat_template_kwargs allows: "
                f"{', '.join(sorted(self._allowed_variables)) or 'none'}."
            )
        rendered = self._conversations.render(exchange, dict(encoding.template_variables), prompts)
        if isinstance(rendered, HttpError):
            return rendered
        return _Text(
            rendered.text,
            prompt_chars=rendered.completion_start,
            completion_chars=len(exchange.completion_text),
            is_whole=rendered.is_whole,
        )

    def _tokens(self, entry: _Text | _Pair, encoded: Any) -> _Tokens | HttpError:
        return self._pair_tokens(entry, encoded) if isinstance(entry, _Pair) else self._text_tokens(entry, encoded)

    def _text_tokens(self, text: _Text, encoded: Any) -> _Tokens | HttpError:
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
        )
        if num_prompt_tokens is not None:
            return _Tokens(sequence, num_prompt_tokens)
        # Where an exchange has no known border nothing is dropped: it might be of the completion.
        return _Tokens(sequence, 0 if text.is_exchange else len(ids))

    def _with_separate_steps(self, ids: tuple[int, ...], steps: StepEnds) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids of a text with those of steps that are tokenized alone, and the index of each one's marker."""
        positions: list[int] = []
        for step in steps.texts:
            ids += (*self._encode_one(step).ids, *(() if steps.token_id is None else (steps.token_id,)))
            positions.append(len(ids) - 1)
        return ids, tuple(positions)

    def _step_positions(
        self, text: _Text, ids: tuple[int, ...], num_prompt_tokens: int | None
    ) -> tuple[int, ...] | HttpError:
        assert text.steps is not None  # noqa: S101 - the caller has checked it
        found = find_positions(
            text.steps, ids, text.text, num_prompt_tokens, lambda part: tuple(self._encode_one(part).ids)
        )
        if isinstance(found, HttpError):
            return found
        return check_count(found, self._step_reading) or found

    def _with_appended(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ids of a text with what the model's description puts behind it, which is not put there twice."""
        appended = self._appended
        return ids + appended if appended and ids[-len(appended) :] != appended else ids

    def _pair_tokens(self, pair: _Pair, encoded: Any) -> _Tokens:
        ids, rule = tuple(encoded.ids), self.rule
        num_prompt = len(rule.before) + encoded.sequence_ids.count(0)
        types = tuple(encoded.type_ids) if self.reads_token_types and any(encoded.type_ids) else ()
        sequence = TokenSequence(
            ids, num_prompt + len(rule.between), completion_chars=len(pair.completion), token_types=types
        )
        return _Tokens(sequence, num_prompt)

    def _fit(self, tokens: _Tokens, truncation: Truncation) -> TokenSequence | HttpError:
        sequence = tokens.sequence
        ids, limit = sequence.token_ids, self._max_input_tokens
        if not ids:
            return InvalidRequest("The item has no tokens.")
        excess = len(ids) - limit
        if excess <= 0:
            return sequence
        if truncation == "error":
            return _too_long(len(ids), limit)
        num_leading = sum(1 for _ in takewhile(self._leading_special_ids.__contains__, ids))
        if excess > tokens.num_droppable - num_leading:
            end_of_prompt = sequence.num_prompt_tokens
            if end_of_prompt is None and not tokens.num_droppable:
                return SequenceTooLong(
                    f"{len(ids):,} tokens; the limit is {limit:,}. Where the completion begins is unknown, and it is "
                    "never truncated."
                )
            return SequenceTooLong(
                f"{len(ids):,} tokens; the limit is {limit:,}. "
                f"{len(ids) - (end_of_prompt or len(ids)):,} of them are in the completion, which is never truncated."
            )
        if sequence.step_positions[:1] and sequence.step_positions[0] < num_leading + excess:
            return SequenceTooLong(f"{len(ids):,} tokens; the limit is {limit:,}, and truncation would drop a step.")
        return replace(
            sequence,
            token_ids=ids[:num_leading] + ids[num_leading + excess :],
            step_positions=tuple(position - excess for position in sequence.step_positions),
            token_types=sequence.token_types[:num_leading] + sequence.token_types[num_leading + excess :],
            num_prompt_tokens=None if sequence.num_prompt_tokens is None else sequence.num_prompt_tokens - excess,
            num_dropped=excess,
        )

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
            return _too_long(len(ids), self._max_input_tokens)
        ends = self._marker_ends(steps)
        if ends is None:
            return TokenSequence(ids)
        positions = self._step_positions(_Text("", is_exchange=False, steps=ends), ids, None)
        return positions if isinstance(positions, HttpError) else TokenSequence(ids, step_positions=positions)

    def _refuse_unrenderable(self) -> None:
        refusal = self._conversations.refusal
        if refusal is not None and self.rule.template == "chat":
            raise CheckpointError(f"{refusal}: correct it, or set tokenization.template to concat.")

    def _encode_sample(self) -> tuple[int, ...]:
        prepared = self._prepare(SAMPLE, Encoding(), {})
        if not isinstance(prepared, _Text | _Pair):
            raise CheckpointError(
                "The tokenizer's chat template cannot render one user turn and one assistant turn: "
                "correct it, or set tokenization.template to concat."
            )
        (encoded,) = self._encode_all([prepared])
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
            (outcome,) = self.encode([Item(Exchange(SAMPLE_PROMPT, completion))], Encoding())
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
        num_tokens = len(self._backend.encode(plain, add_special_tokens=False))
        return num_tokens / len(plain), max(0, len(self.sample_token_ids) - num_tokens)


def _private_backend(tokenizer: Any) -> Any:
    """Return a copy of the Rust tokenizer, because transformers changes its padding and truncation in every call."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _tokens_before(char: int, encoded: Any) -> int:
    """Count the tokens that end at or before a character; a token that spans it belongs to the completion."""
    return bisect_right(range(len(encoded)), char, key=lambda token: encoded.token_to_chars(token)[1])


def _too_long(num_tokens: int, limit: int) -> SequenceTooLong:
    return SequenceTooLong(f"{num_tokens:,} tokens; the limit is {limit:,}.")
