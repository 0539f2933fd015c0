"""What a row of a data file means: a prompt with one completion, or with a chosen and a rejected one.

Accepted forms, as training, audit, calibration, export and the load test all read them:

- ``prompt`` with ``completion`` (or ``response``): one completion;
- ``prompt`` with ``chosen`` and ``rejected``: a pair;
- ``messages``, or one of the above without ``prompt``: whole conversations. The last message, an assistant's, is the
  completion; what is before it is the prompt, and must be the same in both conversations of a pair. A ``prompt`` beside
  whole conversations must be contained in them;
- ``chosen`` and ``rejected`` as plain texts without ``prompt``: the words that both begin with are the prompt, which is
  TRL's standard format with an implicit prompt.

A prompt is a text, a transcript with role markers (see `service.data.transcripts`) or a list of messages. A completion
is a text or a list of messages that begins with an assistant's. A conversation is a list of messages, the same list as
JSON or Python text (as in CSV files), or a transcript. Messages have the fields of `service.messages`. The tools that
the assistant may call are the list ``tools``, or that list as JSON text. Further keys are ignored here. Errors name
file and row, never the text.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from service.data.rows import Row
from service.data.transcripts import is_open_transcript, is_transcript, read_transcript
from service.errors import DatasetError, UnusableRow
from service.messages import MalformedMessage, read_completion, read_message, read_tools
from service.records import Completion, Exchange, Message

Prompt: TypeAlias = str | tuple[Message, ...]
"""A plain prompt, or the messages of the conversation before the completion."""

Kind: TypeAlias = Literal["text", "transcript", "message", "conversation"]
"""How a value is written. ``message``: a completion as a list of messages, mostly of one assistant message."""

PAIR_KEYS = ("chosen", "rejected")
_SINGLE_KEYS = ("completion", "response", "messages")

_ONE: Mapping[Kind, str] = {
    "text": "text",
    "transcript": "text with role markers",
    "message": "a list of assistant messages",
    "conversation": "a conversation",
}
_SEVERAL: Mapping[Kind, str] = {
    "text": "texts",
    "transcript": "texts with role markers",
    "message": "lists of assistant messages",
    "conversation": "conversations",
}

_MESSAGES_AS_TEXT = re.compile(r"\s*\[\s*\{\s*(['\"])(?:role|content)\1\s*:")
_LAST_WORD = re.compile(r"\s+\S*\Z")


@dataclass(frozen=True, slots=True)
class Form:
    """How a row is written; all rows of a file must be written alike."""

    keys: tuple[str, ...]
    """The keys of the completions."""

    completion: Kind
    prompt: Kind | None

    @property
    def is_whole(self) -> bool:
        """Whether the completions are written as whole conversations, which contain the prompt."""
        return self.completion in {"transcript", "conversation"}

    @property
    def is_pair(self) -> bool:
        """Whether a row has a chosen and a rejected completion."""
        return self.keys == PAIR_KEYS

    def __str__(self) -> str:
        if self.prompt == self.completion == "text":
            return f"{', '.join(('prompt', *self.keys[:-1]))} and {self.keys[-1]} as texts"
        kind = (_SEVERAL if self.is_pair else _ONE)[self.completion]
        completions = f"{' and '.join(self.keys)} as {kind}"
        if self.prompt is None:
            return completions if self.is_whole else f"{completions}; the words that both begin with are the prompt"
        begin = f" that {'begin' if self.is_pair else 'begins'} with it" if self.is_whole else ""
        return f"prompt as {_ONE[self.prompt]}, {completions}{begin}"


@dataclass(frozen=True, slots=True)
class PromptCompletions:
    """The texts of a row."""

    prompt: Prompt = field(repr=False)

    completions: tuple[Completion, ...] = field(repr=False)
    """One completion; or two of a pair, the chosen one first."""

    form: Form | None = field(default=None, compare=False)
    """How the row is written."""

    tools: str = field(default="", repr=False)
    """Descriptions of the tools, as a JSON array; empty without tools."""

    def exchanges(self) -> tuple[Exchange, ...]:
        """Return the prompt with each of the completions, in their order."""
        return tuple(Exchange(self.prompt, completion, self.tools) for completion in self.completions)


def parse_completions(row: Row) -> PromptCompletions:
    """Return the prompt of a row with its completion, or with the two completions of a pair.

    Raises:
        UnusableRow: the row has an accepted form, but no completion of a prompt that a reward model can read.
        DatasetError: the row has none of the accepted forms. Both name file and row.
    """
    if all(_has(row, key) for key in PAIR_KEYS):
        return _parse(row, PAIR_KEYS)
    key = next((key for key in _SINGLE_KEYS if _has(row, key)), None)
    if key is not None:
        return _parse(row, (key,))
    check_values(row, PAIR_KEYS)
    check_values(row, [key for key in _SINGLE_KEYS if key in row.values])
    raise DatasetError(
        f'{row.location} has neither a "completion" nor "messages" nor a pair of "chosen" and "rejected".'
    )


def parse_pair(row: Row) -> PromptCompletions:
    """Return the prompt of a row with its chosen and its rejected completion.

    Raises:
        UnusableRow, DatasetError: as for `parse_completions`; DatasetError also where the row is not a pair.
    """
    if all(_has(row, key) for key in PAIR_KEYS):
        return _parse(row, PAIR_KEYS)
    check_values(row, PAIR_KEYS)
    raise DatasetError(f'{row.location} is not a pair: it must have "chosen" and "rejected".')


def check_values(row: Row, keys: Iterable[str]) -> None:
    """Check that the row has a value for each of these keys, if it has the keys.

    Raises:
        UnusableRow: all keys are in the row, and the value of one is null, NaN or an empty field of a CSV file.
    """
    keys = list(keys)
    missing = [key for key in keys if not _has(row, key)]
    if missing and all(key in row.values for key in keys):
        raise UnusableRow(row.location, f'"{missing[0]}" has no value')


def normalized_opening(prompt: str | Iterable[Message]) -> str:
    """Return the first user message, case-folded, with its words joined by single spaces.

    Data is split by this text, so that all conversations with the same first user message are on the same side of a
    split. Without a user message it is the first message; a plain prompt is used whole.
    """
    return " ".join(_opening(prompt).casefold().split())


def _opening(prompt: str | Iterable[Message]) -> str:
    if isinstance(prompt, str):
        return prompt
    messages = list(prompt)
    user_messages = [message.text for message in messages if message.role == "user"]
    return (user_messages or [message.text for message in messages[:1]] or [""])[0]


# --- Forms -----------------------------------------------------------------------------------------------------------


def _parse(row: Row, keys: tuple[str, ...]) -> PromptCompletions:
    prompt = _parse_prompt(row) if _has(row, "prompt") else None
    values = [_parse_value(key, row) for key in keys]
    kinds = {_kind(value, prompt) for value in values}
    if len(kinds) > 1:
        first, second = (_ONE[_kind(value, prompt)] for value in values)
        raise DatasetError(f'{row.location}: "{keys[0]}" is {first}, but "{keys[1]}" is {second}.')
    (kind,) = kinds
    form = Form(keys, kind, None if prompt is None else prompt.kind)
    return replace(_split(values, form, prompt, row), tools=_parse_tools(row))


def _split(
    values: Sequence[str | tuple[Message, ...]], form: Form, prompt: _ParsedPrompt | None, row: Row
) -> PromptCompletions:
    if form.is_whole:
        whole, completions = _split_conversations([_messages_of(value) for value in values], prompt, row)
        return PromptCompletions(whole, completions, form)
    texts = [value for value in values if isinstance(value, str)]
    if prompt is None:
        if form.completion == "message":
            raise DatasetError(f'{row.location} has no "prompt", and no message before the completion.')
        return _split_texts(texts, form, row)
    if form.completion == "message":
        completions = tuple(read_completion(value) for value in values if not isinstance(value, str))
        return PromptCompletions(prompt.value, completions, form)
    if prompt.kind == "transcript" and not prompt.ends_in_space:
        texts = [text.removeprefix(" ") for text in texts]
    return PromptCompletions(prompt.value, tuple(texts), form)


@dataclass(frozen=True, slots=True)
class _ParsedPrompt:
    value: Prompt = field(repr=False)
    kind: Kind

    ends_in_space: bool = False
    """Of a transcript: whether the space after the last marker is part of the prompt."""

    def is_contained_in(self, messages: Sequence[Message]) -> bool:
        if isinstance(self.value, str):
            text = self.value.strip()
            return any(message.role == "user" and message.text.strip() == text for message in messages)
        return tuple(messages[: len(self.value)]) == self.value


def _kind(value: str | tuple[Message, ...], prompt: _ParsedPrompt | None) -> Kind:
    if isinstance(value, str):
        # Beside a prompt only a transcript that contains it is a whole conversation: a completion may look like one.
        is_whole = is_transcript(value) and (prompt is None or prompt.is_contained_in(read_transcript(value)))
        return "transcript" if is_whole else "text"
    if value[0].role != "assistant":
        return "conversation"
    # Several messages are a completion beside a prompt that they do not contain: calls of tools and their results.
    is_completion = len(value) == 1 or (prompt is not None and not prompt.is_contained_in(value))
    return "message" if is_completion else "conversation"


def _messages_of(value: str | tuple[Message, ...]) -> tuple[Message, ...]:
    return read_transcript(value) if isinstance(value, str) else value


def _split_conversations(
    conversations: Sequence[tuple[Message, ...]], prompt: _ParsedPrompt | None, row: Row
) -> tuple[Prompt, tuple[Completion, ...]]:
    """Take the last message of each conversation as the completion, and what they have in common before it."""
    before = conversations[0][:-1]
    if any(conversation[-1].role != "assistant" for conversation in conversations):
        raise UnusableRow(row.location, "the last message is not an assistant's")
    if not before:
        raise UnusableRow(row.location, "there is no message before the last one")
    if any(conversation[:-1] != before for conversation in conversations):
        raise UnusableRow(row.location, "the conversations differ before their last message")
    if prompt is not None and not prompt.is_contained_in(before):
        raise UnusableRow(row.location, "the conversation does not contain the prompt")
    return before, tuple(read_completion(conversation[-1:]) for conversation in conversations)


def _split_texts(texts: Sequence[str], form: Form, row: Row) -> PromptCompletions:
    """Split two plain texts where their common words end; the space before a completion belongs to the completion."""
    if not form.is_pair:
        raise DatasetError(f'{row.location}: "prompt" must be a string or a list of messages.')
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))
    common = "".join(char for char, _ in equal)
    split = _LAST_WORD.search(common)
    if texts[0] == texts[1]:
        raise UnusableRow(row.location, "the texts are identical and there is no prompt")
    if split is None or not split.start():
        raise DatasetError(
            f'{row.location} has no "prompt", and "chosen" and "rejected" are texts that do not begin alike.'
        )
    return PromptCompletions(common[: split.start()], tuple(text[split.start() :] for text in texts), form)


# --- Values ----------------------------------------------------------------------------------------------------------


def _has(row: Row, key: str) -> bool:
    # Parquet has the same columns for all rows, so an absent value is a null there.
    return row.values.get(key) is not None


def _parse_prompt(row: Row) -> _ParsedPrompt:
    value = _parse_value("prompt", row)
    if not isinstance(value, str):
        return _ParsedPrompt(value, "conversation")
    if is_open_transcript(value):
        return _ParsedPrompt(read_transcript(value)[:-1], "transcript", ends_in_space=value.endswith(" "))
    return _ParsedPrompt(value, "text")


def _parse_value(key: str, row: Row) -> str | tuple[Message, ...]:
    value = row.values[key]
    if isinstance(value, str) and _MESSAGES_AS_TEXT.match(value):
        value = _parse_messages_as_text(key, value, row)
    if isinstance(value, str) and key != "messages":
        return _check_unicode(value, row)
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        wanted = "a list of messages" if key == "messages" else "a string or a list of messages"
        raise DatasetError(f'{row.location}: "{key}" must be {wanted}.')
    return tuple(_parse_message(message, key, row) for message in value)


def _parse_messages_as_text(key: str, text: str, row: Row) -> Any:
    """Read messages that were written into one text field: as JSON, or as Python writes them (pandas' ``to_csv``)."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue  # the exception contains the text
    raise DatasetError(f'{row.location}: the messages in "{key}" are written as text, but not as JSON.')


def _parse_message(values: Mapping[str, Any], key: str, row: Row) -> Message:
    if values.get("function_call"):
        raise UnusableRow(row.location, "a message has a function call, which is now written as tool calls")
    try:
        message = read_message(values)
    except MalformedMessage as error:
        # A message that lacks its content is no row of the form; an explicit null is a value that is missing.
        if error.code == "missing_field" and "content" in values:
            raise UnusableRow(row.location, "the content of a message is null") from None
        if error.code == "out_of_range":
            raise UnusableRow(row.location, "a part of a message's content is not text") from None
        if error.pointer.startswith("/tool_calls"):
            raise UnusableRow(row.location, "a message has tool calls of another form") from None
        raise DatasetError(f'{row.location}: "{key}" has a message that cannot be read: {error}.') from None
    for text in (message.text, message.fields):
        _check_unicode(text, row)
    return message


def _parse_tools(row: Row) -> str:
    tools = row.values.get("tools")
    try:
        return _check_unicode(read_tools(json.loads(tools) if isinstance(tools, str) and tools else tools or None), row)
    except (ValueError, TypeError, RecursionError):
        raise DatasetError(f'{row.location}: "tools" must be a list of objects, or that list as JSON.') from None


def _check_unicode(text: str, row: Row) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write; tokenizers cannot read it
        raise UnusableRow(row.location, "a text is not valid Unicode") from None
    return text
