"""The reference of the wire format, from the OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from docs.site.markdown import anchor, page, sentence, table
from service.http.openapi import document
from service.protocols.registry import enabled_protocols
from service.settings import ProtocolSettings

Schema = Mapping[str, Any]
_FIELDS = ("field", "type", "required", "meaning")
_MAX_DEPTH = 4


def wire_reference() -> str:
    """Return the page."""
    openapi = document(enabled_protocols(ProtocolSettings()))
    return page(
        "Wire format",
        "`GET /openapi.json` of a running service has the same as an OpenAPI 3.1 document. Bodies are JSON with "
        "`Content-Type: application/json`, optionally with "
        "`Content-Encoding: gzip`, `zstd` or `deflate`. A field that is `null` counts as "
        "left out; an unknown field is an error. Headers of requests: `Authorization`, `X-Run-Id`, `X-Request-Id`.",
        "## Routes",
        *_routes(openapi["paths"]),
        "## Schemas",
        *_schemas(openapi["components"]["schemas"]),
    )


def _routes(paths: Mapping[str, Any]) -> Iterator[str]:
    for path, operations in paths.items():
        for method, operation in operations.items():
            if method in {"get", "post"}:
                yield _route(f"{method.upper()} {path}", operation)


def _route(name: str, operation: Schema) -> str:
    parts = [f"### {name}", f"{operation['summary']}."]
    if parameters := operation.get("parameters"):
        named = [(f"`{one['name']}`", one["in"], one.get("description", "")) for one in parameters]
        parts.append(table(("parameter", "in", "meaning"), named))
    if body := operation.get("requestBody"):
        parts.append(f"Body: {_type(_json(body['content']))}.")
    success = operation["responses"]["200"]
    schema = _json(success["content"])
    parts.append(f"Answer: {_type(schema)}. {success.get('description', '')}".strip())
    if rows := list(_rows(schema, "", 0)):
        parts.append(table(_FIELDS, rows))
    refusals = sorted(status for status in operation["responses"] if status != "200")
    if refusals:
        parts.append(f"Problems: {', '.join(refusals)} ([errors](errors.md)).")
    return "\n\n".join(parts)


def _json(content: Mapping[str, Any]) -> Schema:
    schema: Schema = next(iter(content.values()))["schema"]
    return schema


def _schemas(schemas: Mapping[str, Schema]) -> Iterator[str]:
    for name, schema in schemas.items():
        parts = [f"### {name}"]
        if about := sentence(schema.get("description")):
            parts.append(about)
        rows = list(_rows(schema, "", 0))
        parts.append(table(_FIELDS, rows) if rows else f"{_type(schema)}.")
        yield "\n\n".join(parts)


def _rows(schema: Schema, prefix: str, depth: int) -> Iterator[tuple[str, str, str, str]]:
    """Yield a row for each field, also of objects in objects, whose names are joined by dots."""
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        default = "" if field.get("default") is None else f"Default: `{json.dumps(field['default'])}`."
        about = " ".join(filter(None, [sentence(field.get("description")), default]))
        yield f"`{prefix}{name}`", _type(field), "yes" if name in required else "", about
        if depth < _MAX_DEPTH:
            for inner, mark in _inner(field):
                yield from _rows(inner, f"{prefix}{name}{mark}.", depth + 1)


def _inner(field: Schema) -> Iterator[tuple[Schema, str]]:
    """Yield the objects that a field holds in place, with what stands behind the name of the field."""
    for one in (field, *field.get("anyOf", ()), *field.get("oneOf", ())):
        if one.get("properties"):
            yield one, ""
        elif one.get("items", {}).get("properties"):
            yield one["items"], "[]"


def _type(schema: Schema) -> str:
    if reference := schema.get("$ref"):
        name = reference.rpartition("/")[2]
        return f"[{name}](#{anchor(name)})"
    if options := [*schema.get("anyOf", ()), *(schema.get("oneOf", ()) if "properties" not in schema else ())]:
        return " or ".join(dict.fromkeys(_type(one) for one in options))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join("null" if value is None else f"`{value}`" for value in schema["enum"])
    kind = schema.get("type", "any value")
    names = [kind] if isinstance(kind, str) else list(kind)
    return " or ".join(_with_content(name, schema) for name in names)


def _with_content(kind: str, schema: Schema) -> str:
    if kind == "array" and schema.get("items"):
        return f"array of {_type(schema['items'])}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return f"object of {_type(schema['additionalProperties'])}"
    return kind
