"""Reads a JSON object into a dataclass: members that it does not know are left out, types are checked."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from reward_client.errors import BadAnswer

T = TypeVar("T")


def read_fields(kind: type[T], members: Mapping[str, Any], name: str) -> T:
    """Return an instance of a dataclass.

    Args:
        kind: the dataclass. Its fields are numbers, strings, booleans, mappings, other dataclasses, or None.
        members: of the JSON object.
        name: what the object is, for a message.

    Raises:
        BadAnswer: a member has another type than its field.
    """
    values = {
        field: _read(hint, members[field], f"{field} of {name}")
        for field, hint in get_type_hints(kind).items()
        if field in members
    }
    try:
        return kind(**values)
    except TypeError:
        raise BadAnswer(f"The response does not have all members of {name}") from None


def _read(hint: Any, value: Any, name: str) -> Any:
    for option in get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        origin = get_origin(option) or option
        if dataclasses.is_dataclass(origin) and isinstance(origin, type) and isinstance(value, dict):
            return read_fields(origin, value, name)
        if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if origin is tuple and isinstance(value, list):
            return tuple(value)
        if isinstance(value, origin) and isinstance(value, bool) == (origin is bool):
            return value
    raise BadAnswer(f"The response has another type than the protocol for {name}")
