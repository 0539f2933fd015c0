"""The forward passes over one batch; a batch whose pass raises is halved until the failing sequences are alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.engines.base import Deferred, Engine, EngineOutput, LaunchingEngine, Pending
from service.errors import EngineFailed, EngineOutOfMemory, EngineUnavailable, HttpError, OutputMismatch
from service.records import TokenSequence

logger = logging.getLogger(__name__)

Outputs: TypeAlias = float | NDArray[np.float32]
"""What the head gave for a sequence: its one output, or [steps + 1, outputs] as in ``EngineOutput``."""


class BatchRun:
    """The forward passes over one batch, and their results so far."""

    def __init__(self, engine: Engine, sequences: Sequence[TokenSequence], *, states: bool) -> None:
        self._engine = engine
        self.sequences = sequences
        self._needs_states = states
        self._launched: Pending[EngineOutput] | None = None
        self._found: dict[int, Outputs | HttpError] = {}
        self._failure_logged = False
        self.num_forwards = 0
        self.out_of_memory = False
        self.shared_tokens = [0] * len(sequences)
        self.cached_tokens = 0
        self.states: dict[int, NDArray[np.float32]] = {}

    @property
    def outputs(self) -> list[Outputs | HttpError]:
        """The head's outputs of each sequence, or its error, in order; they may be NaN or infinite."""
        return [self._found[index] for index in range(len(self.sequences))]

    def launch(self) -> None:
        """Launch the whole batch on the device; an error is raised again by the first pass of ``run_all``."""
        if not isinstance(self._engine, LaunchingEngine):
            return
        try:
            self._launched = self._engine.launch(self.sequences, states=self._needs_states)
        except Exception as error:  # noqa: BLE001 - as in _try_pass
            self._launched = Deferred(partial(_raise, error))

    def run_all(self) -> None:
        """Run a pass over the batch, and over its halves where it raises."""
        failed = isolate_failures(len(self.sequences), self._try_pass)
        if failed:
            logger.warning("%d of %d sequences cannot be scored.", len(failed), len(self.sequences))

    def _try_pass(self, part: range) -> bool:
        """Run a pass over a part of the batch and record its results; return whether it did not raise."""
        self.num_forwards += 1
        try:
            output = self._output_of(part)
        except EngineOutOfMemory as error:
            # A new error, because the traceback of this one would keep the tensors of the pass in memory during the
            # retries.
            self.out_of_memory = True
            self._found.update(dict.fromkeys(part, EngineOutOfMemory(str(error))))
            return False
        except EngineUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - an error of a pass fails its sequences, not the engine thread
            self._log_first(error, len(part))
            self._found.update(dict.fromkeys(part, EngineFailed(f"The forward pass raised {type(error).__name__}.")))
            return False
        self._record(part, output)
        return True

    def _record(self, part: range, output: EngineOutput) -> None:
        if len(output.rewards) != len(part) or (output.outputs is not None and len(output.outputs) != len(part)):
            # It is unknown which reward belongs to which sequence, so none is used; a retry would run the same code.
            mismatch = OutputMismatch(f"The engine returned {len(output.rewards)} rewards for {len(part)} sequences.")
            logger.error("%s", mismatch)
            self._found.update(dict.fromkeys(part, mismatch))
            return
        self._found.update(zip(part, output.rewards if output.outputs is None else output.outputs, strict=True))
        if output.states is not None:
            self.states.update(zip(part, output.states, strict=True))
        if output.shared_tokens:
            self.shared_tokens[part.start : part.stop] = output.shared_tokens
        self.cached_tokens += output.cached_tokens

    def _output_of(self, part: range) -> EngineOutput:
        if self._launched is not None:
            launched, self._launched = self._launched, None  # the first part is the whole batch
            return launched.result()
        return self._engine.forward(self.sequences[part.start : part.stop], states=self._needs_states)

    def _log_first(self, error: Exception, num_sequences: int) -> None:
        """Log the traceback once a batch: the halves fail for the same reason."""
        if not self._failure_logged:
            logger.warning("A forward pass over %d sequences raised.", num_sequences, exc_info=error)
            self._failure_logged = True


def _raise(error: Exception) -> NoReturn:
    raise error


def isolate_failures(num_sequences: int, try_pass: Callable[[range], bool]) -> list[int]:
    """Find the sequences that fail by bisection: halve each part that fails until failing sequences are alone.

    One failing sequence among n costs at most 2 log2(n) + 1 passes (n a power of two); none costs one.

    Args:
        num_sequences: number of sequences in the batch; parts are ranges over their indices.
        try_pass: tries a part and returns whether it passed. Each index ends up in exactly one part that passed, or
            failed alone.

    Returns:
        The indices that failed alone, in order.
    """
    failed: list[int] = []
    untried = [range(num_sequences)] if num_sequences else []
    while untried:
        part = untried.pop()
        if try_pass(part):
            continue
        if len(part) == 1:
            failed.append(part[0])
        else:
            middle = len(part) // 2
            untried += [part[middle:], part[:middle]]
    return failed
