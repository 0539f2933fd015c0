"""The loss in NumPy, in torch and in TRL's trainer is the same, also where sigmas underflow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from preference_rows import polite_pairs
from tiny_models import write_tiny_causal_lm
from trl import RewardConfig, RewardTrainer

from training.bradley_terry import bradley_terry_gradient, bradley_terry_loss, preference_probability
from training.tensor_loss import reward_model_loss

CHOSEN, REJECTED = [2.1, 0.8, -0.3, 1.5], [0.9, -1.2, -0.5, -0.2]
EXTREME_GAPS = [-1000.0, -100.0, -40.0, -1e-12, 0.0, 1e-12, 40.0, 100.0, 1000.0]

rewards_of_pairs = st_numpy.arrays(
    np.float64, st.tuples(st.integers(1, 20), st.just(2)), elements=st.floats(-1000, 1000)
)


def test_the_worked_example() -> None:
    """Gaps of 1.2, 2.0, 0.2 and 1.7 have the losses log(1 + e^-gap) of a hand calculation, to four decimals."""
    loss = bradley_terry_loss(CHOSEN, REJECTED)

    # The example is often printed with 0.1773 and a mean of 0.2914, which belong to a last gap of 1.64.
    assert loss.per_pair == pytest.approx([0.2633, 0.1269, 0.5981, 0.1678], abs=5e-5)
    assert loss.mean == pytest.approx(0.2890, abs=5e-5)
    assert bradley_terry_loss([1.64], [0.0]).mean == pytest.approx(0.1773, abs=5e-5)


def test_a_gap_of_zero() -> None:
    """Equal rewards have probability one half, loss log 2 and gradient one half."""
    assert preference_probability([3.0], [3.0]).item() == 0.5
    assert bradley_terry_loss([3.0], [3.0]).mean == pytest.approx(np.log(2))
    assert bradley_terry_gradient([3.0], [3.0]).item() == -0.5


def test_both_tails_are_exact() -> None:
    """At -1,000 the loss is 1,000 and the gradient 1; at +40 both are e^-40, where log(sigma + eps) is wrong."""
    loss = bradley_terry_loss([-1000.0, 40.0], [0.0, 0.0])

    assert loss.per_pair == pytest.approx([1000.0, np.exp(-40)], rel=1e-12)
    assert bradley_terry_gradient([-1000.0, 40.0], [0.0, 0.0]) == pytest.approx([-1.0, -np.exp(-40)], rel=1e-12)
    assert -np.log(1 / (1 + np.exp(-40)) + 1e-8) < 0


def test_the_mean_of_no_pairs_is_nan() -> None:
    """The loss of no pairs is NaN, not 0."""
    assert np.isnan(bradley_terry_loss([], []).mean)


@given(rewards_of_pairs, st.floats(-100, 100))
def test_only_the_gap_counts(pairs: np.ndarray, shift: float) -> None:
    """A constant added to all rewards changes nothing; the probabilities of a pair's two orders sum to one."""
    chosen, rejected = pairs.T

    shifted = bradley_terry_loss(chosen + shift, rejected + shift)

    assert shifted.per_pair == pytest.approx(bradley_terry_loss(chosen, rejected).per_pair, abs=1e-9)
    both_orders = preference_probability(chosen, rejected) + preference_probability(rejected, chosen)
    assert both_orders == pytest.approx(np.ones(len(pairs)))


@given(rewards_of_pairs)
def test_torch_computes_the_same_loss_and_gradient(pairs: np.ndarray) -> None:
    """F.logsigmoid and its backward pass agree with NumPy to 1e-6 on any rewards up to 1,000."""
    chosen, rejected = (torch.tensor(column, requires_grad=True) for column in pairs.T)

    loss = reward_model_loss(chosen, rejected)
    loss.backward()

    assert loss.item() == pytest.approx(bradley_terry_loss(*pairs.T).mean, rel=1e-6, abs=1e-6)
    assert chosen.grad is not None
    assert rejected.grad is not None
    expected = bradley_terry_gradient(*pairs.T)
    assert (chosen.grad * len(pairs)).numpy() == pytest.approx(expected, abs=1e-6)
    assert (rejected.grad * len(pairs)).numpy() == pytest.approx(-expected, abs=1e-6)


class GivenRewards(torch.nn.Module):
    """A model that returns given logits: those of the chosen, then those of the rejected sequences."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[:, None])


@pytest.fixture(scope="module")
def trl_loss(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's ``compute_loss`` of a RewardTrainer, as a function of rewards [pair] and the centring coefficient."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("trl")
    with pytest.warns(FutureWarning):
        trainer = RewardTrainer(
            model=str(write_tiny_causal_lm(folder / "base")),
            args=RewardConfig(output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none"),
            train_dataset=Dataset.from_list(polite_rows()),
        )

    def loss(chosen: Any, rejected: Any, center_coefficient: float | None = None) -> float:
        trainer.args.center_rewards_coefficient = center_coefficient
        logits = torch.tensor(np.concatenate([chosen, rejected]))
        inputs = {"input_ids": torch.zeros(len(logits), 1), "attention_mask": torch.ones(len(logits), 1)}
        return float(trainer.compute_loss(GivenRewards(logits), inputs))

    return loss


def polite_rows() -> list[dict[str, Any]]:
    return [
        {
            "prompt": row["prompt"],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in polite_pairs(2)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_trainer_minimises_the_same_loss_on_random_rewards(trl_loss: Any, seed: int) -> None:
    """TRL, torch and NumPy agree to 1e-6."""
    chosen, rejected = np.random.default_rng(seed).normal(scale=3.0, size=(2, 64))

    expected = bradley_terry_loss(chosen, rejected).mean

    assert trl_loss(chosen, rejected) == pytest.approx(expected, abs=1e-6)
    assert reward_model_loss(torch.tensor(chosen), torch.tensor(rejected)).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("gap", EXTREME_GAPS)
def test_the_trainer_minimises_the_same_loss_at_extreme_gaps(trl_loss: Any, gap: float) -> None:
    """The three agree to 1e-6 at gaps where a sigmoid is 0 or 1 to the last bit."""
    chosen, rejected = np.array([gap / 2]), np.array([-gap / 2])

    expected = bradley_terry_loss(chosen, rejected).mean

    assert trl_loss(chosen, rejected) == pytest.approx(expected, abs=1e-6)
    assert reward_model_loss(torch.tensor(chosen), torch.tensor(rejected)).item() == pytest.approx(expected, abs=1e-6)


def test_the_centring_term_is_the_trainers(trl_loss: Any) -> None:
    """With centring torch and TRL agree too, and adding a constant to all rewards changes the loss."""
    chosen, rejected = np.array(CHOSEN), np.array(REJECTED)

    expected = reward_model_loss(torch.tensor(chosen), torch.tensor(rejected), center_coefficient=0.01).item()

    assert trl_loss(chosen, rejected, 0.01) == pytest.approx(expected, abs=1e-6)
    assert trl_loss(chosen + 5, rejected + 5, 0.01) > expected + 0.5
