"""The synchronous client: the asynchronous one, run on an event loop in a thread of its own.

One implementation serves both: chunks of a call are sent concurrently and the deadline holds here as well.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from reward_client.answers import Comparison, ScoredItem
from reward_client.asynchronous import AsyncRewardClient
from reward_client.checks import check_pessimism
from reward_client.models import ServedModel
from reward_client.options import DiagnosticsLevel, SpecialTokenText, TemplateChoice, Truncation
from reward_client.provenance import ReferenceCheck
from reward_client.references import Reference
from reward_client.requests import DEFAULT_CHUNKS, ChunkLimits, Completion, Prompt, Steps, Weights, WireItem
from reward_client.retries import DEFAULT_RETRY_POLICY, RetryPolicy

T = TypeVar("T")


class RewardClient:
    """Scores over HTTP; the methods of ``AsyncRewardClient``, each blocking until its result.

    It can be shared between threads, used inside a running event loop (which is then blocked), pickled, and used after
    a fork: the thread of the event loop is started at the first call in each process.

    Args:
        url: where the service listens, such as ``http://127.0.0.1:8000``.
        deadline_s: seconds within which a call returns or raises, all attempts together.
        max_connections: requests in flight at a time, over all threads.
        chunks: how large calls are split into requests.
        retries: the policy after a 5xx, a 408 (slow network), a 429 (quota) or a broken connection. No other 4xx is
            retried, except for a 404 without a problem document, which is a proxy's.
        headers: sent with each request.
        api_key: sent as ``Authorization: Bearer``; None: the environment's ``REWARD_API_KEY``, if it has one.
        reference: the KL reference of the training run; see ``AsyncRewardClient``.
        require_reference: raise where it is not known that the reward model was initialised from it.
        wait_for_start_s: seconds for which a service that has never answered is tried; see ``AsyncRewardClient``.
        answer_key: the secret by which every answer must be signed; see ``AsyncRewardClient``.
        proxy: URL of a proxy; None: that of the environment, and none for a service on this machine.

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
        self._client = AsyncRewardClient(
            url,
            deadline_s=deadline_s,
            max_connections=max_connections,
            chunks=chunks,
            retries=retries,
            headers=headers,
            api_key=api_key,
            reference=reference,
            require_reference=require_reference,
            wait_for_start_s=wait_for_start_s,
            proxy=proxy,
            answer_key=answer_key,
        )
        self._lock = threading.Lock()
        self._thread: _LoopThread | None = None

    @overload
    def score(
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
    def score(
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

    def score(
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
        """Return the raw reward of each completion, in input order; see ``AsyncRewardClient.score``."""
        if diagnostics is None:
            check_pessimism(pessimism, diagnostics)
            return self._run(
                self._client.score(
                    prompts,
                    completions,
                    steps=steps,
                    truncation=truncation,
                    template=template,
                    chat_template_kwargs=chat_template_kwargs,
                    special_tokens=special_tokens,
                    weights=weights,
                )
            )
        return self._run(
            self._client.score(
                prompts,
                completions,
                steps=steps,
                diagnostics=diagnostics,
                truncation=truncation,
                template=template,
                chat_template_kwargs=chat_template_kwargs,
                special_tokens=special_tokens,
                weights=weights,
                pessimism=pessimism,
            )
        )

    def score_items(
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
        """Return reward and diagnostics of each item; see ``AsyncRewardClient.score_items``."""
        return self._run(
            self._client.score_items(
                items,
                diagnostics=diagnostics,
                truncation=truncation,
                template=template,
                chat_template_kwargs=chat_template_kwargs,
                special_tokens=special_tokens,
                weights=weights,
                pessimism=pessimism,
            )
        )

    def compare(
        self, prompt: Prompt, completions: Iterable[Completion], *, weights: Weights | None = None
    ) -> Comparison:
        """Return rewards and preference probabilities; see ``AsyncRewardClient.compare``."""
        return self._run(self._client.compare(prompt, completions, weights=weights))

    def model(self) -> ServedModel:
        """Return the description of the served model; see ``AsyncRewardClient.model``."""
        return self._run(self._client.model())

    def check_reference(self, reference: Reference) -> ReferenceCheck:
        """Check whether the model was initialised from a checkpoint; see ``AsyncRewardClient.check_reference``."""
        return self._run(self._client.check_reference(reference))

    def wait_until_ready(self, timeout_s: float = 600.0) -> None:
        """Return as soon as the service is ready; see ``AsyncRewardClient.wait_until_ready``."""
        self._run(self._client.wait_until_ready(timeout_s))

    def close(self) -> None:
        """Close the connections and stop the thread; a later call starts both again."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None and thread.is_ours:
            thread.run(self._client.aclose())
            thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"_client": self._client}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._client = state["_client"]
        self._lock = threading.Lock()
        self._thread = None

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._thread is None or not self._thread.is_ours:
                self._thread = _LoopThread()
            thread = self._thread
        return thread.run(call)


class _LoopThread:
    """An event loop in a daemon thread of this process."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward-client", daemon=True)
        self._thread.start()

    @property
    def is_ours(self) -> bool:
        """Whether the thread runs in this process: a fork copies this object, but not the thread."""
        return self._pid == os.getpid()

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        finally:
            # Ctrl-C in the waiting thread must cancel the request; for a finished call this does nothing.
            future.cancel()

    def close(self) -> None:
        self.run(_cancel_the_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_the_others() -> None:
    """Cancel the calls of other threads: on a stopped loop they would never return."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
