"""The asynchronous client: connections, deadline, retries and concurrent chunks.

Requests are built in ``requests``, responses validated in ``answers``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2

from reward_client.answers import (
    ChunkScores,
    Comparison,
    ScoredItem,
    join_scores,
    read_comparison,
    read_object,
    read_problem,
    read_scores,
)
from reward_client.errors import BadAnswer, ClientDeadlineExceeded, RequestRejected
from reward_client.options import DiagnosticsLevel, TemplateChoice, Truncation
from reward_client.provenance import ReferenceCheck
from reward_client.references import (
    Reference,
    read_reference_check,
    reference_name,
    reference_route,
    refusal_of_check,
    report_reference_check,
)
from reward_client.requests import (
    DEFAULT_CHUNKS,
    ChunkLimits,
    Completion,
    Prompt,
    WireItem,
    chunk_ranges,
    completion_content,
    encode,
    encode_items,
    exchange_items,
    group_key,
    prompt_content,
    score_body,
    timeout_ms,
    without_none,
)
from reward_client.retries import (
    DEFAULT_RETRY_POLICY,
    AttemptFailedError,
    MixedVersionsError,
    RetryPolicy,
    call_with_retries,
    read_retry_after,
)

T = TypeVar("T")

# Below the 5 s after which common servers close an idle connection: the client should close it first.
IDLE_CONNECTION_S = 4.0
CONNECT_TIMEOUT_S = 10.0
READY_POLL_S = 0.25


class AsyncRewardClient:
    """Scores over HTTP from an event loop.

    Connections are kept alive and belong to the loop that opened them. One client may be used from several loops
    (trainers compute rewards on a loop of their own): each gets its own connections. It can be pickled, without them.

    Args:
        url: where the service listens, such as ``http://127.0.0.1:8000``.
        deadline_s: seconds within which a call returns or raises; the service receives what is left.
        max_connections: concurrent requests per event loop.
        chunks: how large calls are split into requests.
        retries: the policy after a 5xx or a broken connection. A 4xx is never retried.
        headers: sent with each request, such as ``{"X-Run-Id": "ppo-7"}`` or an ``Authorization``.
        reference: the KL reference of the training run: its checkpoint folder, the hash over its weights, or its name.
            The first call warns (ReferenceWarning) if the reward model was initialised from another checkpoint.
        require_reference: raise ReferenceMismatch instead, also where it is unknown.
    """

    def __init__(
        self,
        url: str,
        *,
        deadline_s: float = 600.0,
        max_connections: int = 16,
        chunks: ChunkLimits = DEFAULT_CHUNKS,
        retries: RetryPolicy = DEFAULT_RETRY_POLICY,
        headers: Mapping[str, str] | None = None,
        reference: Reference | None = None,
        require_reference: bool = False,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError("The url of the service must start with http:// or https://")
        self.url = url.rstrip("/")
        self.deadline_s = deadline_s
        self.max_connections = max_connections
        self.chunks = chunks
        self.retries = retries
        self.headers = dict(headers or {})
        self.reference = None if reference is None else reference_name(reference)
        self.require_reference = require_reference
        self._reference_checked = self.reference is None
        self._pools: dict[asyncio.AbstractEventLoop, httpx2.AsyncClient] = {}

    async def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        *,
        truncation: Truncation | None = None,
        template: TemplateChoice | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[float]:
        """Return the raw reward of each completion, in input order.

        Args:
            prompts: texts, or conversations as lists of ``{"role", "content"}``.
            completions: one for each prompt; texts, or lists of messages that begin with an assistant's.
            truncation: what happens to an item that is too long; None: the service's setting.
            template: how a plain-text prompt is rendered; None: the service's setting.
            chat_template_kwargs: values for the chat template, of names that the service allows.

        Raises:
            ValueError: the lists differ in length, or an item cannot be written as JSON.
            ClientError: no rewards; see ``score_items``.
        """
        items = exchange_items(prompts, completions)
        scored = await self.score_items(
            items,
            diagnostics="none",
            truncation=truncation,
            template=template,
            chat_template_kwargs=chat_template_kwargs,
        )
        return [item.reward for item in scored]

    async def score_items(
        self,
        items: Iterable[WireItem],
        *,
        diagnostics: DiagnosticsLevel = "basic",
        truncation: Truncation | None = None,
        template: TemplateChoice | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[ScoredItem]:
        """Return reward and diagnostics of each item, in input order.

        All come from one model version: when the served model changes during a call, the whole call is
        scored again.

        Args:
            items: objects of the wire format: ``prompt`` and ``completion`` (and ``tools``), or ``text``, or
                ``token_ids``; and ``id``, ``group``.
            diagnostics: which diagnostics are returned in addition to the reward.
            truncation: as for ``score``.
            template: as for ``score``.
            chat_template_kwargs: as for ``score``.

        Raises:
            RequestRejected: the service refused the request (4xx).
            ItemsFailed: some items have no reward; carries the rewards of the others.
            BadAnswer: the response violates the protocol, or the model changed during every attempt.
            ServiceUnavailable: every attempt ended in a 5xx or a broken connection.
            ClientDeadlineExceeded: ``deadline_s`` passed, or the Retry-After of the service exceeds it.
            ReferenceMismatch: ``require_reference`` is set and the check failed.
            ValueError: an item cannot be written as JSON.
        """
        item_list = list(items)
        if not item_list:
            return []
        encoded = encode_items(item_list)
        ranges = chunk_ranges([len(item) for item in encoded], [group_key(item) for item in item_list], self.chunks)
        chunks = [encoded[part.start : part.stop] for part in ranges]
        options = without_none(
            {
                "diagnostics": diagnostics,
                "truncation": truncation,
                "template": template,
                "chat_template_kwargs": chat_template_kwargs,
            }
        )
        async with _deadline(self.deadline_s) as time_left:
            await self._check_reference_once(time_left)
            scores = await call_with_retries(
                lambda: self._score_chunks(chunks, options, time_left), self.retries, time_left
            )
        return join_scores(scores)

    async def compare(self, prompt: Prompt, completions: Sequence[Completion]) -> Comparison:
        """Return rewards and pairwise Bradley-Terry probabilities of two or more completions of one prompt.

        Raises:
            ClientError: as ``score_items``; a completion without a reward fails the whole comparison.
            ValueError: a completion cannot be written as JSON.
        """
        request = {"prompt": prompt_content(prompt), "completions": [completion_content(one) for one in completions]}
        encode_items([request])  # a text that JSON cannot represent is the caller's error, before the first attempt

        async with _deadline(self.deadline_s) as time_left:
            await self._check_reference_once(time_left)
            content = await self._call(
                "POST", "/v1/compare", time_left, lambda: encode({**request, "timeout_ms": timeout_ms(time_left())})
            )
        return read_comparison(content, len(completions))

    async def model(self) -> dict[str, Any]:
        """Return the description of the served model, the body of ``GET /v1/model``.

        Raises:
            ClientError: as ``score_items``.
        """
        async with _deadline(self.deadline_s) as time_left:
            return read_object(await self._call("GET", "/v1/model", time_left))

    async def check_reference(self, reference: Reference) -> ReferenceCheck:
        """Check whether the served model was initialised from a checkpoint; ``same`` is None if that is unknown.

        Args:
            reference: its folder here (compared by its weights), the hash over its weights, or its name.

        Raises:
            ClientError: as ``score_items``.
            ValueError: the folder holds no safetensors files.
        """
        async with _deadline(self.deadline_s) as time_left:
            return await self._check_reference(reference_name(reference), time_left)

    async def wait_until_ready(self, timeout_s: float = 600.0) -> None:
        """Return as soon as the service is ready to score.

        Raises:
            ClientDeadlineExceeded: it was not, for ``timeout_s`` seconds.
        """
        async with _deadline(timeout_s):
            while not await self._is_ready():  # noqa: ASYNC110  (the event is in another process)
                await asyncio.sleep(READY_POLL_S)

    async def aclose(self) -> None:
        """Close the connections of the running loop; closed loops have closed theirs."""
        pool = self._pools.pop(asyncio.get_running_loop(), None)
        if pool is not None:
            await pool.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pools": {}}

    def _pool(self) -> httpx2.AsyncClient:
        """Return the connection pool of the running loop; a pool belongs to the loop that opened it."""
        loop = asyncio.get_running_loop()
        pool = self._pools.get(loop)
        if pool is None:
            for ended in [loop for loop in list(self._pools) if loop.is_closed()]:
                self._pools.pop(ended, None)
            pool = self._pools[loop] = self._open_pool()
        return pool

    def _open_pool(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            headers={"Content-Type": "application/json", **self.headers},
            timeout=httpx2.Timeout(self.retries.read_timeout_s, connect=CONNECT_TIMEOUT_S, pool=None),
            limits=httpx2.Limits(
                max_connections=self.max_connections,
                max_keepalive_connections=self.max_connections,
                keepalive_expiry=IDLE_CONNECTION_S,
            ),
        )

    async def _is_ready(self) -> bool:
        try:
            answer = await self._pool().get(f"{self.url}/readyz", timeout=CONNECT_TIMEOUT_S)
        except httpx2.TransportError:
            return False
        return answer.status_code == httpx2.codes.OK

    async def _check_reference(self, name: str, time_left: Callable[[], float]) -> ReferenceCheck:
        return read_reference_check(await self._call("GET", reference_route(name), time_left), name)

    async def _check_reference_once(self, time_left: Callable[[], float]) -> None:
        if self._reference_checked or self.reference is None:
            return
        try:
            check = await self._check_reference(self.reference, time_left)
        except (RequestRejected, BadAnswer) as error:
            # A service that cannot answer the check may still score; ``require_reference`` decides whether that is an
            # error.
            check = refusal_of_check(self.reference, error)
        report_reference_check(check, required=self.require_reference)
        self._reference_checked = True

    async def _score_chunks(
        self, chunks: Sequence[Sequence[bytes]], options: Mapping[str, Any], time_left: Callable[[], float]
    ) -> list[ChunkScores]:
        scores = await _all_or_first_error([self._score_chunk(chunk, options, time_left) for chunk in chunks])
        if len({chunk.model_version for chunk in scores}) > 1:
            raise MixedVersionsError("different model versions scored the chunks of one call")
        return scores

    async def _score_chunk(
        self, encoded: Sequence[bytes], options: Mapping[str, Any], time_left: Callable[[], float]
    ) -> ChunkScores:
        content = await self._call(
            "POST", "/v1/score", time_left, lambda: score_body(encoded, options, timeout_s=time_left())
        )
        return read_scores(content, len(encoded))

    async def _call(
        self, method: str, route: str, time_left: Callable[[], float], body: Callable[[], bytes] | None = None
    ) -> bytes:
        """Return the content of the first 200. ``body`` is built for each attempt, because each has less time left."""
        return await call_with_retries(
            lambda: self._send(method, route, None if body is None else body()), self.retries, time_left
        )

    async def _send(self, method: str, route: str, content: bytes | None) -> bytes:
        """Make one attempt: return the content of a 200, or raise the exception for what came instead."""
        try:
            answer = await self._pool().request(method, self.url + route, content=content)
        except (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ProxyError) as error:
            raise AttemptFailedError(type(error).__name__) from error
        except httpx2.DecodingError as error:
            raise BadAnswer("The response cannot be decompressed") from error
        if answer.is_server_error:
            raise AttemptFailedError(
                _describe(answer), read_retry_after(answer.headers.get("Retry-After"), time.time())
            )
        if answer.is_client_error:
            raise RequestRejected(answer.status_code, read_problem(answer.content))
        if answer.status_code != httpx2.codes.OK:
            raise BadAnswer(f"The status is {answer.status_code}; the protocol defines 200, 4xx and 5xx")
        return answer.content


@asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[Callable[[], float]]:
    """Bound the block; yields a function that returns the seconds left."""
    ends_at = time.monotonic() + seconds
    bound = asyncio.timeout(seconds)
    try:
        async with bound:
            yield lambda: ends_at - time.monotonic()
    except TimeoutError as error:
        if not bound.expired():
            raise
        raise ClientDeadlineExceeded(f"No complete response within {seconds:g} s") from error


async def _all_or_first_error(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all concurrently; the first error cancels the others and is raised unchanged."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _describe(answer: httpx2.Response) -> str:
    code = read_problem(answer.content).get("code", answer.reason_phrase)
    return f"{answer.status_code} {code} (request {answer.headers.get('X-Request-Id', 'without an id')})"
