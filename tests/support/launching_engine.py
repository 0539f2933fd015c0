"""An engine whose passes run on a separate thread, like those of a device, and fail there or at launch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from service.engines.base import EngineInfo, EngineOutput
from service.engines.oracle import OracleEngine
from service.records import TokenSequence

Fault = Callable[[Sequence[TokenSequence]], None]
"""Raises or blocks for some batches."""


class LaunchedOnThread:
    """A pass that was submitted to the thread."""

    def __init__(self, engine: LaunchingOracle, future: Future[EngineOutput]) -> None:
        self._engine = engine
        self._future = future

    def result(self) -> EngineOutput:
        self._engine.await_turn(self)
        return self._future.result(timeout=30)


class LaunchingOracle(OracleEngine):
    """The oracle with asynchronously launched passes.

    Args:
        at_launch: the fault of a launch; called with the sequences.
        on_device: the fault of the computation, which ``result`` raises.
    """

    def __init__(
        self, *, at_launch: Fault | None = None, on_device: Fault | None = None, max_batch_tokens: int = 256
    ) -> None:
        super().__init__(max_input_tokens=256, max_batch_tokens=max_batch_tokens)
        self._at_launch = at_launch or (lambda _: None)
        self._on_device = on_device or (lambda _: None)
        self._device = ThreadPoolExecutor(1)
        self._in_flight: list[LaunchedOnThread] = []
        self.door, self.gate = threading.Event(), threading.Event()
        self.open()
        self.max_in_flight = 0
        self.launched: list[list[str]] = []
        self.closed = False

    @property
    def info(self) -> EngineInfo:
        return replace(super().info, async_launch=True)

    def launch(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> LaunchedOnThread:
        assert self.door.wait(timeout=30)
        self._at_launch(sequences)
        self.launched.append([bytes(sequence.token_ids).decode(errors="replace") for sequence in sequences])
        launched = LaunchedOnThread(self, self._device.submit(self._compute, sequences))
        self._in_flight.append(launched)
        self.max_in_flight = max(self.max_in_flight, len(self._in_flight))
        return launched

    def forward(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> EngineOutput:
        self._at_launch(sequences)
        return self._device.submit(self._compute, sequences).result(timeout=30)

    def open(self) -> None:
        """Open the door, which blocks launches while closed, and the gate, which blocks computation."""
        self.door.set()
        self.gate.set()

    def close(self) -> None:
        self.closed = True
        self._device.shutdown()

    def await_turn(self, launched: LaunchedOnThread) -> None:
        """Remove a pass from those in flight; results must be requested in the order of launching."""
        assert self._in_flight.pop(0) is launched

    def _compute(self, sequences: Sequence[TokenSequence]) -> EngineOutput:
        assert self.gate.wait(timeout=30)
        self._on_device(sequences)
        return super().forward(sequences)
