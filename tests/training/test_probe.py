"""The head that training may start from: a logistic regression on exactly the states that the service pools."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from preference_rows import polite_pairs, write_pairs
from tiny_models import write_tiny_causal_lm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training import probe
from training.evaluation import evaluate
from training.pairs import PreferencePair, TokenizedPair, read_pairs, tokenize_pairs
from training.probe import fit_head, pooled_states
from training.recipe import Recipe
from training.reward_model import load_base, set_head


@pytest.fixture
def base(tmp_path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_base(write_tiny_causal_lm(tmp_path / "base"), Recipe(dtype="fp32"))
    return model.eval(), tokenizer


def state_alone(model: PreTrainedModel, ids: tuple[int, ...]) -> torch.Tensor:
    """The state that transformers pools: at the rightmost token that is not the pad token."""
    pad_id = model.config.pad_token_id
    position = max((place for place, token in enumerate(ids) if token != pad_id), default=0)
    with torch.inference_mode():
        return model.base_model(input_ids=torch.tensor([ids]))[0][0, position]


def test_sharing_the_prompt_changes_no_state(
    base: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each state is that of its sequence alone, also where one completion begins, equals or extends the other."""
    monkeypatch.setattr(probe, "MAX_BATCH_TOKENS", 256)
    model, tokenizer = base
    texts = [("Because.", "No."), ("Yes, a long and winding answer.", "Yes, a"), ("Same.", "Same."), ("", "Something.")]
    pairs = tokenize_pairs([PreferencePair("Why does it rain?", *pair) for pair in texts], tokenizer)
    pad_id = model.config.pad_token_id
    pairs.append(TokenizedPair(pairs[0].pair, (5, 6, 7, pad_id), (5, 6, pad_id, pad_id)))

    states = pooled_states(model, pairs)

    for pair, (chosen, rejected) in zip(pairs, states, strict=True):
        torch.testing.assert_close(chosen, state_alone(model, pair.chosen_ids), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rejected, state_alone(model, pair.rejected_ids), atol=1e-4, rtol=1e-4)


def test_a_fitted_head_ranks_unseen_pairs(
    base: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    """Without any backward pass through the base, the head alone learns a rule that its states show."""
    model, tokenizer = base
    known = tokenize_pairs(read_pairs([write_pairs(tmp_path / "known.jsonl", polite_pairs(200))]), tokenizer)
    unseen = tokenize_pairs(read_pairs([write_pairs(tmp_path / "unseen.jsonl", polite_pairs(100, seed=1))]), tokenizer)

    set_head(model, fit_head(model, known))

    assert evaluate(model, unseen).accuracy.value > 0.6


def test_noise_is_not_fitted() -> None:
    """Where nothing can be learned, cross-validation takes a penalty under which the margins stay small."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 64, generator=generator, dtype=torch.float64)

    losses = {penalty: probe._cross_validated_loss(noise, penalty) for penalty in probe.PENALTIES}

    assert min(losses, key=losses.__getitem__) == max(probe.PENALTIES)


def test_the_regression_finds_the_minimum() -> None:
    """In one dimension, with differences all 1, the minimum solves sigma(-w) = penalty * w."""
    differences = torch.ones(10, 1, dtype=torch.float64)

    (weight,) = probe._logistic_regression(differences, penalty=0.1)

    assert torch.sigmoid(-weight).item() == pytest.approx(0.1 * weight.item(), abs=1e-4)
