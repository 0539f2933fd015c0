"""Tiled attention: the attention of all sequences in tiles of a few sizes, computed by batched matrix products.

A tile is a run of consecutive queries of one sequence, and all keys that they may attend to. The tiles of a pass are
the same for every layer with the same sliding window.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from service.engines.attention.gather import pad_heads
from service.scheduling.prefix_tree import SequenceLayout

MAX_TILE_QUERIES = 128
"""Queries of a full tile. The products that causality hides within a tile are wasted; smaller products run slower."""

MIN_TILE_QUERIES = 32
"""Queries of the smallest tile; sizes are this and its doubles up to ``MAX_TILE_QUERIES``."""

TILE_KEY_MULTIPLE = 64
"""The keys of a tile are padded to a multiple of this, so that many tiles have equal sizes. It must be a multiple of
32: with such sizes, CPU matrix products give a token the same bits however many hidden keys follow it."""

MAX_SCORES = 1 << 18
"""Scores of one head that are computed at once: with a few heads they fit a core's share of the cache."""


@dataclass(frozen=True, slots=True)
class TileBatch:
    """Tiles of one size."""

    queries: torch.Tensor
    """Indices in the packed batch, int64 [tiles, queries], padded with the sequence's last token."""

    keys: torch.Tensor
    """Indices in the packed batch and the cached tokens that follow it, int64 [tiles, keys], padded in the same way."""

    mask: torch.Tensor
    """[tiles, queries, keys], added to the scores: zero, or minus infinity where a key is hidden."""

    real_queries: torch.Tensor
    """Indices of the queries that are not padding, in the flattened ``queries``: int64."""

    output_indices: torch.Tensor
    """Indices of those queries in the packed batch: int64."""


@dataclass(frozen=True, slots=True)
class _Tile:
    """Some consecutive queries of a sequence, with the keys from ``first_key`` on."""

    sequence: SequenceLayout
    first_query: int
    """Position in the sequence."""
    num_queries: int
    first_key: int
    """Position in the sequence."""

    @property
    def size(self) -> tuple[int, int]:
        """Queries and keys, padding included."""
        num_queries = MIN_TILE_QUERIES
        while num_queries < self.num_queries:
            num_queries *= 2
        num_keys = self.first_query + self.num_queries - self.first_key
        return num_queries, -(-num_keys // TILE_KEY_MULTIPLE) * TILE_KEY_MULTIPLE


def plan_tiles(sequences: Sequence[SequenceLayout], window: int | None, dtype: torch.dtype) -> list[TileBatch]:
    """Divide the attention of sequences on a CPU into batches of tiles of equal size.

    Args:
        sequences: the sequences of the packed batch.
        window: tokens that a query attends to, itself included; None: all before it.
        dtype: the dtype of the masks.
    """
    tiles = defaultdict(list)
    for sequence in sequences:
        for tile in _tiles_of(sequence, window):
            tiles[tile.size].append(tile)
    batches = []
    for (num_queries, num_keys), same_size in tiles.items():
        batch_size = max(1, MAX_SCORES // (num_queries * num_keys))
        batches += [
            _batch_of(same_size[first : first + batch_size], num_queries, num_keys, window, dtype)
            for first in range(0, len(same_size), batch_size)
        ]
    return batches


def _tiles_of(sequence: SequenceLayout, window: int | None) -> Iterator[_Tile]:
    for first in range(0, sequence.num_own, MAX_TILE_QUERIES):
        first_query = sequence.num_shared + first
        # Keys outside the window are left out in whole multiples, so that the rounding of the others does not change.
        first_key = 0 if window is None else max(0, first_query - window + 1) // TILE_KEY_MULTIPLE * TILE_KEY_MULTIPLE
        yield _Tile(sequence, first_query, min(MAX_TILE_QUERIES, sequence.num_own - first), first_key)


def _batch_of(
    tiles: Sequence[_Tile], num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype
) -> TileBatch:
    first_queries = torch.tensor([tile.first_query for tile in tiles])[:, None, None]
    first_keys = torch.tensor([tile.first_key for tile in tiles])[:, None, None]
    distance = (first_queries + torch.arange(num_queries)[:, None]) - (first_keys + torch.arange(num_keys))
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    queries = torch.stack([_query_indices(tile, num_queries) for tile in tiles])
    is_real = torch.arange(num_queries) < torch.tensor([tile.num_queries for tile in tiles])[:, None]
    return TileBatch(
        queries,
        torch.stack([_key_indices(tile, num_keys) for tile in tiles]),
        torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")),
        is_real.flatten().nonzero()[:, 0],
        queries[is_real],
    )


def _query_indices(tile: _Tile, size: int) -> torch.Tensor:
    begin = tile.sequence.own[0] + tile.first_query - tile.sequence.num_shared
    return (begin + torch.arange(size)).clamp_(max=tile.sequence.own[1] - 1)


def _key_indices(tile: _Tile, size: int) -> torch.Tensor:
    spans = tile.sequence.spans_from(tile.first_key)
    indices = torch.cat([torch.arange(begin, end) for begin, end in spans])[:size]
    return torch.nn.functional.pad(indices, (0, size - len(indices)), value=int(indices[-1]))


def attend_tiles(
    output: torch.Tensor,
    tiles: TileBatch,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
) -> None:
    """Compute attention for a batch of tiles and write the results of its real queries.

    Scores have the precision of the model, as in transformers' eager code; the query heads that share a key head are
    rows of one matrix product.

    Args:
        output: [1, tokens, heads, value dimension], written in place.
        tiles: a batch of tiles of the packed layout.
        query: [1, heads, tokens, head dimension].
        key: [1, key heads, tokens, head dimension], followed by the cached ones.
        value: as ``key``.
        scaling: factor on the scores.
    """
    (num_tiles, num_queries), num_keys = tiles.queries.shape, tiles.keys.shape[1]
    num_heads, key_heads, head_dim = query.shape[1], key.shape[1], value.shape[3]
    queries = _gather_tiles(query, tiles.queries)
    queries = queries.view(num_tiles, num_queries, key_heads, num_heads // key_heads, -1)
    queries = queries.permute(0, 2, 3, 1, 4).reshape(num_tiles * key_heads, -1, queries.shape[-1])
    keys, values = (
        _gather_tiles(states, tiles.keys).transpose(1, 2).reshape(num_tiles * key_heads, num_keys, -1)
        for states in (key, value)
    )
    scores = queries.new_empty(num_tiles * key_heads, queries.shape[1], num_keys)
    torch.baddbmm(scores, queries, keys.transpose(1, 2), beta=0, alpha=scaling, out=scores)
    scores.view(num_tiles, -1, num_queries, num_keys).add_(tiles.mask[:, None])
    attended = torch.softmax(scores, dim=-1, out=scores) @ values
    attended = attended.view(num_tiles, num_heads, num_queries, -1)[..., :head_dim].transpose(1, 2)
    output[0].index_copy_(0, tiles.output_indices, attended.flatten(0, 1).index_select(0, tiles.real_queries))


def _gather_tiles(states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return [tiles, tokens of a tile, heads, head dimension] of [1, heads, tokens, head dimension]."""
    gathered = states[0].transpose(0, 1).index_select(0, indices.flatten())
    return pad_heads(gathered.view(*indices.shape, *gathered.shape[1:]))
