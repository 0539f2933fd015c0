"""The loss of a training step in torch: Bradley-Terry, with the centring term where one is asked for.

What TRL's RewardTrainer minimises, as a function of two tensors. Training itself calls TRL; this is the definition that
the tests hold it to, beside the NumPy one.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid


def reward_model_loss(
    r_chosen: torch.Tensor, r_rejected: torch.Tensor, *, center_coefficient: float | None = None
) -> torch.Tensor:
    """Return the mean over the pairs of -log sigma(r_chosen - r_rejected) + c (r_chosen + r_rejected)^2.

    Args:
        r_chosen: raw rewards [pair] of a floating dtype.
        r_rejected: as many.
        center_coefficient: c. The second term (Eisenstein et al. 2023, "Helping or Herding?") pins the zero that the
            first leaves free: it draws the two rewards of a pair to opposite signs. None: no such term.
    """
    loss = -logsigmoid(r_chosen - r_rejected).mean()
    if center_coefficient is None:
        return loss
    return loss + center_coefficient * (r_chosen + r_rejected).square().mean()
