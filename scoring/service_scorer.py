"""Scores blocks with a running service, through its client: retries, deadlines and chunks of requests are the client's.

Items of one prompt are sent side by side, so that the service compares them and computes their prefix once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from reward_client import RewardClient
from reward_client.answers import ScoredItem
from reward_client.errors import ItemsFailed, RequestRejected
from reward_client.options import DiagnosticsLevel, Truncation

from scoring.blocks import Block, RowError
from scoring.columns import Answer
from scoring.scorers import ScoredBlock, refuse_long
from service.errors import JobError
from service.records import Exchange, Item

BLOCKS_IN_FLIGHT = 2
"""Blocks that are sent before the oldest is answered, so that the service has work meanwhile."""

_STATUSES_OF_ITEMS = frozenset({400, 413, 422})
"""Statuses with which the service refuses a request for one of its items."""

_ALL_CHARS = 2**63


class ServiceScorer:
    """Scores with a running service.

    Args:
        client: of the service; the caller closes it.
        level: of diagnostics.
        truncation: what happens to an item that is too long; None: the service's setting.
        weights: of the outputs of a model with several; None: the service's own.

    Raises:
        ClientError: the service does not answer.
    """

    def __init__(
        self,
        client: RewardClient,
        level: DiagnosticsLevel,
        truncation: Truncation | None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self._client = client
        self._level = level
        self._truncation = truncation
        self._weights = weights
        model = client.model()
        self._version = model.version
        outputs = model.reward_rule.outputs
        self._outputs = outputs if len(outputs) > 1 else ()
        limit = model.limits.get("max_item_chars")
        self._max_item_chars = limit if isinstance(limit, int) else _ALL_CHARS

    @property
    def version(self) -> str:
        """Version of the model that the service had at the beginning."""
        return self._version

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs of a model with several; empty for a model with one."""
        return self._outputs

    def score_blocks(self, blocks: Iterable[Block]) -> Iterator[ScoredBlock]:
        """Yield every block with its answers, in order.

        Raises:
            ClientError: the service cannot be reached any more, or refuses every request.
            JobError: the service has another model than at the beginning.
        """
        sent: deque[tuple[Block, Future[list[Answer]]]] = deque()
        with ThreadPoolExecutor(BLOCKS_IN_FLIGHT, thread_name_prefix="service") as senders:
            for block in blocks:
                sent.append((block, senders.submit(self._score, block)))
                if len(sent) > BLOCKS_IN_FLIGHT:
                    yield _scored(*sent.popleft())
            while sent:
                yield _scored(*sent.popleft())

    def _score(self, block: Block) -> list[Answer]:
        items = block.items()
        answers: list[Answer | None] = [refuse_long(item, self._max_item_chars) for item in items]
        sendable = [index for index, answer in enumerate(answers) if answer is None]
        sendable = _grouped(sendable, items)
        for index, answer in zip(sendable, self._send([items[index] for index in sendable]), strict=True):
            answers[index] = answer
        return [answer for answer in answers if answer is not None]

    def _send(self, items: Sequence[Item]) -> list[Answer]:
        wire = [_wire_item(item) for item in items]
        try:
            scored = self._client.score_items(
                wire, diagnostics=self._level, truncation=self._truncation, weights=self._weights
            )
        except ItemsFailed as failed:
            errors = {failure.index: RowError(failure.code, failure.detail) for failure in failed.failures}
            return [errors[index] if item is None else self._answer(item) for index, item in enumerate(failed.items)]
        except RequestRejected as rejected:
            if rejected.status not in _STATUSES_OF_ITEMS or "code" not in rejected.problem:
                raise
            if len(items) == 1:
                problem = rejected.problem
                return [RowError(str(problem["code"]), str(problem.get("detail", "no detail was given")))]
            middle = len(items) // 2
            return [*self._send(items[:middle]), *self._send(items[middle:])]
        return [self._answer(item) for item in scored]

    def _answer(self, item: ScoredItem) -> Answer:
        if item.model_version != self._version:
            raise JobError(
                f"The service has changed its model from version {self._version} to {item.model_version}; the rewards "
                "of two models cannot be in one output: start again with --overwrite."
            )
        return {"reward": item.reward, "rewards": item.rewards, **item.diagnostics}


def _grouped(indices: Sequence[int], items: Sequence[Item]) -> list[int]:
    """Order items by the first appearance of their prompt or group."""
    first: dict[object, int] = {}
    for index in indices:
        first.setdefault(_group_key(items[index]), index)
    return sorted(indices, key=lambda index: (first[_group_key(items[index])], index))


def _group_key(item: Item) -> object:
    prompt = item.content.prompt if isinstance(item.content, Exchange) else None
    return ("prompt", prompt) if item.group is None else ("group", item.group)


def _scored(block: Block, answers: Future[list[Answer]]) -> ScoredBlock:
    found = answers.result()  # an error of the service is raised here
    return ScoredBlock(block, lambda: found)


def _wire_item(item: Item) -> Mapping[str, Any]:
    content = item.content
    if not isinstance(content, Exchange):
        raise TypeError("A row is always a prompt with completions")
    return content.as_dict() | ({} if item.group is None else {"group": item.group})
