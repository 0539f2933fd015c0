"""The interface of an engine, which runs forward passes: sequences in, the raw outputs of the head out.

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
            Exception: the error of the computation; a device reports errors only when its results are awaited.
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
    """How rewards are computed; shown by ``/v1/model``."""

    engine: str
    """``torch``, ``onnx`` or ``oracle``."""

    architecture: str
    """The transformers class of the model."""

    forward: str
    """The forward path: ``packed`` (one sequence of all tokens, no padding) or ``padded`` (a rectangle)."""

    device: str
    """``cpu`` or ``cuda:N``."""

    dtype: str
    """The dtype of the body's activations; the head is computed in float32."""

    cost: BatchCost
    """How the size of a batch is counted: ``packed`` is the sum of its tokens, ``padded`` is longest sequence x count.
    """

    max_input_tokens: int
    """Tokens of the longest sequence that is scored."""

    max_batch_tokens: int
    """Budget of one pass in tokens, counted as ``cost`` defines; a longer sequence runs alone."""

    parity: dict[str, float | int | str | bool] = field(default_factory=dict)
    """What the start-up probe measured against plain transformers; empty where none ran."""

    taps: tuple[StateTap, ...] = ()
    """Where hidden states can be read, in the order of ``EngineOutput.states``."""

    min_shared_prefix_tokens: int | None = None
    """Common prefixes of at least this many tokens are computed once in a pass; None: prefixes are not shared."""

    providers: tuple[str, ...] = ()
    """ONNX Runtime's execution providers, first choice first; empty for other engines."""

    compiled: bool = False
    """Whether the model's blocks run compiled by ``torch.compile``."""

    kernels: str | None = None
    """The instruction set whose compiled CPU kernels the pass runs on; None: torch's own kernels run."""

    prefix_cache_mib: int = 0
    """Memory limit of the prefix cache, which holds keys and values between passes; 0: there is none."""

    async_launch: bool = False
    """Whether a pass can be launched while the one before it is still running; then it is a ``LaunchingEngine``."""

    cuda_graph_max_tokens: int = 0
    """Tokens of the longest packed batch that is replayed from a CUDA graph; 0: there are no CUDA graphs."""

    cuda_graph_failure: str = ""
    """Why there are no CUDA graphs where they were requested; empty otherwise."""

    cascade_attention: bool = False
    """Whether attention to shared prefixes is computed once and merged by log-sum-exp instead of gathering their keys.
    """

    batch_invariance: dict[str, int] = field(default_factory=dict)
    """What the start-up check of batch-invariant rewards compared, and the rows of the shortest product.

    Empty where ``batching.batch_invariant`` is off."""

    attention_heads: int | None = None
    """Query heads of a block, which bound the memory of attention scores; None: unknown."""

    outputs: tuple[str, ...] = ("reward",)
    """Names of the numbers that the head gives at a token, in order."""

    gate_pattern: tuple[int, ...] = ()
    """Token ids that every sequence must have, one after the other, because the gate of the head reads there."""

    reads_steps: bool = True
    """Whether the head can be read at several tokens of a sequence."""

    quantization: str = "none"
    """``fp8`` or ``int8`` where linear layers multiply in 8 bits."""

    quantization_error: dict[str, float | int] = field(default_factory=dict)
    """How far quantization moved the probes' rewards (Spearman, largest difference); empty where it is ``none``."""

    @property
    def arithmetic(self) -> str:
        """The number formats that change rewards; a part of the model's version."""
        return self.dtype if self.quantization == "none" else f"{self.dtype}, {self.quantization}"


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What one forward pass returns, in the order of the sequences."""

    rewards: Sequence[float]
    """The head's first output at the pooled token, one per sequence: float32 values as Python floats."""

    shared_tokens: Sequence[int] = ()
    """Tokens of each sequence that were computed for another one or in an earlier pass; empty: none were."""

    states: NDArray[np.float32] | None = None
    """Float32 [readings, taps, hidden], on the host; an engine has one reading per sequence. None: none were requested.
    """

    cached_tokens: int = 0
    """The part of all shared tokens that was taken from the prefix cache."""

    outputs: Sequence[NDArray[np.float32]] | None = None
    """For each sequence float32 [steps + 1, outputs]: at its steps in order, and last at its pooled token.

    None where the head has one output and no sequence has steps: then ``rewards`` says all."""

    @property
    def at_pooled(self) -> list[list[float]]:
        """All outputs of the head at the pooled token of each sequence."""
        if self.outputs is None:
            return [[reward] for reward in self.rewards]
        return [values[-1].tolist() for values in self.outputs]


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
            states: whether to read the states at ``info.taps`` too. This changes no bit of a reward, except where short
                passes are replayed from CUDA graphs, which read no states.

        Returns:
            The head's outputs for each sequence, in order. Not squashed, not clipped, not checked for being finite.

        Raises:
            EngineOutOfMemory: the device ran out of memory; the engine is usable again, a smaller batch may fit.
            EngineUnavailable: the device is lost to this process; the engine is no longer usable.
            Exception: anything else the forward pass raised; the engine is usable again.
        """
        ...

    def num_cached_tokens(self, sequence: TokenSequence) -> int:
        """Return how many leading tokens the next `forward` takes from the prefix cache, in any batch.

        A lower bound, found quickly; called from the thread that calls `forward`.
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
