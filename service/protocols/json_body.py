"""JSON bodies of requests as structs; bodies that cannot be decoded as errors that repeat no text of them."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from service.errors import HttpError, MalformedBody
from service.protocols.violations import explain_malformed, explain_violation, invalid

_LONE_SURROGATE = re.compile(
    rb"(?<!\\)(?:\\\\)*+(?:\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)
"""An escape of half a surrogate pair: a high one without a low one after it, or a low one without a high one before it.
The search takes time in proportion to the bytes, whatever they are."""

ESCAPE_BYTES = len(rb"\uXXXX")

SEARCHED_BYTES = 1024 * 1024
"""Bytes of a body that is not JSON in which a lone surrogate is searched for."""


def decode_body(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """Decode a JSON body to the struct of its decoder.

    Raises:
        MalformedBody: not JSON, not UTF-8, a number that JSON does not have, or bytes after the end.
        InvalidRequest: a field is missing, unknown, of the wrong type or out of range; has the pointer to it.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise explain_violation(error, decoder.type) from None
    except RecursionError:
        raise MalformedBody("The body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(body, error) from None


def _malformed(body: bytes, error: Exception) -> HttpError:
    """Distinguish a lone surrogate (the caller's tokenizer cut a pair) from a body that is not JSON."""
    found = _LONE_SURROGATE.search(body, 0, SEARCHED_BYTES)
    is_cut = found is not None and len(body) > SEARCHED_BYTES and found.end() > SEARCHED_BYTES - ESCAPE_BYTES
    if found and not is_cut:  # where the search ends, the other half of a pair may not have been seen
        return invalid("", "lone_surrogate", "A string has a lone surrogate, which is not a character")
    return explain_malformed(error, body)
