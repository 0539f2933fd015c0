"""The asynchronous client: connections, deadline, retries and concurrent chunks.

Requests are built in ``requests``, responses validated in ``answers``.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeVar, get_args, overload

import httpx2

from reward_client.addresses import proxy_of_environment, proxy_url, service_url, shown_url
from reward_client.answers import (
    ChunkScores,
    Comparison,
    ScoredItem,
    join_scores,
    read_comparison,
    read_problem,
    read_scores,
)
from reward_client.checks import (
    check_answer_key,
    check_headers,
    check_items,
    check_pessimism,
    check_weights,
    elements,
    headers_with_key,
    instance_of,
    one_of,
    positive_integer,
    positive_seconds,
    seconds_from_zero,
)
from reward_client.errors import BadAnswer, ClientError, InvalidArgument, RequestRejected
from reward_client.failures import connection_failure, never_connected
from reward_client.models import ServedModel, read_model
from reward_client.options import DiagnosticsLevel, SpecialTokenText, TemplateChoice, Truncation
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
    Steps,
    Weights,
    WireItem,
    chunk_ranges,
    completion_content,
    encode,
    encode_items,
    group_key,
    prompt_content,
    score_body,
    step_items,
    timeout_ms,
    without_none,
)
from reward_client.retries import (
    DEFAULT_RETRY_POLICY,
    AttemptFailedError,
    Call,
    MixedVersionsError,
    RetryPolicy,
    call_with_retries,
    read_retry_after,
)
from reward_client.signatures import item_digest
from reward_client.signed_transport import SignedTransport

T = TypeVar("T")

# Below the 5 s after which common servers close an idle connection: the client should close it first.
IDLE_CONNECTION_S = 4.0
CONNECT_TIMEOUT_S = 10.0
READY_POLL_S = 0.25
RETRIED_STATUSES = frozenset({httpx2.codes.REQUEST_TIMEOUT, httpx2.codes.TOO_MANY_REQUESTS})
"""Statuses of 4xx after which the same request may succeed: the network was slow, or the quota is used up."""
API_KEY_VARIABLE = "REWARD_API_KEY"
"""Variable of the environment with the API key."""
ANSWER_KEY_VARIABLE = "REWARD_ANSWER_KEY"
"""The same with the secret by which answers are signed."""


class AsyncRewardClient:
    """Scores over HTTP from an event loop.

    Connections are kept alive and belong to the loop that opened them. One client may be used from several loops
    (trainers compute rewards on a loop of their own): each gets its own connections. It can be pickled, without them.

    Args:
        url: the root URL of the service, such as ``http://127.0.0.1:8000``, with its path behind a proxy if any.
        deadline_s: seconds within which a call returns or raises; the service receives what is left.
        max_connections: concurrent requests per event loop.
        chunks: how large calls are split into requests.
        retries: the policy after a 5xx, a 408 (slow network), a 429 (quota) or a broken connection. No other 4xx is
            retried, except for a 404 without a problem document, which is a proxy's.
        headers: sent with each request, such as ``{"X-Run-Id": "ppo-7"}`` or an ``Authorization``.
        api_key: sent as ``Authorization: Bearer``; None: the environment's ``REWARD_API_KEY``, if it has one.
        reference: the KL reference of the training run: its checkpoint folder, the hash over its weights, or its name.
            The first call warns (ReferenceWarning) if the reward model was initialised from another checkpoint.
        require_reference: raise ReferenceMismatch instead, also where it is unknown.
        wait_for_start_s: seconds for which a service that has never answered this client is tried. None: 30, and no
            more attempts than ``retries`` has. A service that has answered before is retried until ``deadline_s``.
        answer_key: the secret of the service's ``security.answer_key``; only answers are taken that are signed with it
            and bound to what was asked. None: the environment's ``REWARD_ANSWER_KEY``, else answers are not checked.
        proxy: URL of an HTTP or SOCKS proxy. None: the one that ``http_proxy``, ``https_proxy`` or ``all_proxy`` in the
            environment name for the URL, and none for a service on this machine.

    Raises:
        InvalidArgument: an argument has another type, is out of range, or the URL is no root URL.
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
        api_key: str | None = None,
        reference: Reference | None = None,
        require_reference: bool = False,
        wait_for_start_s: float | None = None,
        proxy: str | None = None,
        answer_key: str | None = None,
    ) -> None:
        self.url = service_url(url)
        self.deadline_s = positive_seconds(deadline_s, "deadline_s")
        self.max_connections = positive_integer(max_connections, "max_connections")
        self.chunks = instance_of(ChunkLimits, chunks, "chunks")
        self.retries = instance_of(RetryPolicy, retries, "retries")
        self.headers = headers_with_key(check_headers(headers), api_key, os.environ.get(API_KEY_VARIABLE))
        self.reference = None if reference is None else reference_name(reference)
        self.require_reference = require_reference
        self.wait_for_start_s = (
            None if wait_for_start_s is None else seconds_from_zero(wait_for_start_s, "wait_for_start_s")
        )
        self.proxy = None if proxy is None else proxy_url(proxy)
        self._answer_key = check_answer_key(answer_key or os.environ.get(ANSWER_KEY_VARIABLE))
        self._reference_checked = self.reference is None
        self._reached = False
        self._pools: dict[asyncio.AbstractEventLoop, httpx2.AsyncClient] = {}

    @overload
    async def score(
        self,
        prompts: Iterable[Prompt],
        completions: Iterable[Completion] | None = None,
        *,
        steps: Steps | None = None,
        diagnostics: None = None,
        truncation: Truncation | None = None,
        template: TemplateChoice | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        special_tokens: SpecialTokenText | None = None,
        weights: Weights | None = None,
    ) -> list[float]: ...

    @overload
    async def score(
        self,
        prompts: Iterable[Prompt],
        completions: Iterable[Completion] | None = None,
        *,
        steps: Steps | None = None,
        diagnostics: DiagnosticsLevel,
        truncation: Truncation | None = None,
        template: TemplateChoice | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        special_tokens: SpecialTokenText | None = None,
        weights: Weights | None = None,
        pessimism: float | None = None,
    ) -> list[ScoredItem]: ...

    async def score(
        self,
        prompts: Iterable[Prompt],
        completions: Iterable[Completion] | None = None,
        *,
        steps: Steps | None = None,
        diagnostics: DiagnosticsLevel | None = None,
        truncation: Truncation | None = None,
        template: TemplateChoice | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        special_tokens: SpecialTokenText | None = None,
        weights: Weights | None = None,
        pessimism: float | None = None,
    ) -> list[float] | list[ScoredItem]:
        """Return the raw reward of each completion, in input order.

        Args:
            prompts: texts, or conversations as lists of ``{"role", "content"}``; a list, tuple, column or generator.
            completions: one for each prompt; texts, or lists of messages that begin with an assistant's.
            steps: the steps that get rewards of their own: lists of strings in place of the completions, one for each
                prompt; or ``"marker"``: the completions have the model's marker after each; or ``"turns"``: each
                assistant turn of a completion. The reward is then the model's aggregate of them; with ``diagnostics``
                the results have ``step_rewards``.
            diagnostics: None: return rewards alone, as floats. A level: return ``ScoredItem``, as ``score_items`` does.
            truncation: what happens to an item that is too long; None: the service's setting.
            template: how a plain-text prompt is rendered; None: the service's setting.
            chat_template_kwargs: values for the chat template, of names that the service allows.
            special_tokens: what becomes of special tokens in the text of a completion, for example of a policy that is
                not trusted; ``"escape"``: they are text; None: the service's setting.
            weights: of a model with several outputs, the weight of each by name, 0 where it is left out; None: the
                service's own. The reward is their weighted sum.
            pessimism: number k of standard deviations: each result has ``details.reward_lower``, the reward less k
                times ``details.reward_disagreement``. Needs ``diagnostics="full"``; the reward itself never changes.

        Raises:
            RewardMissing: ``diagnostics`` is None, the model has several outputs, and no weights are known.
            InvalidArgument: one of the two is no list (a string is none), they differ in length, or an element is
                neither a text nor a conversation.
            ClientError: no rewards; see ``score_items``.
        """
        items = step_items(prompts, completions, steps)
        scored = await self.score_items(
            items,
            diagnostics=diagnostics or "none",
            truncation=truncation,
            template=template,
            chat_template_kwargs=chat_template_kwargs,
            special_tokens=special_tokens,
            weights=weights,
            pessimism=pessimism,
        )
        return [item.known_reward for item in scored] if diagnostics is None else scored

    async def score_items(
        self,
        items: Iterable[WireItem],
        *,
        diagnostics: DiagnosticsLevel = "basic",
        truncation: Truncation | None = None,
        template: TemplateChoice | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        special_tokens: SpecialTokenText | None = None,
        weights: Weights | None = None,
        pessimism: float | None = None,
    ) -> list[ScoredItem]:
        """Return reward and diagnostics of each item, in input order.

        All come from one model version: when the served model changes during a call, the whole call is
        scored again.

        Args:
            items: objects of the wire format: ``prompt`` and ``completion`` (and ``tools``), or ``text``, or
                ``token_ids``; and ``steps``, ``id``, ``group``.
            diagnostics: which diagnostics are returned in addition to the reward.
            truncation: as for ``score``.
            template: as for ``score``.
            chat_template_kwargs: as for ``score``.
            special_tokens: as for ``score``.
            weights: as for ``score``.
            pessimism: as for ``score``.

        Raises:
            RequestRejected: the service refused the request (4xx).
            ItemsFailed: some items have no reward; carries the rewards of the others.
            BadAnswer: the response violates the protocol, or the model changed during every attempt.
            ServiceUnavailable: every attempt ended in a 5xx or a broken connection.
            ServiceUnreachable: the service has never answered, within ``wait_for_start_s``.
            ClientDeadlineExceeded: ``deadline_s`` passed, or the Retry-After of the service exceeds it.
            ReferenceMismatch: ``require_reference`` is set and the check failed.
            InvalidArgument: the items are no list of dictionaries, or one cannot be written as JSON; nothing was sent.
        """
        _check_options(diagnostics, truncation, template, special_tokens)
        checked_weights, checked_pessimism = check_weights(weights), check_pessimism(pessimism, diagnostics)
        item_list = elements(items, "items", "items of the wire format")
        check_items(item_list)
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
                "special_tokens": special_tokens,
                "weights": checked_weights,
                "pessimism": checked_pessimism,
                "digests": True if self._answer_key else None,
            }
        )
        async with self._call() as call:
            await self._check_reference_once(call)
            scores = await call_with_retries(lambda: self._score_chunks(chunks, options, call), self.retries, call)
        return join_scores(scores)

    async def compare(
        self, prompt: Prompt, completions: Iterable[Completion], *, weights: Weights | None = None
    ) -> Comparison:
        """Return rewards and pairwise Bradley-Terry probabilities of two or more completions of one prompt.

        Args:
            prompt: a text or a conversation.
            completions: texts, or lists of messages that begin with an assistant's.
            weights: as for ``score``.

        Raises:
            ClientError: as ``score_items``; a completion without a reward fails the whole comparison.
            InvalidArgument: fewer than two completions, one that is neither a text nor a list of messages, or one that
                JSON cannot represent.
        """
        contents = [
            completion_content(completion, f"completions[{index}]")
            for index, completion in enumerate(elements(completions, "completions", "completions of the prompt"))
        ]
        if len(contents) < 2:
            raise InvalidArgument(f"A comparison needs at least two completions, not {len(contents)}")
        request = without_none(
            {"prompt": prompt_content(prompt), "completions": contents, "weights": check_weights(weights)}
        )
        encode_items([request])  # a text that JSON cannot represent is the caller's error, before the first attempt

        async with self._call() as call:
            await self._check_reference_once(call)
            content = await self._answer(
                "POST", "/v1/compare", call, lambda: encode({**request, "timeout_ms": timeout_ms(call.left_s())})
            )
            return read_comparison(content, len(contents))

    async def model(self) -> ServedModel:
        """Return the description of the served model: name, version, rendering, limits, calibration.

        Raises:
            ClientError: as ``score_items``.
        """
        async with self._call() as call:
            return read_model(await self._answer("GET", "/v1/model", call))

    async def check_reference(self, reference: Reference) -> ReferenceCheck:
        """Check whether the served model was initialised from a checkpoint; ``same`` is None if that is unknown.

        Args:
            reference: its folder here (compared by its weights), the hash over its weights, or its name.

        Raises:
            ClientError: as ``score_items``.
            InvalidArgument: the folder holds no safetensors files.
        """
        name = reference_name(reference)
        async with self._call() as call:
            return await self._check_reference(name, call)

    async def wait_until_ready(self, timeout_s: float = 600.0) -> None:
        """Return as soon as the service is ready to score.

        Raises:
            ClientDeadlineExceeded: it was not, for ``timeout_s`` seconds.
            InvalidArgument: ``timeout_s`` is no finite number above zero.
        """
        async with self._call(positive_seconds(timeout_s, "timeout_s")) as call:
            while (failure := await self._try_readiness()) is not None:
                call.num_failed += 1
                call.last_failure = failure
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
        limits = httpx2.Limits(
            max_connections=self.max_connections,
            max_keepalive_connections=self.max_connections,
            keepalive_expiry=IDLE_CONNECTION_S,
        )
        try:
            # A transport of our own: the proxy is the one that messages name, and none for this machine.
            plain = httpx2.AsyncHTTPTransport(limits=limits, proxy=self._proxy())
            transport = SignedTransport(plain, self._answer_key) if self._answer_key else plain
        except (ImportError, ValueError, httpx2.InvalidURL) as error:
            reason = "SOCKS needs the package socksio" if isinstance(error, ImportError) else "its URL is malformed"
            raise InvalidArgument(f"The proxy {shown_url(self._proxy() or '')} cannot be used: {reason}") from error
        return httpx2.AsyncClient(
            headers={"Content-Type": "application/json", **self.headers},
            transport=transport,
        )

    def _proxy(self) -> str | None:
        return self.proxy or proxy_of_environment(self.url)

    def _shown(self) -> str:
        """The service as messages name it, with the proxy between."""
        proxy = self._proxy()
        return shown_url(self.url) + (f" through the proxy {shown_url(proxy)}" if proxy else "")

    @asynccontextmanager
    async def _call(self, deadline_s: float | None = None) -> AsyncIterator[Call]:
        """Bound one call of the caller by its deadline, and name the service in its exceptions."""
        seconds = self.deadline_s if deadline_s is None else deadline_s
        call = Call(self._shown(), seconds, self.wait_for_start_s, lambda: self._reached)
        bound = asyncio.timeout(seconds)
        try:
            async with bound:
                yield call
        except TimeoutError:
            if not bound.expired():
                raise
            message = f"No answer from {call.url} within {seconds:g} s: {call.describe_failure()}"
            raise call.deadline_exceeded(message) from call.last_failure
        except BadAnswer as error:
            raise _with_url(error, call.url) from error.__cause__

    async def _try_readiness(self) -> AttemptFailedError | None:
        """Return why the service is not ready; None: it is."""
        try:
            answer = await self._pool().get(f"{self.url}/readyz", timeout=CONNECT_TIMEOUT_S)
        except httpx2.TransportError as error:
            return AttemptFailedError(connection_failure(error, CONNECT_TIMEOUT_S))
        self._note_answer(answer)
        return None if answer.status_code == httpx2.codes.OK else AttemptFailedError(_describe(answer))

    async def _check_reference(self, name: str, call: Call) -> ReferenceCheck:
        return read_reference_check(await self._answer("GET", reference_route(name), call), name)

    async def _check_reference_once(self, call: Call) -> None:
        if self._reference_checked or self.reference is None:
            return
        try:
            check = await self._check_reference(self.reference, call)
        except (RequestRejected, BadAnswer) as error:
            # A service that cannot answer the check may still score; ``require_reference`` decides whether that is an
            # error.
            check = refusal_of_check(self.reference, error)
        report_reference_check(check, required=self.require_reference)
        self._reference_checked = True

    async def _score_chunks(
        self, chunks: Sequence[Sequence[bytes]], options: Mapping[str, Any], call: Call
    ) -> list[ChunkScores]:
        scores = await _all_or_first_error([self._score_chunk(chunk, options, call) for chunk in chunks])
        if len({chunk.model_version for chunk in scores}) > 1:
            raise MixedVersionsError("different model versions scored the chunks of one call")
        return scores

    async def _score_chunk(self, encoded: Sequence[bytes], options: Mapping[str, Any], call: Call) -> ChunkScores:
        content = await self._answer(
            "POST", "/v1/score", call, lambda: score_body(encoded, options, timeout_s=call.left_s())
        )
        digests = [item_digest(item) for item in encoded] if self._answer_key else ()
        return read_scores(content, len(encoded), digests)

    async def _answer(self, method: str, route: str, call: Call, body: Callable[[], bytes] | None = None) -> bytes:
        """Return the content of the first 200. ``body`` is built for each attempt, because each has less time left."""

        async def attempt() -> bytes:
            content = None if body is None else body()
            return await self._send(method, route, content, self.retries.attempt_s(call.left_s()))

        return await call_with_retries(attempt, self.retries, call)

    async def _send(self, method: str, route: str, content: bytes | None, attempt_s: float) -> bytes:
        """Make one attempt: return the content of a 200, or raise the exception for what came instead."""
        timeout = httpx2.Timeout(attempt_s, connect=CONNECT_TIMEOUT_S, pool=None)
        try:
            answer = await self._pool().request(method, self.url + route, content=content, timeout=timeout)
        except httpx2.DecodingError as error:
            raise BadAnswer("The response cannot be decompressed") from error
        except httpx2.TransportError as error:
            raise AttemptFailedError(
                connection_failure(error, attempt_s), not_started=never_connected(error)
            ) from error
        self._note_answer(answer)
        if answer.status_code == httpx2.codes.OK:
            return answer.content
        raise self._failure_of(answer)

    def _note_answer(self, answer: httpx2.Response) -> None:
        if answer.status_code == httpx2.codes.OK or "X-Model-Version" in answer.headers or _code_of(answer) is not None:
            self._reached = True

    def _failure_of(self, answer: httpx2.Response) -> ClientError | AttemptFailedError:
        """Return the exception for an answer that is not a 200."""
        if answer.is_server_error or answer.status_code in RETRIED_STATUSES:
            return AttemptFailedError(
                _describe(answer), read_retry_after(answer.headers.get("Retry-After"), time.time())
            )
        if answer.status_code == httpx2.codes.NOT_FOUND and _code_of(answer) is None:
            # The service's own 404 has a code; this one is of a proxy whose service restarts, or of another server.
            return AttemptFailedError("404 without a problem document, so not of the service", not_started=True)
        if answer.is_client_error:
            return RequestRejected(answer.status_code, read_problem(answer.content), self._shown())
        return BadAnswer(f"The status is {answer.status_code}; the protocol defines 200, 4xx and 5xx")


def _check_options(diagnostics: object, truncation: object, template: object, special_tokens: object) -> None:
    one_of(diagnostics, "diagnostics", get_args(DiagnosticsLevel))
    one_of(truncation, "truncation", get_args(Truncation))
    one_of(template, "template", get_args(TemplateChoice))
    one_of(special_tokens, "special_tokens", get_args(SpecialTokenText))


def _with_url(error: BadAnswer, url: str) -> BadAnswer:
    named = BadAnswer(f"{error} (from {url})")
    named.url = url
    return named


async def _all_or_first_error(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all concurrently; the first error cancels the others and is raised unchanged."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _code_of(answer: httpx2.Response) -> str | None:
    """The code of the service's problem document; None: the answer is none of the service's."""
    code = read_problem(answer.content).get("code")
    return code if isinstance(code, str) else None


def _describe(answer: httpx2.Response) -> str:
    code = _code_of(answer) or f"{answer.reason_phrase} without a problem document"
    request_id = answer.headers.get("X-Request-Id")
    return f"{answer.status_code} {code}" + (f" (request {request_id})" if request_id else "")
