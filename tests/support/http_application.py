"""The HTTP application of one replica without Ray, in this process, with a client for it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2

from service.api_keys import ApiKeys
from service.assembly import ServedModel, assemble
from service.engines.oracle import OracleEngine, OracleFaults
from service.http.access_log import AccessLog
from service.http.open_requests import OpenRequests
from service.http.routes import create_app
from service.http.tracing import RequestTracer, request_tracer
from service.pipeline import Pipeline
from service.scorer import Scorer
from service.settings import read_settings

ORACLE = {"engine": "oracle"}


class Application:
    """A started application."""

    def __init__(self, served: ServedModel, client: httpx2.AsyncClient, access_log: AccessLog) -> None:
        self.served = served
        self.client = client
        self.access_log = access_log

    async def post(self, route: str, body: Any, **headers: str) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.client.post(route, content=content, headers={"Content-Type": "application/json"} | headers)

    async def rewards(self, *items: dict[str, Any], **options: Any) -> list[float]:
        """The rewards that the native route gives the items."""
        answer = await self.post("/v1/score", {"items": list(items), **options})
        return [result["reward"] for result in answer.json()["results"]]


def asgi_app(
    served: ServedModel, log: AccessLog, api_keys: ApiKeys | None = None, tracer: RequestTracer | None = None
) -> Any:
    """The routes of one replica."""

    async def exposition() -> str:
        return served.metrics.render().decode()

    return create_app(served, exposition, log, OpenRequests(), api_keys=api_keys, tracer=tracer)


@asynccontextmanager
async def application(
    folder: Path, *, faults: OracleFaults | None = None, api_keys: ApiKeys | None = None, **tree: Any
) -> AsyncIterator[Application]:
    """Start the application with the given settings; without a model it is the oracle.

    Args:
        folder: gets the access log.
        faults: of the oracle.
        api_keys: who may call; None: everybody.
        tree: the settings tree.
    """
    settings = read_settings({"model": ORACLE} | tree)
    served = assemble(settings)
    if faults is not None:
        # A small batch: a slow oracle would take long to warm up.
        engine = OracleEngine(faults=faults, max_input_tokens=64, max_batch_tokens=64)
        scorer = Scorer(served.tokenization, Pipeline(engine), settings.limits, settings.batching, served.metrics)
        served = replace(served, scorer=scorer)

    log = AccessLog(str(folder / "requests.jsonl"))
    identity = served.identity
    tracer = request_tracer(settings.tracing, model=identity.name, version=identity.version, replica="local")
    app = asgi_app(served, log, api_keys, tracer)
    await served.scorer.start()
    try:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://app") as client:
            yield Application(served, client, log)
    finally:
        await served.scorer.stop(0.0)
        if tracer is not None:
            tracer.close()
        log.close()


@asynccontextmanager
async def checkpoint_client(
    checkpoint: Path, *, dtype: str = "float32", **model: Any
) -> AsyncIterator[httpx2.AsyncClient]:
    """Serve a checkpoint folder, with further settings of ``model``, and yield a client of the application."""
    async with application(checkpoint.parent, model={"path": str(checkpoint), "dtype": dtype, **model}) as started:
        yield started.client
