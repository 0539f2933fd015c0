"""Tiled attention has every token as a query once, with the right keys, and gives the rewards of plain transformers."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_classifiers import load_tiny, packed_path, random_rows, rows_that_share
from tiny_models import DECODER_FAMILIES

from service.engines.attention import interface as attention
from service.engines.attention import tiled as tiles
from service.engines.attention.tiled import MIN_TILE_QUERIES, TILE_KEY_MULTIPLE, plan_tiles
from service.engines.parity import plain_rewards
from service.scheduling.prefix_tree import SequenceLayout, plan_prefix_sharing


def many_sequences() -> list[SequenceLayout]:
    """Sequences of many lengths, some with prefixes in common, one of them whole within another."""
    dice = random.Random(0)
    stem = tuple(range(150))
    endings = [tuple(dice.randrange(999) for _ in range(length)) for length in (1, 31, 64, 129, 300)]
    return plan_prefix_sharing([stem[:90], *(stem + ending for ending in endings), *endings], 8)


@pytest.mark.parametrize("window", [None, 1, 70, 1000])
def test_every_token_is_a_query_once_and_attends_to_its_own_past(window: int | None) -> None:
    """Each token of the batch is a query of one tile, which attends to itself and the tokens before it."""
    sequences = many_sequences()
    seen_by: dict[int, list[int]] = {}

    for batch in plan_tiles(sequences, window, torch.float32):
        queries = batch.queries.flatten()[batch.real_queries]
        assert torch.equal(queries, batch.output_indices)
        masks = batch.mask.flatten(0, 1)[batch.real_queries]
        keys = batch.keys.repeat_interleave(batch.queries.shape[1], dim=0)[batch.real_queries]
        for query, mask, row in zip(queries.tolist(), masks, keys, strict=True):
            assert query not in seen_by
            seen_by[query] = row[mask == 0].tolist()

    for sequence in sequences:
        indices = [sequence.index_of(position) for position in range(sequence.num_tokens)]
        for position in range(sequence.num_shared, sequence.num_tokens):
            oldest = 0 if window is None else max(0, position - window + 1)
            assert seen_by.pop(indices[position]) == indices[oldest : position + 1]
    assert not seen_by


def test_tiles_have_few_sizes_and_stay_small(monkeypatch) -> None:
    """Keys are multiples, queries powers of two, so that many tiles have one size; a batch's scores are bounded."""
    monkeypatch.setattr(tiles, "MAX_SCORES", 128 * 192 * 2)

    batches = plan_tiles(many_sequences(), None, torch.bfloat16)

    for batch in batches:
        (num_tiles, num_queries), num_keys = batch.queries.shape, batch.keys.shape[1]
        assert num_keys % TILE_KEY_MULTIPLE == 0
        assert num_queries in {MIN_TILE_QUERIES, 64, 128}
        assert num_tiles == 1 or num_tiles * num_queries * num_keys <= tiles.MAX_SCORES
        assert batch.mask.dtype == torch.bfloat16
    assert any(len(batch.queries) > 1 for batch in batches)


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_tiled_rewards_are_plain_transformers_rewards(tiny_checkpoint, monkeypatch, family: str) -> None:
    """In fp32 every family's rewards through tiles equal its plain forward one by one, shared prefixes included."""
    monkeypatch.setattr(attention, "prefers_tiled_attention", lambda device, dtype: True)
    monkeypatch.setattr(tiles, "MAX_TILE_QUERIES", 64)
    classifier = load_tiny(tiny_checkpoint(family))
    rows = [*random_rows(classifier, lengths=(130, 64, 65, 1, 33)), *rows_that_share(classifier)]

    rewards = packed_path(classifier).run(rows).rewards

    assert rewards == pytest.approx(plain_rewards(classifier, rows), abs=1e-5, rel=0)


def test_tiles_are_for_bfloat16_without_amx(monkeypatch) -> None:
    """With AMX, without bfloat16 units, in other types and on CUDA torch's fused attention is used."""
    cpu = torch.device("cpu")
    for has_units, has_amx, expected in ((True, False, True), (True, True, False), (False, False, False)):
        monkeypatch.setattr(attention, "has_native_bfloat16", lambda has_units=has_units: has_units)
        monkeypatch.setattr(attention, "has_amx", lambda has_amx=has_amx: has_amx)
        assert attention.prefers_tiled_attention(cpu, torch.bfloat16) is expected
        assert not attention.prefers_tiled_attention(cpu, torch.float32)
        assert not attention.prefers_tiled_attention(torch.device("cuda"), torch.bfloat16)
