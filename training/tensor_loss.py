"""The loss of a training step in torch: Bradley-Terry, with an optional centring term.

Training itself calls TRL; this function defines what TRL's RewardTrainer minimises, and tests compare TRL and the NumPy
definition with it.
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
        r_rejected: raw rewards [pair].
        center_coefficient: c. The second term (Eisenstein et al. 2023, "Helping or Herding?") fixes the zero of the
            rewards, which the first term does not determine: it makes the two rewards of a pair sum to zero. None: no
            such term.
    """
    loss = -logsigmoid(r_chosen - r_rejected).mean()
    if center_coefficient is None:
        return loss
    return loss + center_coefficient * (r_chosen + r_rejected).square().mean()
