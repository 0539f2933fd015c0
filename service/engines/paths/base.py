"""The interface of a forward path: one way of running a batch of token ids through a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from service.engines.base import BatchCost, EngineOutput, Pending
from service.engines.kernels.bindings import Kernels
from service.engines.model.taps import StateQuery

PathChoice: TypeAlias = Literal["auto", "packed", "padded"]
"""The setting ``model.forward``."""


@dataclass(frozen=True, slots=True)
class PathSpec:
    """A forward path with its optimisations, as the parity probe tries it. A padded path has no optimisations."""

    name: Literal["packed", "padded"]

    share_prefixes: bool = False
    """Whether sequences of a batch compute a common prefix once."""

    cache_bytes: int = 0
    """Memory limit of the prefix cache, which requires ``share_prefixes``; 0: there is none."""

    kernels: Kernels | None = None
    """The compiled CPU kernels on which modules run where they can; None: torch's own kernels run."""

    compiled: bool = False
    """Whether the model's blocks run compiled by ``torch.compile``."""

    cascade: bool = False
    """Whether attention to a shared prefix is computed once for all its sequences; requires ``share_prefixes``.

    Otherwise the variable-length kernel gets the prefix's keys gathered for each sequence.
    """

    batch_invariant: bool = False
    """Whether no bit of a reward may depend on the other sequences of its batch; of a padded path too."""

    @property
    def description(self) -> str:
        """The path in words, for logs and error messages."""
        parts = {
            "shared prefixes": self.share_prefixes,
            "a prefix cache": self.cache_bytes > 0,
            "CPU kernels": self.kernels is not None,
        }
        options = [part for part, is_on in parts.items() if is_on]
        return f"{self.name} with {' and '.join(options)}" if options else self.name


def candidate_paths(choice: PathChoice, fastest: PathSpec) -> list[PathSpec]:
    """Return the paths that a choice allows, fastest first.

    Args:
        choice: ``auto``, or the name of the one path to try.
        fastest: a packed path with all optimisations that the settings and the machine allow.
    """
    unshared = replace(fastest, share_prefixes=False, cache_bytes=0, cascade=False)
    packed = [fastest, replace(fastest, cache_bytes=0), unshared]
    packed += [replace(spec, kernels=None) for spec in packed]
    padded = PathSpec("padded", compiled=fastest.compiled, batch_invariant=fastest.batch_invariant)
    return list(dict.fromkeys({"auto": [*packed, padded], "packed": packed, "padded": [padded]}[choice]))


def output_of(
    values: torch.Tensor,
    steps: Sequence[tuple[int, ...]],
    shared_tokens: Sequence[int],
    states: NDArray[np.float32] | None,
) -> EngineOutput:
    """Return the output of a pass.

    Args:
        values: the head's outputs, float32 [positions, outputs], sequence by sequence: at its steps in order, and last
            at its pooled token.
        steps: the steps of each sequence; empty where there are none.
        shared_tokens: see ``EngineOutput``.
        states: see ``EngineOutput``.
    """
    if not steps and values.shape[1] == 1:
        return EngineOutput(values[:, 0].tolist(), shared_tokens, states)
    ends = list(accumulate(len(own) + 1 for own in steps or [()] * len(values)))
    outputs = np.split(values.float().cpu().numpy(), ends[:-1])
    return EngineOutput([float(own[-1, 0]) for own in outputs], shared_tokens, states, outputs=outputs)


class ForwardPath(Protocol):
    """One way of running a batch through a classifier."""

    name: str
    """``packed`` or ``padded``."""

    cost: BatchCost
    """How the size of a batch is counted."""

    min_shared_prefix_tokens: int | None
    """Common prefixes of at least this many tokens are computed once; None: prefixes are not shared."""

    kernels: Kernels | None
    """The compiled CPU kernels that it runs on; None: it runs on none."""

    caches_prefixes: bool
    """Whether keys and values of prompts are cached between passes."""

    def run(
        self,
        rows: Sequence[tuple[int, ...]],
        query: StateQuery | None = None,
        prompts: Sequence[int | None] | None = None,
        steps: Sequence[tuple[int, ...]] = (),
    ) -> EngineOutput:
        """Score sequences of token ids in one pass.

        Args:
            rows: token ids of each sequence; not empty, and different from each other.
            query: the states to read in addition; changes no bit of a reward.
            prompts: how many leading tokens of each sequence are its prompt, None where that is unknown; with them the
                pass may read the prefix cache and add prompts to it. None: it does neither.
            steps: for each sequence the positions, ascending, at which the head is read beside the pooled token; empty:
                at none. They change no bit of a reward.

        Returns:
            ``outputs`` is None where there are no steps and the head has one output.
        """
        ...

    def clear_cache(self) -> None:
        """Drop all cached prefixes."""
        ...

    def num_cached_tokens(self, row: tuple[int, ...], mean_start: int | None, steps: tuple[int, ...] = ()) -> int:
        """Return how many leading tokens of a sequence the next pass takes from the prefix cache, in any batch.

        Args:
            row: token ids.
            mean_start: the first token that ``mean`` pooling may read; None: it reads none.
            steps: the positions at which the head is read beside the pooled token, ascending.
        """
        ...


@runtime_checkable
class LaunchingPath(ForwardPath, Protocol):
    """A forward path that can launch the next pass without waiting for the device."""

    def launch(
        self,
        rows: Sequence[tuple[int, ...]],
        query: StateQuery | None = None,
        steps: Sequence[tuple[int, ...]] = (),
    ) -> Pending[EngineOutput]:
        """Launch a pass on the device; its result is what ``run`` returns. On a CPU it is computed at once."""
        ...
