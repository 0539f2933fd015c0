"""Turns of conversations as callers and data files write them, checked and brought into the form of chat templates.

Accepted beside ``role`` and ``content`` are the fields of the OpenAI format that chat templates read: ``name``,
``tool_calls``, ``tool_call_id`` and ``reasoning_content``. A content may be a list of parts of type text, whose texts
are joined. Arguments of a tool call that are JSON in a string are decoded, because templates print them as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from service.records import Completion, Message

TEXT_FIELDS = ("name", "tool_call_id", "reasoning_content")
"""Further fields of a message that are strings."""

FIELDS = ("role", "content", "tool_calls", *TEXT_FIELDS)
"""All fields of a message."""

_PART_TYPE = re.compile(r"[a-z_]{1,32}")


class MalformedMessage(ValueError):
    """A message that no template gets. ``pointer``: the value inside the message; ``code``: what is wrong with it."""

    def __init__(self, pointer: str, code: str, detail: str) -> None:
        super().__init__(detail)
        self.pointer = pointer
        self.code = code


def read_message(values: Mapping[str, Any]) -> Message:
    """Return the message of an object; null fields count as absent, and unknown fields are ignored.

    Raises:
        MalformedMessage: a field is missing, of the wrong type, or a part that is not text.
    """
    role = values.get("role")
    if not isinstance(role, str):
        raise MalformedMessage("/role", "wrong_type", "The role of a message must be a string")
    fields: dict[str, Any] = {}
    for name in TEXT_FIELDS:
        value = values.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise MalformedMessage(f"/{name}", "wrong_type", f"The {name} of a message must be a string")
        fields[name] = value
    calls = values.get("tool_calls")
    if calls:
        fields["tool_calls"] = _read_calls(calls)
    content = _read_content(values.get("content"))
    if content is None and not calls:
        raise MalformedMessage("/content", "missing_field", "A message without tool_calls must have a content")
    return Message(role, content, json.dumps(fields, ensure_ascii=False) if fields else "")


def read_completion(messages: Sequence[Message]) -> Completion:
    """Return the completion of one or more turns: a string where it is one assistant turn that is only text.

    Raises:
        MalformedMessage: there is no turn, or the first one is not an assistant's.
    """
    if not messages or messages[0].role != "assistant":
        raise MalformedMessage("", "out_of_range", "A completion of messages must begin with an assistant's")
    first = messages[0]
    return first.text if len(messages) == 1 and not first.fields else tuple(messages)


def read_tools(tools: Sequence[Any] | None) -> str:
    """Return the descriptions of tools as JSON; empty without tools.

    Raises:
        MalformedMessage: a description is not an object.
    """
    for index, tool in enumerate(tools or ()):
        if not isinstance(tool, dict):
            raise MalformedMessage(f"/{index}", "wrong_type", "A tool must be an object")
    return json.dumps(tools, ensure_ascii=False) if tools else ""


def _read_content(content: object) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise MalformedMessage("/content", "wrong_type", "The content of a message must be a string or a list of parts")
    return "".join(_read_part(part, f"/content/{index}") for index, part in enumerate(content))


def _read_part(part: object, pointer: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise MalformedMessage(pointer, "wrong_type", "A content part must be an object with a type")
    if kind != "text":
        named = f" {kind}" if _PART_TYPE.fullmatch(kind) else ""
        raise MalformedMessage(
            f"{pointer}/type", "out_of_range", f"Content parts of type{named} are not scored: text only"
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise MalformedMessage(f"{pointer}/text", "wrong_type", "The text of a content part must be a string")
    return text


def _read_calls(calls: object) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise MalformedMessage("/tool_calls", "wrong_type", "The tool_calls of a message must be a list")
    return [_read_call(call, f"/tool_calls/{index}") for index, call in enumerate(calls)]


def _read_call(call: object, pointer: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise MalformedMessage(pointer, "wrong_type", "A tool call must have a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        function = {**function, "arguments": _decoded(arguments)}
    elif arguments is not None and not isinstance(arguments, dict):
        raise MalformedMessage(
            f"{pointer}/function/arguments", "wrong_type", "The arguments of a tool call must be an object or a string"
        )
    return {**call, "function": function}


def _decoded(arguments: str) -> Any:
    """Return the object that a string holds as JSON, else the string: a policy may write arguments that are no JSON."""
    try:
        decoded = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return decoded if isinstance(decoded, dict) else arguments
