"""``POST /v1/style``: where in texts the markers are that the style block counts. It runs no model."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.assembly import ServedModel
from service.diagnostics.lexicon import find_style_markers
from service.diagnostics.repetition import find_repetitions
from service.http.body import read_json_body
from service.protocols.style_spans import parse_style_request, render_style_spans

STYLE_PATH = "/v1/style"


def style_route(served: ServedModel) -> Route:
    """The route. Its time is bounded by the characters of all texts together (``limits.max_item_chars``)."""
    limits, tokenization = served.settings.limits, served.tokenization

    def answer(texts: list[str]) -> bytes:
        return render_style_spans(
            [(find_style_markers(text), find_repetitions(*tokenization.token_spans(text))) for text in texts]
        )

    async def style(request: Request) -> Response:
        texts = parse_style_request(await read_json_body(request.headers, request.stream(), limits), limits)
        return Response(await asyncio.to_thread(answer, texts), media_type="application/json")

    return Route(STYLE_PATH, style, methods=["POST"])
