"""The packed path: the sequences of a batch stand in one row, without padding, and what they share stands there once.

The model's own transformers code runs unchanged, with the attention of ``attention``. Where prompts are kept for later
passes, a pass computes what is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch

from service.engines.attention import ATTENTION, PackingUnsupportedError
from service.engines.base import BatchCost, StateTap
from service.engines.classifier import Classifier, PathOutput
from service.engines.compilation import COMPILED_ATTENTION
from service.engines.kept_states import KeptStates, Visit
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
        kept_bytes: what keys and values kept between passes may take; 0: none are kept. They are with shared beginnings
            only.
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
        kept_bytes: int = 0,
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
        self.kept = KeptStates(kept_bytes, SHORTEST_SHARED) if kept_bytes and share_prefixes else None
        self.keeps = self.kept is not None

    @torch.inference_mode()
    def run(
        self,
        rows: Sequence[tuple[int, ...]],
        query: StateQuery | None = None,
        prompts: Sequence[int | None] | None = None,
    ) -> PathOutput:
        """Score rows of token ids in one pass; see ``ForwardPath.run``.

        A state that is not finite reaches all that share its row's beginning, even from behind it: in a sum, zero times
        infinity is no number. So rows without a finite reward are computed again by themselves, and by nothing kept.
        """
        output = self._visiting_pass(rows, query, prompts)
        if any(output.shared_tokens):
            for place, reward in enumerate(output.rewards):
                if not isfinite(reward):
                    self._replace(output, place, rows[place], query)
        return output

    def forget(self) -> None:
        """Let go of all that is kept."""
        if self.kept is not None:
            self.kept.prefixes.clear()

    def num_kept(self, row: tuple[int, ...], first_wanted: int | None) -> int:
        """Return how many leading tokens of a row the next pass need not compute; see ``ForwardPath.num_kept``."""
        if self.kept is None or not row:
            return 0
        return self.kept.prefixes.longest(row, self._limit(row, first_wanted))[1]

    def _limit(self, row: tuple[int, ...], first_wanted: int | None) -> int:
        """Return how many leading tokens a pass may leave out: none whose state is read."""
        pooled = self._classifier.pooled_position(row)
        return pooled if first_wanted is None else min(pooled, _first_counted(row, first_wanted))

    def _replace(self, output: PathOutput, place: int, row: tuple[int, ...], query: StateQuery | None) -> None:
        readings = [] if query is None else [index for index, (owner, _) in enumerate(query.readings) if owner == place]
        own = query and StateQuery(query.taps, tuple((0, query.readings[index][1]) for index in readings))
        alone = self._pass([row], own if readings else None)
        output.rewards[place] = alone.rewards[0]
        if output.states is not None and alone.states is not None:
            output.states[readings] = alone.states

    def _visiting_pass(
        self, rows: Sequence[tuple[int, ...]], query: StateQuery | None, prompts: Sequence[int | None] | None
    ) -> PathOutput:
        """Run a pass that uses what is kept and keeps what it finds, unless something in it is not finite."""
        if self.kept is None or prompts is None:
            return self._pass(rows, query)
        limits = [self._limit(row, first) for row, first in zip(rows, _first_wanted(rows, query), strict=True)]
        with self.kept.visit(rows, limits) as visit:
            output = self._pass(rows, query, visit, prompts)
            if all(map(isfinite, output.rewards)):
                visit.confirm()
        return output

    def _pass(
        self,
        rows: Sequence[tuple[int, ...]],
        query: StateQuery | None,
        visit: Visit | None = None,
        prompts: Sequence[int | None] = (),
    ) -> PathOutput:
        classifier = self._classifier
        pooled = [classifier.pooled_position(row) for row in rows]
        packing = Packing.of(
            rows,
            classifier.device,
            block=BLOCK if classifier.is_on_cpu else 1,
            shortest_shared=self.shared_from,
            row_blocks=self._row_blocks,
            visit=visit,
        )
        if visit is not None:
            visit.plan(packing.branches, prompts, classifier.device)
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
            visit.num_taken if visit is not None else 0,
        )


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
) -> tuple[tuple[StateTap, ...], list[Spot]]:
    """Say where in the row the states stand that are asked for."""
    if query is None:
        return (), []
    spots = []
    for row, first in query.readings:
        branch = packing.branches[row]
        spots.append(Spot(0, places[row], branch.spans_from(first) or branch.spans))
    return query.taps, spots
