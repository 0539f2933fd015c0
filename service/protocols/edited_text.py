"""The bodies of ``POST /v1/edit``: a completion, and the same with an edit that makes no answer better.

Pure: it depends neither on a web framework nor on an engine.
"""

from __future__ import annotations

import msgspec

from service.edits.offered import EditName
from service.errors import ItemTooLong
from service.protocols.json_body import decode_body
from service.settings import LimitSettings


class WireEditRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of ``POST /v1/edit``."""

    edit: EditName
    completion: str


_decoder = msgspec.json.Decoder(WireEditRequest)


def parse_edit_request(body: bytes, limits: LimitSettings) -> tuple[EditName, str]:
    """Decode a body to the name of an edit and a completion.

    Raises:
        MalformedBody, InvalidRequest: as for ``parse_score_request``.
        ItemTooLong: the completion has more characters than ``max_item_chars``, which bounds the time.
    """
    wire: WireEditRequest = decode_body(_decoder, body)
    num_chars = len(wire.completion)
    if num_chars > limits.max_item_chars:
        raise ItemTooLong(f"The completion has {num_chars} characters; the limit is {limits.max_item_chars}")
    return wire.edit, wire.completion


def render_edited(completion: str) -> bytes:
    """Render the answer."""
    return msgspec.json.encode({"completion": completion})
