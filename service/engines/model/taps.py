"""Hidden states, read off a forward pass while it runs and pooled at once, so that no layer's states are kept.

It listens at the borders between a model's blocks and changes nothing that passes there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from service.engines.base import StatePooling, StateTap
from service.engines.devices.staging import sent
from service.errors import SettingsError
from service.scheduling.prefix_tree import TokenSpan


@dataclass(frozen=True, slots=True)
class StateQuery:
    """Which states a pass is asked for: all taps of each reading.

    ``readings``: a row of the pass, and the first of its tokens that ``mean`` counts in; all count when none is left.
    """

    taps: tuple[StateTap, ...]
    readings: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a reading stands in hidden states [rows, positions, hidden]: its row, the token of ``last``, its pieces."""

    row: int
    last: int
    pieces: tuple[TokenSpan, ...]


@dataclass(slots=True)
class TappedStates:
    """What was read off one pass, tap by tap, as it went by: float32 [spots, hidden] each."""

    taps: tuple[StateTap, ...]
    found: dict[StateTap, torch.Tensor] = field(default_factory=dict)

    def stacked(self) -> torch.Tensor | None:
        """Return float32 [spots, taps, hidden] on the device; None where no tap was asked for."""
        return torch.stack([self.found[tap] for tap in self.taps], dim=1) if self.taps else None


@contextmanager
def tapped(
    body: nn.Module, num_blocks: int, taps: tuple[StateTap, ...], spots: Sequence[Spot]
) -> Iterator[TappedStates]:
    """Read the states at the taps off the pass that runs while the context is open.

    Args:
        body: the transformer below the head.
        num_blocks: its depth.
        taps: where to read; with none, nothing is hooked.
        spots: what to pool, in the hidden states of this pass.
    """
    tapped_states = TappedStates(taps)

    def read(layer: int, states: torch.Tensor) -> None:
        for tap in taps:
            if tap.layer == layer:
                tapped_states.found[tap] = pool(states, spots, tap.pooling)

    handles = [_listen(body, num_blocks, layer, read) for layer in dict.fromkeys(tap.layer for tap in taps)]
    try:
        yield tapped_states
    finally:
        for handle in handles:
            handle.remove()


def pool(states: torch.Tensor, spots: Sequence[Spot], pooling: StatePooling) -> torch.Tensor:
    """Return float32 [spots, hidden]: the state of each spot's last token, or the mean over its pieces."""
    if pooling == "last":
        places = torch.tensor([spot.row * states.shape[1] + spot.last for spot in spots])
        return states.flatten(0, 1).index_select(0, sent(places, states.device)).float()
    means = []
    for spot in spots:
        pieces = [states[spot.row, begin:end] for begin, end in spot.pieces]
        tokens = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        means.append(tokens.mean(dim=0, dtype=torch.float32))
    return torch.stack(means)


def check_taps(body: nn.Module, num_blocks: int, taps: Sequence[StateTap]) -> None:
    """Say nothing where every tap can be read.

    Raises:
        SettingsError: the model has no such layer, or does not show its blocks.
    """
    for tap in taps:
        if not 0 <= tap.layer <= num_blocks:
            raise SettingsError(f"The model has {num_blocks} blocks: no states can be read at layer {tap.layer}")
    if taps:
        blocks_of(body, num_blocks)


def _listen(body: nn.Module, num_blocks: int, layer: int, read: Any) -> Any:
    """Hook the border behind so many blocks: what goes into the next one, or what the body returns behind its norm."""
    if layer == num_blocks:
        return body.register_forward_hook(lambda _module, _inputs, output: read(layer, output[0]))

    def read_input(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        read(layer, inputs[0] if inputs else named["hidden_states"])

    return blocks_of(body, num_blocks)[layer].register_forward_pre_hook(read_input, with_kwargs=True)


def blocks_of(body: nn.Module, num_blocks: int) -> nn.ModuleList:
    """Return the list of a model's blocks.

    Raises:
        SettingsError: the model does not show it.
    """
    for module in body.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks:
            return module
    raise SettingsError(f"{type(body).__name__} does not show its {num_blocks} blocks: no states can be read there")
