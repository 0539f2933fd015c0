"""The page for a browser: static files of the folder ``page``, each under its own path.

The files hold no data, so they need no API key. All figures come from the routes that programs use, with the key that
the reader types. No file is read before it is asked for.
"""

from __future__ import annotations

import hashlib
import html
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGE_PATH = "/"
FILES = {
    PAGE_PATH: INDEX,
    **{
        f"/page/{name}": name
        for name in (
            "style.css",
            "icon.svg",
            "main.js",
            "service.js",
            "elements.js",
            "numbers.js",
            "playground.js",
            "conversation.js",
            "completion.js",
            "marks.js",
            "examples.js",
            "verdict.js",
            "reasons.js",
            "snippets.js",
            "pairs.js",
            "pairs_panel.js",
            "exposition.js",
            "charts.js",
            "live.js",
            "alarms.js",
            "monitors.js",
            "drift.js",
            "model.js",
        )
    },
}
"""Names in the folder by their paths; nothing else of the folder has a path."""

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'self'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""Only files of this service run or are fetched, no text can become markup, and no other site can frame the page."""

_BASE = b'<base href="/">'


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    etag: str
    media_type: str


def page_routes() -> list[Route]:
    """The routes of the page, with one endpoint, so that logs and metrics have one name for all of them."""

    async def page(request: Request) -> Response:
        prefix = request.scope.get("root_path", "")
        path = request.scope["path"].removeprefix(prefix) or PAGE_PATH
        file = _read(FILES[path], prefix)
        headers = SECURITY_HEADERS | {"ETag": file.etag}
        if request.headers.get("If-None-Match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers | {"Content-Type": file.media_type})

    return [Route(path, page, include_in_schema=False) for path in FILES]


@cache
def _read(name: str, prefix: str) -> _File:
    """Return a file; links of the page are relative to the prefix of the application's routes."""
    path = FOLDER / name
    content = path.read_bytes()
    if name == INDEX:
        content = content.replace(_BASE, f'<base href="{html.escape(prefix)}/">'.encode())
    return _File(content, f'"{hashlib.sha256(content).hexdigest()[:32]}"', MEDIA_TYPES[path.suffix])
