"""A forward path without a model, for tests of what an engine does when a pass fails."""

from __future__ import annotations

from collections.abc import Sequence

from service.engines.base import BatchCost, EngineOutput
from service.engines.kernels.bindings import Kernels
from service.engines.model.taps import StateQuery
from service.engines.paths.base import ForwardPath


class ScriptedPath(ForwardPath):
    """A packed path that shares and caches nothing; a test defines ``run``."""

    name = "packed"
    cost: BatchCost = "packed"
    min_shared_prefix_tokens: int | None = None
    kernels: Kernels | None = None
    caches_prefixes = False

    def run(
        self,
        rows: Sequence[tuple[int, ...]],
        query: StateQuery | None = None,
        prompts: Sequence[int | None] | None = None,
        steps: Sequence[tuple[int, ...]] = (),
    ) -> EngineOutput:
        raise NotImplementedError

    def clear_cache(self) -> None: ...

    def num_cached_tokens(self, row: tuple[int, ...], mean_start: int | None, steps: tuple[int, ...] = ()) -> int:
        return 0
