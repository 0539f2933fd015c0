"""``POST /v1/edit``: a completion as a policy would change it that exploits a reward model. It runs no model."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.assembly import ServedModel
from service.edits.offered import edited
from service.http.body import read_json_body
from service.protocols.edited_text import parse_edit_request, render_edited

EDIT_PATH = "/v1/edit"


def edit_route(served: ServedModel) -> Route:
    """The route. Its time is linear in the characters of the completion (``limits.max_item_chars``)."""
    limits = served.settings.limits

    async def edit(request: Request) -> Response:
        name, completion = parse_edit_request(await read_json_body(request.headers, request.stream(), limits), limits)
        return Response(render_edited(await asyncio.to_thread(edited, name, completion)), media_type="application/json")

    return Route(EDIT_PATH, edit, methods=["POST"])
