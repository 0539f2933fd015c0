"""A described head gives a state the same bits whatever other states are read with it, also as a GPU computes it."""

from __future__ import annotations

import pytest
import torch
from tiny_layouts import random

from service.checkpoints.described_heads import EnsembleHead, Gate, GatedHead, LayeredHead, LinearLayer
from service.engines.model.described_head import StateHead, apply_layers, head_module
from service.engines.model.scalar_head import batch_invariant_layers

HIDDEN = 100  # no power of two, so that the tree of additions is padded


def gated() -> StateHead:
    tensors = {
        "objectives": random(7, HIDDEN, seed=1),
        "transform": random(7, 7, seed=2),
        "first": random(33, HIDDEN, seed=3),
        "bias": random(33, seed=4),
        "last": random(7, 33, seed=5),
    }
    gate = Gate((LinearLayer("first", "bias", "relu"), LinearLayer("last")), "softmax", 2.0, 1.5, (1, 2))
    return head_module(GatedHead(LinearLayer("objectives"), gate, "transform"), tensors)


def ensemble() -> StateHead:
    tensors = {f"{index}": random(1, HIDDEN, seed=index) for index in range(3)}
    members = tuple(LayeredHead((LinearLayer(name),)) for name in tensors)
    return head_module(EnsembleHead(members), tensors)


def capped() -> StateHead:
    return head_module(LayeredHead((LinearLayer("rows"),), softcap=2.0), {"rows": 3 * random(2, HIDDEN, seed=1)})


@pytest.mark.parametrize("make", [gated, ensemble, capped])
def test_a_state_has_the_same_bits_in_any_batch(make: object) -> None:
    """Alone, in batches of 2 to 17 and in another order, with the sums that a GPU gets; and they are torch's sums."""
    head = make()  # type: ignore[operator]
    states, gates = random(17, HIDDEN, seed=8), random(17, HIDDEN, seed=9)
    gate_of = gates if make is gated else None

    def run(rows: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = head(states[rows], None if gate_of is None else gate_of[rows], batch_invariant_layers)
        return found

    alone = torch.cat([run([row]) for row in range(17)])
    for size in (2, 3, 8, 17):
        assert run(list(range(size))).equal(alone[:size])
    assert run(list(range(16, -1, -1))).equal(alone.flip(0))
    with torch.inference_mode():
        assert head(states, gate_of, apply_layers).allclose(alone, atol=1e-5)


def test_a_gate_weights_the_transformed_objectives() -> None:
    """The first output is the sum of objectives times softmax weights, written out in float64."""
    head = gated()
    states, gates = random(4, HIDDEN, seed=8).double(), random(4, HIDDEN, seed=9).double()

    with torch.inference_mode():
        outputs = head(states, gates)

    inner = torch.relu(gates @ random(33, HIDDEN, seed=3).double().T + random(33, seed=4).double())
    weights = torch.softmax(inner @ random(7, 33, seed=5).double().T / 2, dim=1) * 1.5
    objectives = states @ random(7, HIDDEN, seed=1).double().T
    expected = (weights * (objectives @ random(7, 7, seed=2).double())).sum(dim=1)
    assert outputs[:, 0].double().allclose(expected, atol=1e-5)
    assert outputs[:, 1:].double().allclose(objectives, atol=1e-5)
