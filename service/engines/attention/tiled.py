"""Attention cut into tiles of equal size, so that a few batched matrix products do it for all sequences of a row.

A tile is some neighbouring tokens of one sequence that ask, and all that they may look at. It knows positions and masks
only, no states; they are the same for every layer of a pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from service.scheduling.prefix_tree import Branch

TILE = 128
"""Queries of a full tile. What causality hides within it is multiplied for nothing; smaller products run slower."""

SMALLEST_TILE = 32
"""Queries of the smallest tile; between both stand powers of two."""

KEY_STEP = 64
"""Keys of a tile are a multiple of this, so that sizes meet. They must be one of 32: among such, CPU kernels give a
token the same bits however many keys are hidden behind it."""

MAX_SCORES = 1 << 18
"""Scores of one head that are computed at once: with a few heads they stay within a core's share of the cache."""


@dataclass(frozen=True, slots=True)
class TileBatch:
    """Tiles of one size.

    ``queries``: int64 [tiles, queries], and ``keys``: int64 [tiles, keys], positions in the row, filled up with a
    sequence's last. ``mask``: [tiles, queries, keys], zero, or minus infinity where a key is not seen. ``results``:
    int64, which of the flattened queries are no filling, and ``places``: where in the row they stand.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor
    results: torch.Tensor
    places: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Tile:
    """So many tokens of a sequence from ``depth`` on, which look at keys from ``oldest`` on."""

    branch: Branch
    depth: int
    num_queries: int
    oldest: int

    @property
    def size(self) -> tuple[int, int]:
        """Queries and keys, filling included."""
        num_queries = SMALLEST_TILE
        while num_queries < self.num_queries:
            num_queries *= 2
        return num_queries, -(-(self.depth + self.num_queries - self.oldest) // KEY_STEP) * KEY_STEP


def cut_tiles(branches: Sequence[Branch], window: int | None, dtype: torch.dtype) -> list[TileBatch]:
    """Cut the attention of sequences on a CPU into batches of tiles.

    Args:
        branches: where the sequences stand in the row.
        window: tokens that a query sees, itself included; None: all before it.
        dtype: of the masks.
    """
    tiles = defaultdict(list)
    for branch in branches:
        for tile in _tiles_of(branch, window):
            tiles[tile.size].append(tile)
    batches = []
    for (num_queries, num_keys), alike in tiles.items():
        room = max(1, MAX_SCORES // (num_queries * num_keys))
        batches += [
            _batch_of(alike[first : first + room], num_queries, num_keys, window, dtype)
            for first in range(0, len(alike), room)
        ]
    return batches


def _tiles_of(branch: Branch, window: int | None) -> Iterator[_Tile]:
    for first in range(0, branch.num_own, TILE):
        depth = branch.num_shared + first
        # Keys out of the window go in whole steps, so that no rounding moves.
        oldest = 0 if window is None else max(0, depth - window + 1) // KEY_STEP * KEY_STEP
        yield _Tile(branch, depth, min(TILE, branch.num_own - first), oldest)


def _batch_of(
    tiles: Sequence[_Tile], num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype
) -> TileBatch:
    depths = torch.tensor([tile.depth for tile in tiles])[:, None, None]
    oldest = torch.tensor([tile.oldest for tile in tiles])[:, None, None]
    distance = (depths + torch.arange(num_queries)[:, None]) - (oldest + torch.arange(num_keys))
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    queries = torch.stack([_own_positions(tile, num_queries) for tile in tiles])
    is_real = torch.arange(num_queries) < torch.tensor([tile.num_queries for tile in tiles])[:, None]
    return TileBatch(
        queries,
        torch.stack([_key_positions(tile, num_keys) for tile in tiles]),
        torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")),
        is_real.flatten().nonzero()[:, 0],
        queries[is_real],
    )


def _own_positions(tile: _Tile, size: int) -> torch.Tensor:
    begin = tile.branch.own[0] + tile.depth - tile.branch.num_shared
    return (begin + torch.arange(size)).clamp_(max=tile.branch.own[1] - 1)


def _key_positions(tile: _Tile, size: int) -> torch.Tensor:
    spans = tile.branch.spans_from(tile.oldest)
    positions = torch.cat([torch.arange(begin, end) for begin, end in spans])[:size]
    return torch.nn.functional.pad(positions, (0, size - len(positions)), value=int(positions[-1]))
