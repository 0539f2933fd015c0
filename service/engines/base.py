"""The interface of an engine, which runs forward passes: sequences in, one raw reward each out.

The contract is small enough to implement in a test file. An engine is called from one thread only and has no state
between calls that could change a reward. Cached prefixes only save work; `Engine.num_cached_tokens` reports them before
a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, runtime_checkable

from service.records import BatchCost, StatePooling, StateTap, TokenSequence

if TYPE_CHECKING:  # computing the oracle's expected rewards requires the standard library alone
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "BatchCost",
    "Deferred",
    "Engine",
    "EngineInfo",
    "EngineOutput",
    "LaunchingEngine",
    "Pending",
    "Ready",
    "StatePooling",
    "StateTap",
]

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)


class Pending(Protocol[_T_co]):
    """A result that a device may still be computing."""

    def result(self) -> _T_co:
        """Wait for the result and return it. Called once; several pending passes are awaited in the order of launching.

        Raises:
            Exception: whatever the computation raised; a device reports errors only when its results are awaited.
        """
        ...


@dataclass(frozen=True, slots=True)
class Ready(Generic[_T]):
    """A result that needs no waiting."""

    value: _T

    def result(self) -> _T:
        """Return the value."""
        return self.value


@dataclass(frozen=True, slots=True)
class Deferred(Generic[_T]):
    """A result that the host completes when it is requested, such as one made of other pending results."""

    complete: Callable[[], _T]

    def result(self) -> _T:
        """Call the function and return what it returns."""
        return self.complete()


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """How rewards are computed; shown by ``/v1/model``.

    ``cost``: how a batch is priced: ``packed`` is the sum of its tokens, ``padded`` is longest sequence x count.
    ``parity``: what the start-up probe found (largest absolute difference to plain transformers); empty without one.
    ``taps``: where states can be read, in the order of ``EngineOutput.states``. ``shared_from``: sequences of a pass
    that begin with at least so many equal tokens compute them once; None: nothing is shared. ``providers``: what ONNX
    Runtime runs the graph on, first choice first; empty for other engines. ``compiled``: whether ``torch.compile`` made
    the kernels between matrix products. ``kernels``: the kind of CPU whose kernels of ours the pass runs on; None:
    transformers' own code runs. ``prefix_cache_mib``: what keys and values of prompts may take that are kept between
    passes; 0: nothing is kept. ``launches_ahead``: whether a pass can be launched while the one before it still runs;
    then the engine is a ``LaunchingEngine``. ``graph_tokens``: tokens of the longest row that is replayed from a CUDA
    graph; 0: none is. ``graph_failure``: why not, where graphs were wanted. ``cascade_attention``: whether attention to
    shared beginnings is merged instead of gathered. ``quantization``: ``fp8`` or ``int8`` where linear layers multiply
    in 8 bits.
    ``quantization_loss``: what that changed on the probe (Spearman and largest absolute difference to the same model
    without); empty where nothing is quantized.
    """

    engine: str
    architecture: str
    forward: str
    device: str
    dtype: str
    cost: BatchCost
    max_input_tokens: int
    max_batch_tokens: int
    parity: dict[str, float | int | str | bool] = field(default_factory=dict)
    taps: tuple[StateTap, ...] = ()
    shared_from: int | None = None
    providers: tuple[str, ...] = ()
    compiled: bool = False
    kernels: str | None = None
    prefix_cache_mib: int = 0
    launches_ahead: bool = False
    graph_tokens: int = 0
    graph_failure: str = ""
    cascade_attention: bool = False
    quantization: str = "none"
    quantization_loss: dict[str, float | int] = field(default_factory=dict)

    @property
    def arithmetic(self) -> str:
        """All that changes rewards by how numbers are held; a part of the model's version."""
        return self.dtype if self.quantization == "none" else f"{self.dtype}, {self.quantization}"


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What one forward pass returns, in the order of the sequences."""

    rewards: Sequence[float]
    """One raw logit per sequence: float32 values as Python floats."""

    shared_tokens: Sequence[int] = ()
    """Of each sequence, the tokens computed for another sequence of the pass or in an earlier pass; empty: none are."""

    states: NDArray[np.float32] | None = None
    """Float32 [readings, taps, hidden], on the host; an engine has one reading per sequence. None: none were requested.
    """

    cached_tokens: int = 0
    """The part of all shared tokens that earlier passes computed."""


class Engine(Protocol):
    """Runs batches on one device."""

    @property
    def info(self) -> EngineInfo:
        """How this engine computes rewards; constant after construction."""
        ...

    def forward(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> EngineOutput:
        """Score the sequences in one pass.

        Args:
            sequences: at least one, each within ``max_input_tokens``; several together are within the batch budget.
            states: whether to read the states at ``info.taps`` too; changes no bit of a reward, but where short passes
                are replayed from graphs, which read none.

        Returns:
            One raw logit per sequence, in order. Not squashed, not clipped, not checked for being finite.

        Raises:
            EngineOutOfMemory: the device had no room; the engine is usable again, a smaller batch may fit.
            EngineUnavailable: the device is lost to this process; the engine is of no use any more.
            Exception: anything else the forward pass raised; the engine is usable again.
        """
        ...

    def num_cached_tokens(self, sequence: TokenSequence) -> int:
        """Return how many leading tokens the next call of `forward` need not compute, whatever stands beside them.

        Never more than it leaves out, and quickly found; called from the thread that calls `forward`.
        """
        ...

    def close(self) -> None:
        """Free the device's memory. The engine is not used afterwards."""
        ...


@runtime_checkable
class LaunchingEngine(Engine, Protocol):
    """An engine whose device computes asynchronously while the host prepares the next pass."""

    def launch(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> Pending[EngineOutput]:
        """Launch a pass on the device and return without waiting for it; arguments and errors as of ``forward``.

        The pass may hold device memory until its result is requested. An error raised here does not affect passes
        launched before.
        """
        ...
