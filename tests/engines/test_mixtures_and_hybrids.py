"""Mixtures of experts and hybrids that transformers has a classifier for: their path, and one reward in any batch."""

from __future__ import annotations

import pytest
import torch
from tiny_classifiers import load_tiny, packed_path, probe_and_choose, random_rows, shuffled_batches
from tiny_mixtures import HYBRIDS, MIXTURES, PADDED_MIXTURES

from service.engines.attention.call import PackingUnsupportedError
from service.engines.paths.base import ForwardPath
from service.errors import ParityError

PATHS = {
    **dict.fromkeys(MIXTURES, "packed"),
    **dict.fromkeys(PADDED_MIXTURES, "padded"),
    **dict.fromkeys(HYBRIDS, "padded"),
}


def largest_change(path: ForwardPath, rows: list[tuple[int, ...]]) -> float:
    """How far a reward in a batch of others is from the reward of the same row alone, at most."""
    alone = {row: path.run([row]).rewards[0] for row in rows}
    spread = max(alone.values()) - min(alone.values())
    assert spread > 0.1
    changes = [
        abs(reward - alone[row])
        for seed in range(3)
        for batch in shuffled_batches(rows, seed)
        for row, reward in zip(batch, path.run(batch).rewards, strict=True)
    ]
    return max(changes)


@pytest.mark.parametrize("family", PATHS)
def test_the_path_and_its_rewards_in_fp32(tiny_checkpoint, family: str) -> None:
    """The probe agrees with plain transformers, and a reward moves by rounding alone with its batch and order."""
    classifier = load_tiny(tiny_checkpoint(family))

    path, found = probe_and_choose(classifier, max_tokens=130)

    assert path.name == PATHS[family]
    assert found.agrees
    assert found.conclusive
    assert largest_change(path, sorted(set(random_rows(classifier)))) < 5e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", HYBRIDS)
def test_a_hybrid_is_never_packed(tiny_checkpoint, family: str, dtype: torch.dtype) -> None:
    """A recurrence would carry one sequence's state into the next, which noise can hide from the probe in bfloat16."""
    with pytest.raises(PackingUnsupportedError, match="mixes tokens outside of its attention"):
        packed_path(load_tiny(tiny_checkpoint(family), dtype))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_in_bfloat16_give_the_same_bits_in_any_batch(tiny_checkpoint, family: str) -> None:
    """However many tokens an expert gets from the batch, a packed reward is the same bit for bit."""
    wide = {"hidden_size": 512, "moe_intermediate_size": 256, "num_attention_heads": 8, "initializer_range": 0.05}
    classifier = load_tiny(tiny_checkpoint(family, **wide, intermediate_size=1024, head_dim=64), torch.bfloat16)
    path = packed_path(classifier)

    assert largest_change(path, sorted(set(random_rows(classifier)))) == 0.0


def test_a_model_whose_batches_differ_from_single_texts_is_refused(tiny_checkpoint) -> None:
    """Doge's experts, as transformers computes them, depend on the batch, so that no path agrees and none serves."""
    with pytest.raises(ParityError, match="DogeForSequenceClassification cannot be served"):
        probe_and_choose(load_tiny(tiny_checkpoint("doge")), max_tokens=130)
