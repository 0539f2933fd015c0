"""A head fitted to the frozen base before the base is adapted: linear probing, then fine-tuning (Kumar et al. 2022).

From a head of zeros the first steps of training go into finding a direction at all, and distort the base's features
while they look for it. With few pairs, or little time, it pays to start from the direction that a logistic regression
finds: it needs one forward pass over the pairs and no backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

import torch
from transformers import PreTrainedModel

from training.pairs import TokenizedPair

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Candidates for the strength of the L2 penalty, on features of unit variance; cross-validation takes one."""

NUM_FOLDS = 5
MAX_BATCH_TOKENS = 4096


def fit_head(model: PreTrainedModel, pairs: Sequence[TokenizedPair]) -> torch.Tensor:
    """Return the weights of a linear head, float32 [hidden], that predicts the preferences from the pooled states.

    The Bradley-Terry likelihood of a linear reward is a logistic regression without intercept on the difference of the
    two pooled states. An L2 penalty, chosen by cross-validation over the pairs, keeps it from fitting their noise.
    """
    states = pooled_states(model, pairs).double()
    scale = states.flatten(0, 1).std(0).clamp_min(1e-6)
    differences = (states[:, 0] - states[:, 1]) / scale
    penalty = min(PENALTIES, key=lambda candidate: _cross_validated_loss(differences, candidate))
    return (_logistic_regression(differences, penalty) / scale).float()


def pooled_states(model: PreTrainedModel, pairs: Sequence[TokenizedPair]) -> torch.Tensor:
    """Return the last hidden states at the pooled positions, float32 [pair, 2, hidden]: chosen first.

    The completions of a pair share one row, so their common prompt is computed once: the rejected completion stands
    behind the chosen one, cannot see it, and counts its positions from the end of the prompt.
    """
    pad_id = model.config.get_text_config().pad_token_id
    states = torch.empty(len(pairs), 2, model.config.get_text_config().hidden_size)
    with torch.inference_mode():
        for indices in _batches_of_like_length([_row_length(pair) for pair in pairs]):
            rows = [pairs[index] for index in indices]
            hidden = model.base_model(**_shared_rows(rows, pad_id, model.dtype, model.device), use_cache=False)[0]
            for place, (index, pair) in enumerate(zip(indices, rows, strict=True)):
                states[index] = hidden[place, _pooled_positions(pair, pad_id)].float().cpu()
    return states


def _shared_rows(
    pairs: Sequence[TokenizedPair], pad_id: int, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Token and position ids [row, token] and the additive mask [row, 1, query, key] of one row per pair."""
    length = max(map(_row_length, pairs))
    ids = torch.full((len(pairs), length), pad_id)
    positions = torch.zeros_like(ids)
    visible = torch.ones(length, length, dtype=torch.bool).tril().repeat(len(pairs), 1, 1)
    for row, pair in enumerate(pairs):
        common, border, end = _num_common(pair), len(pair.chosen_ids), _row_length(pair)
        ids[row, :end] = torch.tensor(pair.chosen_ids + pair.rejected_ids[common:])
        positions[row, :end] = torch.tensor([*range(border), *range(common, len(pair.rejected_ids))])
        visible[row, border:, common:border] = False
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    tensors = {"input_ids": ids, "position_ids": positions, "attention_mask": mask[:, None]}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _num_common(pair: TokenizedPair) -> int:
    """Leading tokens that both sequences share, short of the last token of either, so that each keeps its own end."""
    both = zip(pair.chosen_ids[:-1], pair.rejected_ids[:-1], strict=False)
    return sum(1 for _ in takewhile(lambda tokens: tokens[0] == tokens[1], both))


def _row_length(pair: TokenizedPair) -> int:
    return len(pair.chosen_ids) + len(pair.rejected_ids) - _num_common(pair)


def _pooled_positions(pair: TokenizedPair, pad_id: int) -> list[int]:
    """Where the shared row holds the rightmost token of each sequence that is not the pad token."""
    chosen, rejected = (_rightmost(ids, pad_id) for ids in (pair.chosen_ids, pair.rejected_ids))
    common = _num_common(pair)
    return [chosen, rejected if rejected < common else rejected - common + len(pair.chosen_ids)]


def _rightmost(ids: Sequence[int], pad_id: int) -> int:
    return next((place for place in reversed(range(len(ids))) if ids[place] != pad_id), 0)


def _batches_of_like_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[index] * (len(batch) + 1) > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _logistic_regression(differences: torch.Tensor, penalty: float) -> torch.Tensor:
    """Minimise mean log(1 + exp(-x w)) + penalty/2 |w|^2 over w; differences: float64 [pair, hidden]."""
    weights = torch.zeros(differences.shape[1], dtype=differences.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = _loss(differences, weights) + penalty / 2 * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()


def _cross_validated_loss(differences: torch.Tensor, penalty: float) -> float:
    folds = torch.arange(len(differences)) % NUM_FOLDS
    losses = [
        _loss(differences[folds == fold], _logistic_regression(differences[folds != fold], penalty))
        for fold in range(NUM_FOLDS)
    ]
    return float(torch.stack(losses).mean())


def _loss(differences: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.softplus(-differences @ weights).mean()
