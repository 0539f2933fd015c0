"""What a forward path is: one way of running a batch of token ids through a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from service.engines.base import BatchCost, EngineOutput, Pending
from service.engines.kernels.bindings import Kernels
from service.engines.model.taps import StateQuery


class ForwardPath(Protocol):
    """One way of running a batch through a classifier.

    ``shared_from``: rows that begin with so many equal tokens compute them once; None: nothing is shared.
    ``kernels``: those of ours that it runs on; None: it runs on none.
    ``keeps``: whether prompts are kept between passes.
    """

    name: str
    cost: BatchCost
    shared_from: int | None
    kernels: Kernels | None
    keeps: bool

    def run(
        self,
        rows: Sequence[tuple[int, ...]],
        query: StateQuery | None = None,
        prompts: Sequence[int | None] | None = None,
    ) -> EngineOutput:
        """Score rows of token ids in one pass.

        Args:
            rows: not empty, and different from each other.
            query: which states to read too; changes no bit of a reward.
            prompts: how many leading tokens of each row are its prompt, None where that is unknown; with them the pass
                may use what earlier ones have kept, and keep prompts. None: it does neither.
        """
        ...

    def forget(self) -> None:
        """Let go of all that is kept."""
        ...

    def num_cached_tokens(self, row: tuple[int, ...], first_wanted: int | None) -> int:
        """Return how many leading tokens of a row the next pass need not compute, whatever stands beside it.

        Args:
            row: token ids.
            first_wanted: the first token whose state may be wanted beside the pooled one's; None: none is.
        """
        ...


@runtime_checkable
class LaunchingPath(ForwardPath, Protocol):
    """A forward path that need not wait for the device before the next pass is launched."""

    def launch(self, rows: Sequence[tuple[int, ...]], query: StateQuery | None = None) -> Pending[EngineOutput]:
        """Hand a pass to the device; what ``run`` returns comes later. On a CPU it is computed at once."""
        ...
