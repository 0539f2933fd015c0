"""Refuses requests before anything of them is read, as cheaply as possible: under overload most are refused.

The refusals of a second are counted together, in the metrics and in one line of the access log.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.types import Scope, Send

from service.errors import Overloaded
from service.http.access_log import AccessLog
from service.http.facts import request_id_of
from service.http.loop_load import LoopLoad
from service.metrics import Metrics
from service.protocols.problem import MEDIA_TYPE, render_problem, retry_after_s

COUNT_S = 1.0
"""Seconds for which refusals are counted before they are published."""
OTHER = "other"
"""Route of a request for a path that has none; paths of clients appear in no log and no metric."""


class UnreadRefusals:
    """The refusals of one replica; used on its event loop alone.

    Args:
        load: of the event loop; decides.
        metrics: count refused requests.
        access_log: gets a line for those of each second.
        model_version: a header of each answer.
        route_names: the name of the route of each path.
        echoes_request_id: whether answers have ``X-Request-Id``; a host may add it.
    """

    def __init__(
        self,
        load: LoopLoad,
        metrics: Metrics,
        access_log: AccessLog,
        *,
        model_version: str,
        route_names: Mapping[str, str],
        echoes_request_id: bool,
    ) -> None:
        self.load = load
        self._metrics = metrics
        self._access_log = access_log
        self._model_version = model_version.encode()
        self._route_names = route_names
        self._echoes_request_id = echoes_request_id
        self._uncounted: Counter[str] = Counter()

    def refusal(self) -> Overloaded | None:
        """Why a request that arrives now is refused; None: it is read."""
        return self.load.unread_refusal()

    def has_route(self, path: str) -> bool:
        """Whether a path is that of a route, as it is: without a prefix of the host and without a slash at its end."""
        return path in self._route_names

    async def answer(self, refusal: Overloaded, scope: Scope, send: Send, *, is_before_host: bool = False) -> None:
        """Answer a request of an ASGI server.

        Args:
            refusal: why it is refused.
            scope: of the request.
            send: of the request.
            is_before_host: whether the host has not seen the request, so that it adds no header.
        """
        headers, content = self.response(refusal, request_id_of(scope), is_before_host=is_before_host)
        await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await send({"type": "http.response.body", "body": content})
        self.count(scope["path"].removeprefix(scope.get("root_path", "")))

    def response(
        self, refusal: Overloaded, request_id: str, *, is_before_host: bool = False
    ) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """Return the headers and the body of an answer."""
        content = render_problem(refusal, request_id)
        headers = [
            (b"content-type", MEDIA_TYPE.encode()),
            (b"content-length", b"%d" % len(content)),
            (b"retry-after", b"%d" % (retry_after_s(refusal, random.random()) or 1)),  # noqa: S311 - spreads clients
            (b"x-model-version", self._model_version),
        ]
        if self._echoes_request_id or is_before_host:
            headers.append((b"x-request-id", request_id.encode()))
        return headers, content

    def count(self, path: str) -> None:
        """Count a refusal."""
        if not self._uncounted:
            asyncio.get_running_loop().call_later(COUNT_S, self._publish)
        self._uncounted[self._route_names.get(path, OTHER)] += 1

    def _publish(self) -> None:
        refused, self._uncounted = self._uncounted, Counter()
        self._metrics.shed.labels(reason=Overloaded.code).inc(refused.total())
        for route, count in refused.items():
            self._metrics.requests.labels(route, Overloaded.code).inc(count)
        status, code = Overloaded.status, Overloaded.code
        self._access_log.write("refused", status=status, code=code, requests=refused.total())


@dataclass(slots=True)
class Gate:
    """The refusals of the application, once it is loaded, for what is made before it and sees requests first."""

    refusals: UnreadRefusals | None = None
