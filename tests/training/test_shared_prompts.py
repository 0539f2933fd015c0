"""Computing a prompt once changes no reward and no gradient, only the number of tokens that are computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import write_tiny_checkpoint
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from training.shared_prompts import PairRows, prompts_shared

PAD = 2


def padded_batch(*sequences: list[int]) -> dict[str, torch.Tensor]:
    """Return a batch, right-padded as the trainer pads: the chosen sequences, then the rejected ones."""
    length = max(map(len, sequences))
    ids = torch.tensor([sequence + [PAD] * (length - len(sequence)) for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (length - len(sequence)) for sequence in sequences])
    return {"input_ids": ids, "attention_mask": mask}


BATCHES = {
    "one-prompt": padded_batch([5, 6, 7, 8, 9], [5, 6, 7, 10, 11, 12]),
    "two-prompts": padded_batch([5, 6, 7, 8], [20, 21, 22], [5, 6, 9], [20, 21, 30, 31, 32, 33]),
    "nothing-in-common": padded_batch([5, 6, 7], [8, 9]),
    "one-is-a-prefix-of-the-other": padded_batch([5, 6, 7, 8], [5, 6]),
    "equal": padded_batch([5, 6, 7], [5, 6, 7]),
    "ends-in-pad": padded_batch([5, 6, 7, PAD], [5, 6, PAD, PAD]),
}


def tiny_model(folder: Path, family: str = "llama") -> PreTrainedModel:
    folder = write_tiny_checkpoint(folder, family, pad_is_eos=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.pad_token_id = PAD
    return model


def gradients(model: PreTrainedModel, rewards: torch.Tensor) -> list[torch.Tensor]:
    chosen, rejected = rewards.chunk(2)
    return list(torch.autograd.grad(torch.nn.functional.softplus(rejected - chosen).sum(), list(model.parameters())))


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_rewards_and_gradients_do_not_change(tmp_path: Path, batch: dict[str, torch.Tensor]) -> None:
    """Rewards and gradients equal the plain ones, whatever the two sequences of a pair have in common."""
    model = tiny_model(tmp_path)
    plain = model(**batch).logits
    plain_gradients = gradients(model, plain)

    with prompts_shared(model):
        shared = model(**batch).logits
        shared_gradients = gradients(model, shared)

    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=1e-5)
    for gradient, expected in zip(shared_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


def test_a_shared_token_is_computed_once() -> None:
    """A row holds the common prompt once, then each completion's own tokens at their positions in the sequence."""
    rows = PairRows.of(**dict(zip(("ids", "mask"), BATCHES["one-prompt"].values(), strict=True)))

    assert rows.ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert rows.visible[0, 5].tolist() == [True, True, True, False, False, True, False, False]


def test_the_model_is_restored_afterwards(tmp_path: Path) -> None:
    """Outside of the context the model accepts any batch, not only pairs."""
    model = tiny_model(tmp_path)
    single = padded_batch([5, 6, 7])
    before = model(**single).logits

    with prompts_shared(model):
        pass

    assert torch.equal(model(**single).logits, before)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "bert"])
def test_other_attention_is_not_changed(tmp_path: Path, family: str) -> None:
    """Models with sliding windows and encoders run unchanged, because their attention is not plainly causal."""
    model = tiny_model(tmp_path, family)
    forward = model.base_model.forward

    with prompts_shared(model):
        assert model.base_model.forward == forward
