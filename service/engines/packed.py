"""The packed path: the sequences of a batch stand in one row, without padding, and what they share stands there once.

The model's own transformers code runs unchanged, with the attention of ``attention``. It holds no state between passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch

from service.engines.attention import ATTENTION, PackingUnsupportedError
from service.engines.base import BatchCost, StateTap
from service.engines.classifier import Classifier, PathOutput
from service.engines.compilation import COMPILED_ATTENTION
from service.engines.kernels.attachment import multiplies_on_kernels
from service.engines.kernels.attention import register_attention
from service.engines.kernels.library import Kernels
from service.engines.packing import BLOCK, Packing
from service.engines.taps import Spot, StateQuery

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
    ) -> None:
        if classifier.linear_head is None:
            raise PackingUnsupportedError(f"{classifier.architecture} does not read its reward off one token's state")
        row_blocks = classifier.is_on_cpu and classifier.is_half_precision
        attention = COMPILED_ATTENTION if compiled else ATTENTION
        if kernels is not None and kernels.has_tiles:
            attention = register_attention(kernels)
        classifier.run_with(attention, row_blocks=row_blocks, compiled=compiled, kernels=kernels)
        self._classifier = classifier
        self._row_blocks = row_blocks and not multiplies_on_kernels(classifier.body)
        self.kernels = kernels
        self.shared_from = SHORTEST_SHARED if share_prefixes else None

    @torch.inference_mode()
    def run(self, rows: Sequence[tuple[int, ...]], query: StateQuery | None = None) -> PathOutput:
        """Score rows of token ids in one pass; see ``ForwardPath.run``.

        A state that is not finite reaches all that share its row's beginning, even from behind it: in a sum, zero times
        infinity is no number. So rows without a finite reward are computed again by themselves.
        """
        output = self._pass(rows, query)
        if any(output.shared_tokens):
            for place, reward in enumerate(output.rewards):
                if not isfinite(reward):
                    self._replace(output, place, rows[place], query)
        return output

    def _replace(self, output: PathOutput, place: int, row: tuple[int, ...], query: StateQuery | None) -> None:
        readings = [] if query is None else [index for index, (owner, _) in enumerate(query.readings) if owner == place]
        own = query and StateQuery(query.taps, tuple((0, query.readings[index][1]) for index in readings))
        alone = self._pass([row], own if readings else None)
        output.rewards[place] = alone.rewards[0]
        if output.states is not None and alone.states is not None:
            output.states[readings] = alone.states

    def _pass(self, rows: Sequence[tuple[int, ...]], query: StateQuery | None) -> PathOutput:
        classifier = self._classifier
        pooled = [classifier.pooled_position(row) for row in rows]
        packing = Packing.of(
            rows,
            classifier.device,
            block=BLOCK if classifier.is_on_cpu else 1,
            shortest_shared=self.shared_from,
            row_blocks=self._row_blocks,
        )
        places = [branch.place(position) for branch, position in zip(packing.branches, pooled, strict=True)]
        with classifier.tapped(*_tapping(query, packing, places)) as tapped:
            states = classifier.body(
                input_ids=classifier.token_tensor([packing.token_ids(rows, FILLER_ID)]),
                position_ids=packing.position_ids(),
                use_cache=False,
                packing=packing,
            ).last_hidden_state[0]
        return PathOutput(
            classifier.read_rewards(states[places]),
            [branch.num_shared for branch in packing.branches],
            tapped.stacked(),
        )


def _tapping(
    query: StateQuery | None, packing: Packing, places: Sequence[int]
) -> tuple[tuple[StateTap, ...], list[Spot]]:
    """Say where in the row the states stand that are asked for."""
    if query is None:
        return (), []
    spots = []
    for row, first in query.readings:
        branch = packing.branches[row]
        spots.append(Spot(0, places[row], branch.spans_from(first) or branch.spans))
    return query.taps, spots
