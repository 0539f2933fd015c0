"""A checkpoint served on a real port by uvicorn, in a thread of the test's process: no process is started."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from http_application import asgi_app

from service.assembly import ServedModel, assemble
from service.http.access_log import AccessLog
from service.settings import read_settings


@contextmanager
def http_server(checkpoint: Path, **model: Any) -> Iterator[str]:
    """Serve a checkpoint in fp32 on the CPU, with these further settings of the model; yield the server's URL."""
    settings = {"path": str(checkpoint), "device": "cpu", "dtype": "float32", "num_threads": 1} | model
    served = assemble(read_settings({"model": settings}))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        log = AccessLog(str(checkpoint.parent / "requests.jsonl"))
        server = uvicorn.Server(
            uvicorn.Config(asgi_app(served, log), lifespan="off", log_config=None, log_level="critical")
        )
        thread = threading.Thread(target=asyncio.run, args=[_serve(served, server, listener)])
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            log.close()
        assert not thread.is_alive()


async def _serve(served: ServedModel, server: uvicorn.Server, listener: socket.socket) -> None:
    await served.scorer.start()
    try:
        await server.serve([listener])
    finally:
        await served.scorer.stop(0.0)
