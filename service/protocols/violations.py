"""Explains why a body does not fit its schema: which field, what it should be, and where the JSON breaks off.

Pure. What is expected is read from the types that decode the body, so it cannot differ from what is accepted. Of the
body itself a message repeats nothing but the name of an unknown field, and that only if it is a short identifier.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from msgspec import inspect

from service.errors import InvalidRequest, MalformedBody, Violation

_LOCATION = re.compile(r" - at `\$([^`]*)`\Z")
_STEP = re.compile(r"\.([a-z_]+)|\[(\d+|\.\.\.)\]")
_ANY_KEY = "..."
"""The step to a value of an object whose keys the schema leaves open; msgspec does not name the key."""

_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `([a-z_]+)`")
_FOUND = re.compile(r", got `([a-z]+)`")
_OUT_OF_RANGE = re.compile(
    r"Expected `[a-z]+` (?:of length )?[<>]=? |Invalid (enum )?value|(Integer value|Number) out of range"
)
_SYNTAX = re.compile(r"JSON is malformed: (.+) \(byte (\d+)\)\Z")
_NOT_A_NUMBER = re.compile(rb"NaN|-?Inf")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
"""Names that may be repeated in a message."""

_SYNONYMS = {
    "answer": ("completion", "completions"),
    "answers": ("completions", "completion"),
    "candidates": ("completions",),
    "chosen": ("completion",),
    "conversation": ("prompt",),
    "data": ("items",),
    "ids": ("token_ids",),
    "input": ("prompt", "items"),
    "input_ids": ("token_ids",),
    "inputs": ("items",),
    "instruction": ("prompt",),
    "instances": ("items",),
    "messages": ("prompt",),
    "output": ("completion", "completions"),
    "outputs": ("completions",),
    "query": ("prompt", "text"),
    "question": ("prompt",),
    "response": ("completion", "completions"),
    "responses": ("completions",),
    "samples": ("items",),
    "texts": ("items",),
    "timeout": ("timeout_ms",),
    "tokens": ("token_ids",),
    "truncate": ("truncation",),
}
"""Names of other services for what a field of ours holds."""

_KINDS = {
    "array": "a list",
    "bool": "a boolean",
    "float": "a number with a fraction or an exponent",
    "int": "an integer",
    "null": "null",
    "object": "an object",
    "str": "a string",
}
"""Types of JSON values by the names that msgspec has for them."""


def explain_violation(error: msgspec.ValidationError, schema: Any) -> InvalidRequest:
    """Return the problem of a body that is JSON but not of the struct ``schema``, with the pointer to the value."""
    message = str(error)
    root = inspect.type_info(schema)
    location = _LOCATION.search(message)
    steps = _steps(location[1] if location else "", _field_names(root))
    pointer = "".join(f"/{step}" for step in steps if step != _ANY_KEY)
    message = message[: location.start()] if location else message
    if unknown := _UNKNOWN.match(message):
        return invalid(pointer, "unknown_field", _unknown_field(unknown[1], root, _type_at(root, steps)))
    if missing := _MISSING.match(message):
        kind = _type_at(root, [*steps, missing[1]])
        detail = f'Missing field "{missing[1]}"' + (f": {_expected(kind)}" if kind else "")
        return invalid(f"{pointer}/{missing[1]}", "missing_field", detail)
    expected = f"Expected {_expected(_type_at(root, steps))}" + (" as every value" if _ANY_KEY in steps else "")
    if _OUT_OF_RANGE.match(message):
        return invalid(pointer, "out_of_range", expected)
    got = _FOUND.search(message)
    found = _KINDS.get(got[1]) if got else None
    return invalid(pointer, "wrong_type", f"{expected}, found {found}" if found else expected)


def explain_malformed(error: Exception, body: bytes) -> MalformedBody:
    """Return the problem of a body that is not JSON in UTF-8, with the position where it breaks off."""
    if not body.strip():
        return MalformedBody("The body is empty; send a JSON object")
    if body.startswith(b"\xef\xbb\xbf"):
        return MalformedBody("The body begins with a byte-order mark; send JSON in UTF-8 without one")
    try:
        body.decode()
    except UnicodeDecodeError as wrong:
        return MalformedBody(f"The body is not UTF-8 ({_place(body, wrong.start)})")
    syntax = _SYNTAX.match(str(error))
    if syntax is None:
        return MalformedBody(f"The body is not complete JSON: it ends after {len(body)} bytes")
    offset = int(syntax[2])
    if _NOT_A_NUMBER.match(body, offset):
        return MalformedBody(f"The body is not JSON, which has no NaN and no infinity ({_place(body, offset)})")
    return MalformedBody(f"The body is not JSON: {syntax[1]} ({_place(body, offset)})")


def invalid(pointer: str, code: str, detail: str) -> InvalidRequest:
    """Return the problem of one value."""
    return InvalidRequest(f"{detail} (at {pointer or 'the whole body'})", [Violation(pointer, code)])


def _place(body: bytes, offset: int) -> str:
    line = body.count(b"\n", 0, offset) + 1
    column = offset - body.rfind(b"\n", 0, offset)
    return f"byte {offset}, line {line}, column {column}"


def _steps(location: str, names: frozenset[str]) -> list[str]:
    """The steps of a location; a name that is no field of the schema is one of the body and ends them."""
    steps = []
    for name, index in _STEP.findall(location):
        if name and name not in names:
            break
        steps.append(name or index)
    return steps


def _unknown_field(name: str, root: inspect.Type, parent: inspect.Type | None) -> str:
    struct = next(_structs_of(parent), None) if parent is not None else None
    fields = [field.encode_name for field in struct.fields] if struct else []
    if not _IDENTIFIER.fullmatch(name):
        shown = f"Unknown field with a name of {len(name)} characters"
    else:
        shown = f'Unknown field "{name}"'
        if nearest := _nearest(name, fields):
            return f'{shown}; did you mean "{nearest}"?'
        for other in _all_structs(root):
            if name in (field.encode_name for field in other.fields):
                return f"{shown}; it is a field of {_with_article(_noun(other))}"
    return f"{shown}; {_with_article(_noun(struct))} has {', '.join(fields)}" if struct else shown


def _nearest(name: str, fields: Sequence[str]) -> str | None:
    for synonym in _SYNONYMS.get(name.lower(), ()):
        if synonym in fields:
            return synonym
    return next(iter(difflib.get_close_matches(name.lower(), fields, n=1, cutoff=0.7)), None)


def _type_at(root: inspect.Type, steps: Sequence[str]) -> inspect.Type | None:
    """The type of the value that the steps lead to; None where the schema leaves it open."""
    found: inspect.Type | None = root
    for step in steps:
        found = None if found is None else _below(found, step)
    return found


def _below(parent: inspect.Type, step: str) -> inspect.Type | None:
    tags = [struct.tag for struct in _structs_of(parent) if struct.tag_field == step and struct.tag is not None]
    if tags:
        return inspect.LiteralType(tuple(tags))
    for kind in _members(parent):
        if isinstance(kind, inspect.ListType) and step.isdecimal():
            return kind.item_type
        if isinstance(kind, inspect.DictType) and step == _ANY_KEY:
            return kind.value_type
        if isinstance(kind, inspect.StructType):
            for field in kind.fields:
                if field.encode_name == step:
                    return field.type
    return None


def _members(kind: inspect.Type) -> tuple[inspect.Type, ...]:
    """The alternatives of a type without null, which stands for an absent field."""
    if isinstance(kind, inspect.Metadata):
        return _members(kind.type)
    if isinstance(kind, inspect.UnionType):
        return tuple(inner for member in kind.types for inner in _members(member))
    return () if isinstance(kind, inspect.NoneType) else (kind,)


def _structs_of(kind: inspect.Type) -> Iterator[inspect.StructType]:
    return (member for member in _members(kind) if isinstance(member, inspect.StructType))


def _all_structs(kind: inspect.Type) -> Iterator[inspect.StructType]:
    for member in _members(kind):
        if isinstance(member, inspect.StructType):
            yield member
            for field in member.fields:
                yield from _all_structs(field.type)
        elif isinstance(member, inspect.ListType):
            yield from _all_structs(member.item_type)


def _field_names(root: inspect.Type) -> frozenset[str]:
    structs = list(_all_structs(root))
    tag_fields = {struct.tag_field for struct in structs if struct.tag_field is not None}
    return frozenset({field.encode_name for struct in structs for field in struct.fields} | tag_fields)


def _expected(kind: inspect.Type | None) -> str:
    if kind is None:
        return "a value of another type"
    # Lists last, because they name alternatives of their own.
    members = sorted(_members(kind), key=lambda member: isinstance(member, inspect.ListType))
    return " or ".join(map(_one, members)) or "null"


def _one(kind: inspect.Type) -> str:
    match kind:
        case inspect.StrType():
            return "a string" + _most_characters(kind)
        case inspect.IntType():
            return "an integer" + _range(kind)
        case inspect.FloatType():
            return "a number" + _range(kind)
        case inspect.BoolType():
            return "a boolean"
        case inspect.LiteralType():
            return "one of " + ", ".join(f'"{value}"' for value in kind.values)
        case inspect.ListType():
            return "a list of " + " or ".join(_several(member) for member in _members(kind.item_type))
        case inspect.StructType():
            return f"an object with {', '.join(field.encode_name for field in kind.fields)}"
        case _:
            return "an object" if isinstance(kind, inspect.DictType) else "a value of another type"


def _several(kind: inspect.Type) -> str:
    match kind:
        case inspect.StrType():
            return "strings"
        case inspect.IntType():
            return "integers" + _range(kind)
        case inspect.StructType():
            return f"{_noun(kind)}s"
        case _:
            return "objects" if isinstance(kind, inspect.DictType) else "values"


def _most_characters(kind: inspect.StrType) -> str:
    return "" if kind.max_length is None else f" of at most {kind.max_length} characters"


def _range(kind: inspect.IntType | inspect.FloatType) -> str:
    lowest, highest = (None if bound is None else _digits(bound) for bound in (kind.ge, kind.le))
    if lowest is not None and highest is not None:
        return f" from {lowest} to {highest}"
    return f" of at least {lowest}" if lowest is not None else ""


def _digits(bound: Any) -> str:
    return f"{bound:d}" if isinstance(bound, int) else f"{bound:g}"


def _noun(struct: inspect.StructType) -> str:
    """The glossary's word for what a struct holds: WireItem is an item, WireScoreRequest a score request."""
    return " ".join(re.findall("[A-Z][a-z]+", struct.cls.__name__.removeprefix("Wire"))).lower()


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[:1] in "aeiou" else f"a {noun}"
