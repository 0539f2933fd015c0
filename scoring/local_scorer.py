"""Scores blocks with a model in this process, through the pipeline of the service.

All blocks are one stream of token sequences: a batch may hold items of two blocks, so that the last batch of a block
is as full as the others. Rows are read and tokenized in a thread of their own while the engine computes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from reward_client.options import DiagnosticsLevel

from scoring.blocks import Block, RowError
from scoring.columns import Answer
from scoring.prefetching import prefetched
from scoring.scorers import ScoredBlock, refuse_long
from service.assembly import ServedModel, assemble
from service.diagnostics.item_state import ItemState, Outcome
from service.errors import HttpError, ItemTooLong
from service.offline import encode_items, score_offline
from service.protocols.native_answers import diagnostics_of
from service.records import Encoding, TokenSequence
from service.settings import Settings

LOOK_AHEAD_BATCHES = 8
"""Batches of tokens that are read ahead to form full ones."""

PREFETCHED_BLOCKS = 2


@dataclass(slots=True)
class _OpenBlock:
    """A block and the states of its items, until all have an outcome."""

    block: Block
    states: list[ItemState]
    num_waiting: int


class LocalScorer:
    """Scores with a checkpoint, an ONNX bundle or the oracle.

    Args:
        settings: ``model``, ``tokenization``, ``batching`` and ``diagnostics`` apply, and the limit of characters.

    Raises:
        StartupError: the checkpoint is refused, or no forward path agrees with plain transformers.
    """

    def __init__(self, settings: Settings, *, served: ServedModel | None = None) -> None:
        self._served = served or assemble(settings)
        self._level: DiagnosticsLevel = settings.diagnostics.level
        self._encoding = Encoding(truncation=settings.tokenization.truncation)

    @property
    def version(self) -> str:
        """Version of the model."""
        return self._served.identity.version

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs of a model with several; empty for a model with one."""
        outputs = self._served.info.outputs
        return outputs if len(outputs) > 1 else ()

    def score_blocks(self, blocks: Iterable[Block]) -> Iterator[ScoredBlock]:
        """Yield every block with its answers as soon as all its items have an outcome."""
        complete: deque[_OpenBlock] = deque()
        waiting: dict[int, tuple[_OpenBlock, ItemState]] = {}
        with prefetched(map(self._open, blocks), PREFETCHED_BLOCKS) as opened_blocks:
            for index, outcome in self._outcomes(_encoded(opened_blocks, waiting, complete)):
                opened, state = waiting.pop(index)
                state.outcome = outcome
                opened.num_waiting -= 1
                if not opened.num_waiting:
                    complete.append(opened)
                while complete:
                    yield self._scored(complete.popleft())
            while complete:
                yield self._scored(complete.popleft())

    def _open(self, block: Block) -> _OpenBlock:
        items = block.items()
        limit = self._served.settings.limits.max_item_chars
        refused = {index: error for index, item in enumerate(items) if (error := refuse_long(item, limit))}
        fitting = [item for index, item in enumerate(items) if index not in refused]
        encoded = encode_items(self._served.tokenization, fitting, self._encoding)
        states = [
            ItemState(item, ItemTooLong(refused[index].detail) if index in refused else next(encoded))
            for index, item in enumerate(items)
        ]
        return _OpenBlock(block, states, len(states))

    def _outcomes(self, encoded: Iterable[TokenSequence | HttpError]) -> Iterator[tuple[int, Outcome]]:
        settings, pipeline = self._served.settings, self._served.scorer.pipeline
        return score_offline(
            pipeline,
            encoded,
            level=self._level,
            max_batch_sequences=settings.batching.max_batch_sequences,
            look_ahead_tokens=LOOK_AHEAD_BATCHES * pipeline.engine.info.max_batch_tokens,
        )

    def _scored(self, opened: _OpenBlock) -> ScoredBlock:
        return ScoredBlock(opened.block, lambda: self._answers(opened.states))

    def _answers(self, states: Sequence[ItemState]) -> list[Answer]:
        outcomes = self._served.scorer.pipeline.diagnostician.diagnose(states, self._level)
        return [_answer(outcome, self._level, self.outputs) for outcome in outcomes]


def _encoded(
    opened_blocks: Iterable[_OpenBlock], waiting: dict[int, tuple[_OpenBlock, ItemState]], complete: deque[_OpenBlock]
) -> Iterator[TokenSequence | HttpError]:
    """Yield what is to be scored, and note whose it is; a block without items is complete at once."""
    index = 0
    for opened in opened_blocks:
        if not opened.states:
            complete.append(opened)
        for state in opened.states:
            waiting[index] = (opened, state)
            index += 1
            yield state.encoded


def _answer(outcome: Outcome, level: DiagnosticsLevel, outputs: Sequence[str]) -> Answer:
    if isinstance(outcome, HttpError):
        return RowError(outcome.code, outcome.detail)
    rewards = dict(zip(outputs, outcome.outputs, strict=True)) if outcome.outputs else {}
    known = [*rewards.values(), *([] if outcome.reward is None else [outcome.reward])]
    if not all(map(math.isfinite, known)):  # the pipeline has turned such rewards into errors
        raise ValueError("A reward is not finite")
    return {"reward": outcome.reward, "rewards": rewards, **_plain(diagnostics_of(outcome, level))}


def _plain(members: Mapping[str, Any]) -> dict[str, Any]:
    return cast("dict[str, Any]", msgspec.to_builtins(members))
