"""An engine whose passes run on a thread of their own, as a device does, and fail there or where they are launched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from service.engines.base import EngineInfo, EngineOutput
from service.engines.oracle import OracleEngine
from service.records import TokenSequence

Fault = Callable[[Sequence[TokenSequence]], None]
"""Raises or waits for some batches."""


class LaunchedOnThread:
    """A pass that the device has, or will have."""

    def __init__(self, engine: LaunchingOracle, future: Future[EngineOutput]) -> None:
        self._engine = engine
        self._future = future

    def result(self) -> EngineOutput:
        self._engine.await_turn(self)
        return self._future.result(timeout=30)


class LaunchingOracle(OracleEngine):
    """The oracle behind a queue of launched passes.

    Args:
        at_launch: what goes wrong where a pass is launched; it sees the sequences.
        on_device: what goes wrong while it runs, which ``result`` tells.
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
        return replace(super().info, launches_ahead=True)

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
        """Let passes be launched, through the door, and be computed, through the gate."""
        self.door.set()
        self.gate.set()

    def close(self) -> None:
        self.closed = True
        self._device.shutdown()

    def await_turn(self, launched: LaunchedOnThread) -> None:
        """Take a pass off the flight; results are asked for in the order of launching."""
        assert self._in_flight.pop(0) is launched

    def _compute(self, sequences: Sequence[TokenSequence]) -> EngineOutput:
        assert self.gate.wait(timeout=30)
        self._on_device(sequences)
        return super().forward(sequences)
