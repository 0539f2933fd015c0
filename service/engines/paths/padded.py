"""The padded path: the sequences of a batch are padded on the right to the length of the longest one.

It serves architectures whose attention or head the packed path does not support, with transformers' own attention; or,
where no bit of a reward may depend on the batch, with attention of one sequence after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

from service.engines.attention.row_attention import attending_by_row, register_row_attention
from service.engines.base import BatchCost, EngineOutput
from service.engines.kernels.bindings import Kernels
from service.engines.linear.verified_blocks import STEP, check_products
from service.engines.model.classifier import Classifier
from service.engines.model.taps import Readout, StateQuery
from service.engines.paths.base import output_of
from service.engines.rewiring import rewire


class PaddedForward:
    """Runs a batch as a rectangle. Its cost is the length of its longest sequence times its number of sequences.

    On a CPU in half precision each sequence is a batch of its own: padding would select other kernels, whose rounding
    moves a reward by hundredths, and batching saves little time on a CPU.

    Args:
        classifier: a batch-invariant path replaces its attention and its linear layers.
        batch_invariant: whether no bit of a reward may depend on the other sequences of its batch.

    Raises:
        InvarianceError: the model has layers for which that cannot be had.
    """

    name = "padded"
    cost: BatchCost = "padded"
    min_shared_prefix_tokens: int | None = None
    kernels: Kernels | None = None
    caches_prefixes = False

    def __init__(self, classifier: Classifier, *, batch_invariant: bool = False) -> None:
        attention = register_row_attention() if batch_invariant else classifier.plain_attention
        rewire(classifier, attention, verified_linear=batch_invariant)
        if batch_invariant:
            check_products(classifier.multiplied_together)
        self._classifier = classifier
        self._batch_invariant = batch_invariant
        self._min_batch_tokens = min(STEP, getattr(classifier.config, "max_position_embeddings", None) or STEP)
        self._pads = not (classifier.is_on_cpu and classifier.is_half_precision)

    @torch.inference_mode()
    def run(
        self,
        rows: Sequence[tuple[int, ...]],
        query: StateQuery | None = None,
        prompts: Sequence[int | None] | None = None,
        steps: Sequence[tuple[int, ...]] = (),
    ) -> EngineOutput:
        """Score rows in one pass; see ``ForwardPath.run``. Nothing is cached.

        Raises:
            TypeError: steps are requested of a model whose own head pools.
        """
        del prompts
        query = query or StateQuery((), ())
        readings = query.readings
        steps_of_rows = steps or [()] * len(rows)
        if self._pads:
            values, states = self._run_padded(rows, steps_of_rows, StateQuery(query.taps, readings))
            return output_of(values, steps, [0] * len(rows), _on_host(states))
        all_values, parts = [], []
        for index, row in enumerate(rows):
            own = tuple((0, first) for owner, first in readings if owner == index)
            values, part = self._run_padded([row], [steps_of_rows[index]], StateQuery(query.taps if own else (), own))
            all_values.append(values)
            parts.append(part)
        return output_of(torch.cat(all_values), steps, [0] * len(rows), _on_host(_in_order(readings, parts)))

    def clear_cache(self) -> None:
        """Do nothing: nothing is cached."""

    def num_cached_tokens(self, row: tuple[int, ...], mean_start: int | None, steps: tuple[int, ...] = ()) -> int:
        """Return zero: nothing is cached."""
        del row, mean_start, steps
        return 0

    def _run_padded(
        self, rows: Sequence[tuple[int, ...]], steps: Sequence[tuple[int, ...]], query: StateQuery
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the head's outputs float32 [positions, outputs], row by row, and the states that are requested."""
        classifier = self._classifier
        longest = max(len(row) for row in rows)
        if self._batch_invariant:
            # Very few rows take other code: CUDA's sums over a row, and on a CPU activations of one token, which is
            # contiguous where the same token of a batch is not.
            longest = max(longest, -(-self._min_batch_tokens // len(rows)))
        # States of padding are never read; where no pad token is defined, any token is valid.
        pad = classifier.pad_token_id or 0
        inputs = {
            **classifier.inputs_of([[*row, *[pad] * (longest - len(row))] for row in rows]),
            "attention_mask": classifier.token_tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        }
        pooled = [classifier.head_position(row) for row in rows]
        readouts = [
            Readout(index, pooled[index], ((first if first < len(rows[index]) else 0, len(rows[index])),))
            for index, first in query.readings
        ]
        by_row = attending_by_row([len(row) for row in rows]) if self._batch_invariant else nullcontext()
        with by_row, classifier.recording(query.taps, readouts) as recorded:
            if classifier.state_head is None:
                if any(steps):
                    raise TypeError(f"The head of {classifier.architecture} does its own pooling, and reads no steps")
                outputs: torch.Tensor = classifier.model(**inputs).logits
            else:
                states = classifier.body(**inputs, use_cache=False).last_hidden_state
                read = [(row, position) for row, own in enumerate(steps) for position in (*own, pooled[row])]
                of_rows = [row for row, _ in read]
                gates = None
                if classifier.gate_pattern:
                    gate_of = [classifier.gate_position(row) for row in rows]
                    gates = states[of_rows, [gate_of[row] for row in of_rows]]
                outputs = classifier.outputs_of(states[of_rows, [position for _, position in read]], gates)
        return outputs, recorded.stacked()


def _in_order(readings: Sequence[tuple[int, int]], parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Return the states of all readings in order; each part has the states of one sequence, in order."""
    states_of = [iter(()) if part is None else iter(part) for part in parts]
    found = [next(states_of[index]) for index, _ in readings]
    return torch.stack(found) if found else None


def _on_host(states: torch.Tensor | None) -> NDArray[np.float32] | None:
    return None if states is None else states.cpu().numpy()
