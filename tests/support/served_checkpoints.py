"""Checkpoints served by the real HTTP application in this process, without Ray and without a port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2

from service.assembly import assemble
from service.http.access_log import AccessLog
from service.http.open_requests import OpenRequests
from service.http.routes import create_app
from service.settings import read_settings


@asynccontextmanager
async def application(checkpoint: Path, *, dtype: str = "float32", **model: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """Serve the checkpoint folder, with further settings of ``model``, and yield a client of the application."""
    served = assemble(read_settings({"model": {"path": str(checkpoint), "dtype": dtype, **model}}))
    access_log = AccessLog(str(checkpoint.parent / "requests.log"))

    async def exposition() -> str:
        return served.metrics.render().decode()

    app = create_app(served, exposition, access_log, OpenRequests())
    await served.scorer.start()
    try:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://app") as client:
            yield client
    finally:
        await served.scorer.stop(0.0)
        access_log.close()
