"""The packed path: the sequences of a batch are concatenated without padding, and computed in one pass.

Prefixes that several sequences share are computed once. The model's own transformers code runs unchanged, with the
attention of ``engines.attention``. With a prefix cache a pass computes only tokens that no earlier pass has computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite

import numpy as np
import torch
from torch import nn

from service.engines.attention.call import PackingUnsupportedError
from service.engines.attention.interface import register_packed_attention
from service.engines.attention.kv_cache import KVCache
from service.engines.attention.layout import BLOCK, PackedLayout
from service.engines.base import BatchCost, Deferred, EngineOutput, Pending, StateTap
from service.engines.compilation import register_compiled_attention
from service.engines.devices.staging import staging_for
from service.engines.kernels.attention import register_kernel_attention
from service.engines.kernels.bindings import Kernels
from service.engines.kernels.patching import packed_layers, packs_all_linear_layers
from service.engines.linear.verified_blocks import check_products
from service.engines.model.classifier import Classifier
from service.engines.model.taps import Readout, StateQuery
from service.engines.paths.base import PathSpec, output_of
from service.engines.paths.cuda_graphs import Bucket, PassLibrary, StaticPass, fill_bucket
from service.engines.rewiring import rewire
from service.scheduling.prefix_tree import TokenIds, TokenSpan, has_shared_prefix
from service.token_pattern import last_occurrence

PADDING_ID = 0
"""The id of padding tokens at the end of a packed batch. Any id is valid: their states are computed and never read."""

MIN_SHARED_TOKENS = 8
"""Sharing a shorter prefix costs as much in attention as it saves in linear layers (24M parameters, two cores)."""


ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})
"""Values of ``layer_types`` in configurations that name layers which mix tokens by attention alone."""


def token_mixing_outside_attention(classifier: Classifier) -> str | None:
    """Return what mixes the tokens of a model beside its attention, such as a recurrence; None: nothing is known.

    Layers of a hybrid run over a packed batch without knowing where a sequence ends. The parity probe detects that in
    fp32. In half precision a small model's rounding can be as large as the error, so it is not left to the probe.
    """
    config = classifier.config
    layers = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    others = sorted({str(layer) for layer in layers} - ATTENTION_LAYERS)
    if others:
        return f"layers of the type {', '.join(others)}"
    convolution = next(
        (name for name, module in classifier.body.named_modules() if isinstance(module, nn.Conv1d)), None
    )
    return None if convolution is None else f"the convolution {convolution}"


class PackedForward:
    """Runs a batch as one packed sequence of tokens. The cost of a batch is the number of its tokens, shared ones once.

    On a CPU in half precision linear layers multiply blocks of a fixed number of tokens, so that a reward does not
    depend on the composition of the batch. A batch-invariant path does so on every device, in blocks of sizes that have
    passed a trial.

    Args:
        classifier: its attention is replaced by that of this path.
        spec: of a packed path.
    """

    name = "packed"
    cost: BatchCost = "packed"

    def __init__(self, classifier: Classifier, spec: PathSpec) -> None:
        if classifier.state_head is None:
            raise PackingUnsupportedError(
                f"{classifier.architecture} does not compute its reward from the state of one token"
            )
        mixing = token_mixing_outside_attention(classifier)
        if mixing is not None:
            raise PackingUnsupportedError(
                f"{classifier.architecture} mixes tokens outside of its attention ({mixing}), which would mix the "
                "sequences of a packed batch"
            )
        if classifier.reads_token_types:
            raise PackingUnsupportedError(f"{classifier.architecture} reads token types, which packed batches lack")
        is_verified = spec.batch_invariant
        batch_invariant_linear = classifier.is_on_cpu and classifier.is_half_precision and not is_verified
        rewire(
            classifier,
            _register_attention(compiled=spec.compiled, kernels=spec.kernels),
            batch_invariant_linear=batch_invariant_linear,
            verified_linear=is_verified,
            compiled=spec.compiled,
            kernels=spec.kernels,
        )
        if is_verified:
            check_products(classifier.body, packed_layers(classifier.body))
        self._classifier = classifier
        self._batch_invariant = spec.batch_invariant
        is_padded = batch_invariant_linear or is_verified
        self._batch_invariant_linear = is_padded and not packs_all_linear_layers(classifier.body)
        self.kernels = spec.kernels
        self._cascade = spec.cascade
        self._staging = staging_for(classifier.device)
        self._mask: torch.Tensor | None = None
        self.library = PassLibrary({})
        """Passes of fixed shapes, for batches that share no prefix and whose states are not read; set by the engine."""
        self.min_shared_prefix_tokens = MIN_SHARED_TOKENS if spec.share_prefixes else None
        has_cache = spec.share_prefixes and spec.cache_bytes > 0
        self.kv_cache = KVCache(spec.cache_bytes, MIN_SHARED_TOKENS) if has_cache else None
        self.caches_prefixes = self.kv_cache is not None

    @torch.inference_mode()
    def run(
        self,
        rows: Sequence[TokenIds],
        query: StateQuery | None = None,
        prompts: Sequence[int | None] | None = None,
        steps: Sequence[tuple[int, ...]] = (),
    ) -> EngineOutput:
        """Score sequences in one pass; see ``ForwardPath.run``."""
        if self.kv_cache is None or prompts is None:
            return self.launch(rows, query, steps).result()
        output = self._run_cached(self.kv_cache, rows, query, prompts, steps)
        return self._recompute_non_finite(rows, query, steps, output)

    def launch(
        self,
        rows: Sequence[TokenIds],
        query: StateQuery | None = None,
        steps: Sequence[tuple[int, ...]] = (),
    ) -> Pending[EngineOutput]:
        """Launch a pass on the device; see ``LaunchingPath.launch``. On CUDA the host waits for nothing here.

        The prefix cache is neither read nor written, because states are cached only after their pass has ended.
        """
        return Deferred(partial(self._finish, rows, query, steps, self._launch(rows, query, steps)))

    def clear_cache(self) -> None:
        """Clear the prefix cache."""
        if self.kv_cache is not None:
            self.kv_cache.prefix_index.clear()

    def num_cached_tokens(self, row: TokenIds, mean_start: int | None, steps: tuple[int, ...] = ()) -> int:
        """Return how many leading tokens of a sequence are cached; see ``ForwardPath.num_cached_tokens``.

        The queue calls this while it holds the scorer's lock, because which sequences fit a batch depends on it. That
        lookup is a bisection of the cached prefixes (some 30 microseconds for 500 prompts of 1,000 tokens). The lookup
        of the pass that follows reuses its result (``PrefixIndex.longest``), so each sequence is compared once.
        """
        if self.kv_cache is None or not row:
            return 0
        return self.kv_cache.prefix_index.longest(row, self._max_cached(row, mean_start, steps))[1]

    @torch.inference_mode()
    def _finish(
        self,
        rows: Sequence[TokenIds],
        query: StateQuery | None,
        steps: Sequence[tuple[int, ...]],
        launched: Pending[EngineOutput],
    ) -> EngineOutput:
        return self._recompute_non_finite(rows, query, steps, launched.result())

    # --- One pass ----------------------------------------------------------------------------------------------------

    def _run_cached(
        self,
        cache: KVCache,
        rows: Sequence[TokenIds],
        query: StateQuery | None,
        prompts: Sequence[int | None],
        steps: Sequence[tuple[int, ...]],
    ) -> EngineOutput:
        """Run a pass that reads the prefix cache, and adds to it if all that it computed is finite."""
        steps_of_rows = steps or [()] * len(rows)
        limits = [
            self._max_cached(row, start, own)
            for row, start, own in zip(rows, _mean_starts(rows, query), steps_of_rows, strict=True)
        ]
        cached = cache.lookup(rows, limits)
        layout = self._layout_of(rows, cached.spans)
        with cache.begin(cached, rows, layout.sequences, prompts, self._classifier.device) as transaction:
            output = self._launch_packed(rows, query, steps, layout.with_cache(transaction)).result()
            if all(_is_finite(output, index) for index in range(len(rows))):
                transaction.commit()
        return replace(output, cached_tokens=cached.num_saved)

    def _launch(
        self, rows: Sequence[TokenIds], query: StateQuery | None, steps: Sequence[tuple[int, ...]]
    ) -> Pending[EngineOutput]:
        """Launch a pass without the prefix cache: a recorded one where it fits, else a packed one."""
        recorded = None if steps else self._choose_recorded(rows, query)
        if recorded is not None:
            return self._launch_recorded(*recorded, rows)
        return self._launch_packed(rows, query, steps, self._layout_of(rows))

    def _choose_recorded(self, rows: Sequence[TokenIds], query: StateQuery | None) -> tuple[Bucket, StaticPass] | None:
        """Return the recorded pass for a batch that shares no prefix and reads no states; None where there is none."""
        if query is not None and query.readings:
            return None
        recorded = self.library.choose(rows)
        if recorded is None or has_shared_prefix(rows, self.min_shared_prefix_tokens):
            return None
        return recorded

    @torch.inference_mode()
    def _launch_recorded(self, bucket: Bucket, recorded: StaticPass, rows: Sequence[TokenIds]) -> Pending[EngineOutput]:
        pooled = [self._classifier.pooled_position(row) for row in rows]
        recorded.load(self._staging.to_device(fill_bucket(bucket, rows, pooled, PADDING_ID).tensors))
        return _output_of(self._staging.to_host([recorded.compute()[: len(rows)]]), (), [0] * len(rows))

    def _layout_of(self, rows: Sequence[TokenIds], cached: Sequence[TokenSpan] | None = None) -> PackedLayout:
        return PackedLayout.of(
            rows,
            self._classifier.device,
            block=BLOCK if self._classifier.is_on_cpu else 1,
            min_shared_tokens=self.min_shared_prefix_tokens,
            batch_invariant_linear=self._batch_invariant_linear,
            cached=cached,
            cascade=self._cascade,
            batch_invariant=self._batch_invariant,
        )

    @torch.inference_mode()
    def _launch_packed(
        self,
        rows: Sequence[TokenIds],
        query: StateQuery | None,
        steps: Sequence[tuple[int, ...]],
        layout: PackedLayout,
    ) -> Pending[EngineOutput]:
        classifier = self._classifier
        pooled = [
            sequence.index_of(classifier.pooled_position(row))
            for sequence, row in zip(layout.sequences, rows, strict=True)
        ]
        head_positions = _head_positions(layout, pooled, steps) if steps else pooled
        if classifier.gate_pattern:
            head_positions = [*head_positions, *self._gate_positions(layout, rows, steps)]
        taps, readouts = _readouts_of(query, layout, pooled)
        layout = layout.reading([*head_positions, *self._averaged_last(taps, readouts)])
        layout, (ids, positions, read) = layout.to_device(
            self._staging,
            [torch.tensor([layout.token_ids(rows, PADDING_ID)]), layout.position_ids(), torch.tensor(head_positions)],
        )
        with classifier.recording(taps, readouts) as recorded:
            states = classifier.body(
                input_ids=ids, attention_mask=self._mask, position_ids=positions, use_cache=False, packed_layout=layout
            ).last_hidden_state[0]
        self._skip_mask_inference()
        read_states = states.index_select(0, read)
        outputs = classifier.outputs_of(*(read_states.chunk(2) if classifier.gate_pattern else (read_states,)))
        tapped_states = recorded.stacked()
        results = [outputs] if tapped_states is None else [outputs, tapped_states]
        shared_tokens = [sequence.num_shared for sequence in layout.sequences]
        return _output_of(self._staging.to_host(results), steps, shared_tokens)

    def _skip_mask_inference(self) -> None:
        """From the second pass on, pass a mask that is not read.

        Without a mask transformers searches the position ids for sequence limits, and waits for the device to do so.
        The first pass has none, so that a model which adds a pattern of its own to the mask is detected (``no_mask``).
        """
        if self._mask is None and not self._classifier.is_on_cpu:
            self._mask = torch.empty((1, 1, 1, 0), dtype=torch.bool, device=self._classifier.device)

    # --- Which states are read ---------------------------------------------------------------------------------------

    def _gate_positions(
        self, layout: PackedLayout, rows: Sequence[TokenIds], steps: Sequence[tuple[int, ...]]
    ) -> list[int]:
        """Return where the gate reads in the packed batch, for each token that the head reads."""
        positions = [
            sequence.index_of(self._classifier.gate_position(row))
            for sequence, row in zip(layout.sequences, rows, strict=True)
        ]
        if not steps:
            return positions
        return [position for position, own in zip(positions, steps, strict=True) for _ in range(len(own) + 1)]

    def _averaged_last(self, taps: Sequence[StateTap], readouts: Sequence[Readout]) -> Iterator[int]:
        """Yield the tokens of the packed batch whose states after the last block are averaged."""
        num_blocks = self._classifier.config.num_hidden_layers
        if any(tap.layer == num_blocks and tap.pooling == "mean" for tap in taps):
            for begin, end in (span for readout in readouts for span in readout.spans):
                yield from range(begin, end)

    def _max_cached(self, row: TokenIds, mean_start: int | None, steps: tuple[int, ...]) -> int:
        """Return how many leading tokens a pass may take from the cache: none whose state is read."""
        first_read = min((self._classifier.pooled_position(row), *steps[:1]))
        if self._classifier.gate_pattern:
            # A sequence that the gate cannot read fails in its pass, not in the queue, which asks here too.
            first_read = min(first_read, last_occurrence(row, self._classifier.gate_pattern) or 0)
        return first_read if mean_start is None else min(first_read, _first_counted(row, mean_start))

    # --- Results that are not finite ---------------------------------------------------------------------------------

    def _recompute_non_finite(
        self,
        rows: Sequence[TokenIds],
        query: StateQuery | None,
        steps: Sequence[tuple[int, ...]],
        output: EngineOutput,
    ) -> EngineOutput:
        """Compute sequences with an output that is not finite again, each alone and without the cache.

        A state that is not finite affects all sequences that share a prefix with its own, even if it is after that
        prefix: in the sum of attention, zero times infinity is NaN.
        """
        if not any(output.shared_tokens):
            return output
        rewards = list(output.rewards)
        outputs = None if output.outputs is None else list(output.outputs)
        for index, row in enumerate(rows):
            if not _is_finite(output, index):
                alone = self._recompute(output, index, row, query, steps[index : index + 1])
                rewards[index] = alone.rewards[0]
                if outputs is not None and alone.outputs is not None:
                    outputs[index] = alone.outputs[0]
        return replace(output, rewards=rewards, outputs=outputs)

    def _recompute(
        self,
        output: EngineOutput,
        index: int,
        row: TokenIds,
        query: StateQuery | None,
        steps: Sequence[tuple[int, ...]],
    ) -> EngineOutput:
        """Return the output of a sequence computed alone, and write its states into the output of the batch."""
        readings = (
            [] if query is None else [number for number, (owner, _) in enumerate(query.readings) if owner == index]
        )
        own = query and StateQuery(query.taps, tuple((0, query.readings[number][1]) for number in readings))
        alone = self._launch([row], own if readings else None, steps).result()
        if output.states is not None and alone.states is not None:
            output.states[readings] = alone.states
        return alone


def _register_attention(*, compiled: bool, kernels: Kernels | None) -> str:
    """Register the attention of a path with transformers, and return its name."""
    if kernels is not None:
        return register_kernel_attention(kernels)
    return register_compiled_attention() if compiled else register_packed_attention()


def _output_of(
    copies: Pending[list[torch.Tensor]], steps: Sequence[tuple[int, ...]], shared_tokens: list[int]
) -> Pending[EngineOutput]:
    """Return the output of a launched pass, finite or not; ``copies``: the head's, and the states if requested."""

    def complete() -> EngineOutput:
        outputs, *states = copies.result()
        return output_of(outputs, steps, shared_tokens, states[0].numpy() if states else None)

    return Deferred(complete)


def _is_finite(output: EngineOutput, index: int) -> bool:
    """Whether all that the head gave for a sequence is finite."""
    if output.outputs is None:
        return isfinite(output.rewards[index])
    return bool(np.isfinite(output.outputs[index]).all())


def _head_positions(layout: PackedLayout, pooled: Sequence[int], steps: Sequence[tuple[int, ...]]) -> list[int]:
    """Return where the head reads in the packed batch, sequence by sequence: its steps, then its pooled token."""
    return [
        index
        for sequence, own, last in zip(layout.sequences, steps, pooled, strict=True)
        for index in (*map(sequence.index_of, own), last)
    ]


def _mean_starts(rows: Sequence[TokenIds], query: StateQuery | None) -> list[int | None]:
    """Return the first token of each sequence that ``mean`` pooling reads; None where only the pooled one is read."""
    starts: list[int | None] = [None] * len(rows)
    if query is not None and any(tap.pooling == "mean" for tap in query.taps):
        for index, requested in query.readings:
            counted, known = _first_counted(rows[index], requested), starts[index]
            starts[index] = counted if known is None else min(known, counted)
    return starts


def _first_counted(row: TokenIds, requested: int) -> int:
    """Return the first token that a mean counts: the requested one, or the first of all where none would be left."""
    return requested if requested < len(row) else 0


def _readouts_of(
    query: StateQuery | None, layout: PackedLayout, pooled: Sequence[int]
) -> tuple[tuple[StateTap, ...], list[Readout]]:
    """Return the taps of a query, and where in the packed batch its readings are."""
    if query is None:
        return (), []
    readouts = []
    for index, first in query.readings:
        sequence = layout.sequences[index]
        readouts.append(Readout(0, pooled[index], sequence.spans_from(first) or sequence.spans))
    return query.taps, readouts
