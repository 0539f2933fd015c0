"""The padded path gives architectures that cannot be packed the rewards of plain transformers."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr
from tiny_classifiers import load_tiny, random_rows, rows_with_endings, shuffled_batches
from tiny_models import DECODER_FAMILIES, ENCODER_FAMILIES, FAMILIES

from service.engines.parity import plain_rewards
from service.engines.paths.padded import PaddedForward


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rewards_are_plain_transformers_rewards(tiny_checkpoint, family: str) -> None:
    """In fp32 every family's rewards from one padded batch equal its plain forward, one sequence at a time."""
    classifier = load_tiny(tiny_checkpoint(family))
    rows = rows_with_endings(classifier)

    rewards = PaddedForward(classifier).run(rows).rewards

    assert rewards == pytest.approx(plain_rewards(classifier, rows), abs=1e-5, rel=0)


@pytest.mark.parametrize("family", ENCODER_FAMILIES)
def test_bf16_rewards_are_plain_and_batch_invariant(tiny_checkpoint, family: str) -> None:
    """An encoder's bf16 rewards on a CPU are those of the plain bf16 forward, bit for bit in any batch and order."""
    classifier = load_tiny(tiny_checkpoint(family), torch.bfloat16)
    rows = random_rows(classifier)
    plain = dict(zip(rows, plain_rewards(classifier, rows), strict=True))
    path = PaddedForward(classifier)

    for batch in shuffled_batches(rows, seed=1):
        assert path.run(batch).rewards == [plain[row] for row in batch]


def test_last_pooling_ignores_padding(tiny_checkpoint) -> None:
    """With ``last`` pooling a short sequence's own last token is pooled, not the padding after it."""
    classifier = load_tiny(tiny_checkpoint("llama", pad_is_eos=True), pooling="last")
    rows = rows_with_endings(classifier)

    rewards = PaddedForward(classifier).run(rows).rewards

    assert rewards == pytest.approx(plain_rewards(classifier, rows), abs=1e-5, rel=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ENCODER_FAMILIES + DECODER_FAMILIES[:1])
def test_padded_rewards_are_plain_rewards_on_cuda(tiny_checkpoint, family: str, dtype: torch.dtype) -> None:
    """On CUDA, which pads in half precision too, rewards equal the plain ones or rank like them."""
    classifier = load_tiny(tiny_checkpoint(family), dtype, device=torch.device("cuda"))
    rows = random_rows(classifier, lengths=tuple(range(3, 43)))
    plain = plain_rewards(classifier, rows)

    rewards = PaddedForward(classifier).run(rows).rewards

    if dtype == torch.float32:
        assert rewards == pytest.approx(plain, abs=1e-4, rel=0)
    assert spearmanr(rewards, plain).statistic >= 0.99
