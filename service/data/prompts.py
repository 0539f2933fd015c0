"""What a row of a data file means: a prompt with one completion, or with a chosen and a rejected one.

Accepted forms, as calibration, export, training and the load test all read them:

- ``{"prompt", "completion"}`` (or ``"response"``): one completion;
- ``{"prompt", "chosen", "rejected"}``: a pair with an explicit prompt;
- ``{"chosen", "rejected"}``: a pair of conversations that differ in their last message only, which is TRL's preference
  format with an implicit prompt.

A prompt is a string or a list of messages. A completion is a string or a list of messages that begins with an
assistant's. Messages may have the fields of `service.messages`. The tools that the assistant may call are the list
``tools``, or that list as JSON in a string. Further keys are ignored here. Errors name file and row, never the text.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from service.data.rows import Row
from service.errors import DatasetError
from service.messages import MalformedMessage, read_completion, read_message, read_tools
from service.records import Completion, Message

Prompt: TypeAlias = str | tuple[Message, ...]
"""A plain prompt, or the messages of the conversation before the completion."""


@dataclass(frozen=True, slots=True)
class PromptCompletions:
    """The texts of a row."""

    prompt: Prompt = field(repr=False)

    completions: tuple[Completion, ...] = field(repr=False)
    """One completion; or two of a pair, the chosen one first."""

    tools: str = field(default="", repr=False)
    """Descriptions of the tools, as a JSON array; empty without tools."""


def parse_completions(row: Row) -> PromptCompletions:
    """Return the prompt of a row with its completion, or with the two completions of a pair.

    Raises:
        DatasetError: the row has none of the accepted forms; names file and row.
    """
    if _has(row, "chosen") and _has(row, "rejected"):
        return parse_pair(row)
    key = next((key for key in ("completion", "response") if _has(row, key)), None)
    if key is None:
        raise DatasetError(f'{row.location} has neither a "completion" nor a pair of "chosen" and "rejected".')
    return PromptCompletions(_parse_prompt(row), (_parse_completion(key, row),), _parse_tools(row))


def parse_pair(row: Row) -> PromptCompletions:
    """Return the prompt of a row with its chosen and its rejected completion.

    Raises:
        DatasetError: the row is not a pair; names file and row.
    """
    if _has(row, "prompt"):
        completions = (_parse_completion("chosen", row), _parse_completion("rejected", row))
        return PromptCompletions(_parse_prompt(row), completions, _parse_tools(row))
    if isinstance(row.values.get("chosen"), list) and isinstance(row.values.get("rejected"), list):
        return _split_conversations(_parse_messages("chosen", row), _parse_messages("rejected", row), row)
    raise DatasetError(
        f'{row.location} has no "prompt"; without one, "chosen" and "rejected" must be conversations that start with '
        "the same messages."
    )


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


def _has(row: Row, key: str) -> bool:
    # Parquet has the same columns for all rows, so an absent value is a null there.
    return row.values.get(key) is not None


def _parse_prompt(row: Row) -> Prompt:
    prompt = row.values.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise DatasetError(f'{row.location}: "prompt" must be a string or a list of messages.')
    return tuple(_parse_messages("prompt", row))


def _parse_completion(key: str, row: Row) -> Completion:
    if not isinstance(row.values.get(key), list):
        return _parse_text(row.values, key, row)
    try:
        return read_completion(_parse_messages(key, row))
    except MalformedMessage:
        problem = "must be a string, or messages that begin with an assistant's"
        raise DatasetError(f'{row.location}: "{key}" {problem}.') from None


def _parse_tools(row: Row) -> str:
    tools = row.values.get("tools")
    try:
        return read_tools(json.loads(tools) if isinstance(tools, str) and tools else tools or None)
    except (ValueError, TypeError):
        raise DatasetError(f'{row.location}: "tools" must be a list of objects.') from None


def _split_conversations(chosen: list[Message], rejected: list[Message], row: Row) -> PromptCompletions:
    """Take the common messages as the prompt; each conversation must continue with one assistant message."""
    before_last = zip(chosen[:-1], rejected[:-1], strict=False)
    common = [message for message, _ in itertools.takewhile(lambda messages: messages[0] == messages[1], before_last)]
    for conversation in (chosen, rejected):
        if not common or len(conversation) != len(common) + 1 or conversation[-1].role != "assistant":
            raise DatasetError(
                f'{row.location}: "chosen" and "rejected" must have the same messages except for the last, an '
                "assistant's."
            )
    completions = (read_completion(chosen[-1:]), read_completion(rejected[-1:]))
    return PromptCompletions(tuple(common), completions, _parse_tools(row))


def _parse_messages(key: str, row: Row) -> list[Message]:
    messages = row.values[key]
    if not all(isinstance(message, dict) for message in messages):
        raise DatasetError(f'{row.location}: "{key}" must be a string or a list of messages.')
    try:
        return [read_message(message) for message in messages]
    except MalformedMessage as error:
        raise DatasetError(f'{row.location}: "{key}" has a message that cannot be read: {error}.') from None


def _parse_text(values: Mapping[str, Any], key: str, row: Row) -> str:
    text = values.get(key)
    if not isinstance(text, str):
        raise DatasetError(f'{row.location}: "{key}" must be a string.')
    return text
