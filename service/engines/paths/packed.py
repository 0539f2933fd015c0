"""The packed path: the sequences of a batch stand in one row, without padding, and what they share stands there once.

The model's own transformers code runs unchanged, with the attention of ``attention``. Where prompts are kept for later
passes, a pass computes what is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import isfinite

import torch

from service.engines.attention.interface import ATTENTION, PackingUnsupportedError
from service.engines.attention.kv_cache import CacheTransaction, KVCache
from service.engines.attention.layout import BLOCK, Packing
from service.engines.base import BatchCost, Deferred, EngineOutput, Pending, StateTap
from service.engines.compilation import COMPILED_ATTENTION
from service.engines.devices.staging import staging_for
from service.engines.kernels.attention import register_attention
from service.engines.kernels.bindings import Kernels
from service.engines.kernels.patching import multiplies_on_kernels
from service.engines.model.classifier import Classifier
from service.engines.model.taps import Readout, StateQuery
from service.engines.paths.cuda_graphs import Bucket, PassLibrary, StaticPass, fill_bucket
from service.engines.rewiring import rewire
from service.scheduling.prefix_tree import grow_branches

FILLER_ID = 0
"""The token at the end of a row that belongs to nobody: any will do, its states are computed and never read."""

SHORTEST_SHARED = 8
"""A common beginning of fewer tokens costs in attention what it saves in linear layers (24M parameters, two cores)."""


class PackedForward:
    """Runs a batch as one row. What a batch costs is the sum of its tokens, shared ones counted once.

    On a CPU in half precision the linear layers multiply in row blocks, so that a reward does not depend on the batch.

    Args:
        classifier: left with the attention of this path.
        share_prefixes: whether sequences that begin alike compute their beginning once.
        compiled: whether the model's blocks run compiled.
        kernels: on which its modules run where they can; None: transformers' own code runs.
        cache_bytes: bytes of the prefix cache; 0: none. It needs shared prefixes.
        cascade: whether the variable-length kernel attends to a shared beginning once for all and the rest is merged
            with that; else its keys are gathered for each sequence.

    ``library``: passes of fixed shapes, which run rows that share nothing and whose states nobody reads; empty until
    somebody sets it.
    """

    name = "packed"
    cost: BatchCost = "packed"

    def __init__(
        self,
        classifier: Classifier,
        *,
        share_prefixes: bool = True,
        compiled: bool = False,
        kernels: Kernels | None = None,
        cache_bytes: int = 0,
        cascade: bool = False,
    ) -> None:
        if classifier.linear_head is None:
            raise PackingUnsupportedError(f"{classifier.architecture} does not read its reward off one token's state")
        batch_invariant_linear = classifier.is_on_cpu and classifier.is_half_precision
        attention = COMPILED_ATTENTION if compiled else ATTENTION
        if kernels is not None:
            attention = register_attention(kernels)
        rewire(classifier, attention, batch_invariant_linear=batch_invariant_linear, compiled=compiled, kernels=kernels)
        self._classifier = classifier
        self._batch_invariant_linear = batch_invariant_linear and not multiplies_on_kernels(classifier.body)
        self.kernels = kernels
        self._cascade = cascade
        self._staging = staging_for(classifier.device)
        self._mask: torch.Tensor | None = None
        self.library = PassLibrary({})
        self.min_shared_prefix_tokens = SHORTEST_SHARED if share_prefixes else None
        self.kept = KVCache(cache_bytes, SHORTEST_SHARED) if cache_bytes and share_prefixes else None
        self.caches_prefixes = self.kept is not None

    @torch.inference_mode()
    def run(
        self,
        rows: Sequence[tuple[int, ...]],
        query: StateQuery | None = None,
        prompts: Sequence[int | None] | None = None,
    ) -> EngineOutput:
        """Score rows of token ids in one pass; see ``ForwardPath.run``."""
        if self.kept is None or prompts is None:
            return self.launch(rows, query).result()
        return self._settle(rows, query, self._visiting_pass(self.kept, rows, query, prompts))

    def launch(self, rows: Sequence[tuple[int, ...]], query: StateQuery | None = None) -> Pending[EngineOutput]:
        """Hand a pass to the device; see ``LaunchingPath.launch``. On CUDA the host waits for nothing here.

        Nothing is taken from earlier passes or kept for later ones, for a pass is trusted only when it has ended.
        """
        return Deferred(partial(self._finish, rows, query, self._launch(rows, query)))

    @torch.inference_mode()
    def _finish(
        self, rows: Sequence[tuple[int, ...]], query: StateQuery | None, launched: Pending[EngineOutput]
    ) -> EngineOutput:
        return self._settle(rows, query, launched.result())

    def _settle(self, rows: Sequence[tuple[int, ...]], query: StateQuery | None, output: EngineOutput) -> EngineOutput:
        """Compute rows without a finite reward again, by themselves and by nothing kept.

        A state that is not finite reaches all that share its row's beginning, even from behind it: in a sum, zero times
        infinity is no number.
        """
        if not any(output.shared_tokens):
            return output
        rewards = list(output.rewards)
        for place, reward in enumerate(rewards):
            if not isfinite(reward):
                rewards[place] = self._replace(output, place, rows[place], query)
        return replace(output, rewards=rewards)

    def clear_cache(self) -> None:
        """Let go of all that is kept."""
        if self.kept is not None:
            self.kept.prefixes.clear()

    def num_cached_tokens(self, row: tuple[int, ...], mean_start: int | None) -> int:
        """Return how many leading tokens of a row are cached; see ``ForwardPath.num_cached_tokens``."""
        if self.kept is None or not row:
            return 0
        return self.kept.prefixes.longest(row, self._limit(row, mean_start))[1]

    def _limit(self, row: tuple[int, ...], mean_start: int | None) -> int:
        """Return how many leading tokens a pass may leave out: none whose state is read."""
        pooled = self._classifier.pooled_position(row)
        return pooled if mean_start is None else min(pooled, _first_counted(row, mean_start))

    def _replace(self, output: EngineOutput, place: int, row: tuple[int, ...], query: StateQuery | None) -> float:
        readings = [] if query is None else [index for index, (owner, _) in enumerate(query.readings) if owner == place]
        own = query and StateQuery(query.taps, tuple((0, query.readings[index][1]) for index in readings))
        alone = self._launch([row], own if readings else None).result()
        if output.states is not None and alone.states is not None:
            output.states[readings] = alone.states
        return alone.rewards[0]

    def _visiting_pass(
        self,
        kept: KVCache,
        rows: Sequence[tuple[int, ...]],
        query: StateQuery | None,
        prompts: Sequence[int | None],
    ) -> EngineOutput:
        """Run a pass that uses what is kept and keeps what it finds, unless something in it is not finite."""
        limits = [self._limit(row, first) for row, first in zip(rows, _first_wanted(rows, query), strict=True)]
        with kept.visit(rows, limits) as visit:
            output = self._launch(rows, query, visit, prompts).result()
            if all(map(isfinite, output.rewards)):
                visit.confirm()
        return output

    @torch.inference_mode()
    def _launch(
        self,
        rows: Sequence[tuple[int, ...]],
        query: StateQuery | None,
        visit: CacheTransaction | None = None,
        prompts: Sequence[int | None] = (),
    ) -> Pending[EngineOutput]:
        classifier = self._classifier
        pooled = [classifier.pooled_position(row) for row in rows]
        reads_states = query is not None and bool(query.readings)
        if visit is None and (static := None if reads_states else self.library.choose(rows)) and not self._shares(rows):
            return self._launch_static(*static, rows, pooled)
        packing = Packing.of(
            rows,
            classifier.device,
            block=BLOCK if classifier.is_on_cpu else 1,
            shortest_shared=self.min_shared_prefix_tokens,
            batch_invariant_linear=self._batch_invariant_linear,
            visit=visit,
            cascade=self._cascade,
        )
        if visit is not None:
            visit.plan(packing.branches, prompts, classifier.device)
        places = [branch.place(position) for branch, position in zip(packing.branches, pooled, strict=True)]
        packing, (ids, positions, read) = packing.staged(
            self._staging,
            [torch.tensor([packing.token_ids(rows, FILLER_ID)]), packing.position_ids(), torch.tensor(places)],
        )
        with classifier.recording(*_tapping(query, packing, places)) as recorded:
            states = classifier.body(
                input_ids=ids, attention_mask=self._mask, position_ids=positions, use_cache=False, packing=packing
            ).last_hidden_state[0]
        self._settle_masks()
        rewards, tapped_states = classifier.rewards_of(states.index_select(0, read)), recorded.stacked()
        found = [rewards] if tapped_states is None else [rewards, tapped_states]
        num_taken = 0 if visit is None else visit.num_taken
        shared_tokens = [branch.num_shared for branch in packing.branches]
        return _output_of(self._staging.to_host(found), shared_tokens, num_taken)

    def _shares(self, rows: Sequence[tuple[int, ...]]) -> bool:
        return any(branch.num_shared for branch in grow_branches(rows, self.min_shared_prefix_tokens))

    def _launch_static(
        self, bucket: Bucket, static: StaticPass, rows: Sequence[tuple[int, ...]], pooled: Sequence[int]
    ) -> Pending[EngineOutput]:
        static.load(self._staging.to_device(fill_bucket(bucket, rows, pooled, FILLER_ID).tensors))
        return _output_of(self._staging.to_host([static.compute()[: len(rows)]]), [0] * len(rows))

    def _settle_masks(self) -> None:
        """From the second pass on, hand a mask through that nobody reads.

        Without one transformers looks for borders in the position ids and waits for the device to do so. The first pass
        goes without, so that a model which lays a pattern of its own over the mask is found.
        """
        if self._mask is None and not self._classifier.is_on_cpu:
            self._mask = torch.empty((1, 1, 1, 0), dtype=torch.bool, device=self._classifier.device)


def _output_of(
    copies: Pending[list[torch.Tensor]], shared_tokens: list[int], cached_tokens: int = 0
) -> Pending[EngineOutput]:
    """Return the output of a launched pass, finite or not; ``copies``: its rewards, and the states if requested."""

    def complete() -> EngineOutput:
        rewards, *states = copies.result()
        return EngineOutput(rewards.tolist(), shared_tokens, states[0].numpy() if states else None, cached_tokens)

    return Deferred(complete)


def _first_wanted(rows: Sequence[tuple[int, ...]], query: StateQuery | None) -> list[int | None]:
    """Return of each row the first token whose state is asked for beside the pooled one's; None where none is."""
    found: list[int | None] = [None] * len(rows)
    if query is not None and any(tap.pooling == "mean" for tap in query.taps):
        for place, first in query.readings:
            counted, known = _first_counted(rows[place], first), found[place]
            found[place] = counted if known is None else min(known, counted)
    return found


def _first_counted(row: tuple[int, ...], first: int) -> int:
    """Return from which token on a mean counts, asked to begin with this one: of nothing it counts all."""
    return first if first < len(row) else 0


def _tapping(
    query: StateQuery | None, packing: Packing, places: Sequence[int]
) -> tuple[tuple[StateTap, ...], list[Readout]]:
    """Say where in the row the states stand that are asked for."""
    if query is None:
        return (), []
    readouts = []
    for row, first in query.readings:
        branch = packing.branches[row]
        readouts.append(Readout(0, places[row], branch.spans_from(first) or branch.spans))
    return query.taps, readouts
