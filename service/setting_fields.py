"""What a tree of settings declares: names of settings, the values that each takes, and sentences on invalid ones.

Pure; it works on any tree of pydantic models and knows no setting itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

VALUES = "values"
"""Key under which a setting says which values it takes, where its type does not."""


def setting_names(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings of a tree, in the order of declaration."""
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            yield from setting_names(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean X?)"`` for the known name nearest to a mistyped one, or an empty string."""
    near = get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def describe_invalid(
    error: ValidationError,
    known: Sequence[str],
    tree: type[BaseModel],
    source_of: Callable[[str], str | None] = lambda _: None,
) -> str:
    """Return the sentence that names each invalid setting, the values that it takes and, if known, its source.

    Args:
        error: as pydantic raised it.
        known: the dotted names that exist, for suggestions.
        tree: the class whose names they are.
        source_of: maps a dotted name to where its value comes from, or None.
    """
    names = [*known, *dict.fromkeys(name.partition(".")[0] for name in known)]
    reasons: dict[str, str] = {}
    for problem in error.errors(include_input=False, include_url=False):
        name = _setting_at(problem["loc"], known)
        if problem["type"] == "extra_forbidden":
            reasons.setdefault(name, f"is not a setting{did_you_mean(name, names)}")
        elif field := setting_field(name, tree):
            reasons.setdefault(name, f"must be {allowed_values(field)}")
        else:
            reasons.setdefault(name, "must be a mapping of settings")
    sentences = []
    for name, reason in reasons.items():
        source = source_of(name)
        sentences.append(f"{name}{f' ({source})' if source else ''}: {reason}")
    return f"The settings are not valid: {'; '.join(sentences)}."


def setting_field(name: str, tree: type[BaseModel]) -> FieldInfo | None:
    """Return the declaration of a setting, given its dotted name; None for a section or an unknown name."""
    *sections, last = name.split(".")
    for part in sections:
        section = tree.model_fields[part].annotation if part in tree.model_fields else None
        if not is_section(section):
            return None
        tree = section
    field = tree.model_fields.get(last)
    return None if field is None or is_section(field.annotation) else field


def is_section(annotation: object) -> TypeGuard[type[BaseModel]]:
    """Whether the type of a field of the tree is a section."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def allowed_values(field: FieldInfo) -> str:
    """Return which values a setting takes, as in ``a whole number from 1 to 65,535, or null``."""
    if isinstance(field.json_schema_extra, dict) and VALUES in field.json_schema_extra:
        return str(field.json_schema_extra[VALUES])
    members = get_args(field.annotation) if get_origin(field.annotation) in {Union, UnionType} else (field.annotation,)
    words = [value for member in members if get_origin(member) is Literal for value in get_args(member)]
    kinds = {
        bool: "true or false",
        int: f"a whole number{_range(field)}",
        float: f"a number{_range(field)}",
        str: "a text",
    }
    allowed = [kinds[member] for member in members if member in kinds]
    if words:
        allowed.append(f"one of {', '.join(map(str, words))}" if len(words) > 1 else str(words[0]))
    if type(None) in members:
        allowed.append("null")
    return " or ".join(allowed) if len(allowed) < 3 else f"{', '.join(allowed[:-1])} or {allowed[-1]}"


def _range(field: FieldInfo) -> str:
    """The range of a number, as in `` from 1 to 10``, `` of at least 1``, `` above 0 and below 1``; empty if any."""
    limits = {
        name: getattr(constraint, name)
        for constraint in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if hasattr(constraint, name)
    }
    if {"ge", "le"} <= limits.keys():
        return f" from {limits['ge']:,} to {limits['le']:,}"
    terms = {"ge": "of at least", "gt": "above", "le": "up to", "lt": "below"}
    return "".join(
        f" {'and ' if number else ''}{terms[name]} {limit:,}" for number, (name, limit) in enumerate(limits.items())
    )


def _setting_at(location: tuple[int | str, ...], known: Sequence[str]) -> str:
    """The dotted name of an error's location, without the members of unions that pydantic appends."""
    parts = [str(part) for part in location]
    names = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((name for name in names if name in known), names[0])
