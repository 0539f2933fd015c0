"""A model on the kernels gives the rewards of plain transformers, in any company the same bits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_classifiers import (
    load_tiny,
    probe_and_choose,
    random_rows,
    rows_that_share,
    rows_with_endings,
    shuffled_batches,
)
from tiny_models import DECODER_FAMILIES

from service.engines import torch as torch_engine
from service.engines.kernels.bindings import Kernels
from service.engines.kernels.blocks import FusedDecoderBlock
from service.engines.kernels.build import KernelsUnavailable
from service.engines.kernels.fused_modules import GatedLayer, KernelForward, KernelNorm, OpenedGate, RotatingAttention
from service.engines.kernels.patching import attach_kernels, detach_kernels, drop_plain_weights, multiplies_on_kernels
from service.engines.linear.int8 import quantize_int8
from service.engines.model.classifier import Classifier
from service.engines.parity import plain_rewards
from service.engines.paths.packed import PackedForward
from service.engines.torch import load_torch_engine
from service.errors import SettingsError
from service.records import TokenSequence
from service.settings import BatchingSettings, ModelSettings

Checkpoint = Callable[..., Path]

JOINT = {"llama", "qwen2", "qwen3", "mistral", "phi3"}
"""Families whose blocks add attention and feed-forward layer, each behind one norm."""


def load_for(kernels: Kernels, folder: Path) -> Classifier:
    """Return a classifier in bfloat16 whose linear layers multiply as the kernels do."""
    classifier = load_tiny(folder, torch.bfloat16)
    if kernels.quantizes:
        quantize_int8(classifier.body)
    return classifier


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_rewards_agree_with_plain_transformers(tiny_checkpoint: Checkpoint, kernels: Kernels, family: str) -> None:
    """Every family passes the parity probe on the kernels of each kind, shared beginnings included."""
    path, parity = probe_and_choose(load_for(kernels, tiny_checkpoint(family)), "packed", 512, kernels=kernels)

    assert path.kernels is kernels
    assert path.min_shared_prefix_tokens is not None
    assert parity.agrees


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_a_model_runs_on_kernels_where_it_can(tiny_checkpoint: Checkpoint, kernels: Kernels, family: str) -> None:
    """Products, norms and rotations of every family run on kernels, whole blocks where they fit."""
    body = load_for(kernels, tiny_checkpoint(family)).body
    attach_kernels(body, kernels)

    kinds = {type(vars(module).get("forward")) for module in body.modules()}

    assert multiplies_on_kernels(body)
    assert {KernelNorm, RotatingAttention} <= kinds
    assert (FusedDecoderBlock in kinds) == (family in JOINT)
    assert (GatedLayer in kinds) == (family not in JOINT)


def test_a_gate_whose_products_do_not_fit_is_opened_all_the_same(tiny_checkpoint: Checkpoint, kernels: Kernels) -> None:
    """Where layers are not wide enough to be packed, products stay torch's and what stands between them is ours."""
    classifier = load_for(kernels, tiny_checkpoint("llama", intermediate_size=72))

    path, parity = probe_and_choose(classifier, "packed", 512, kernels=kernels)

    assert path.kernels is kernels
    assert parity.agrees
    assert all(isinstance(block.mlp.forward, OpenedGate) for block in classifier.body.layers)
    assert not multiplies_on_kernels(classifier.body)


@pytest.mark.parametrize("family", DECODER_FAMILIES)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_batch_does_not_change_a_bit_of_a_reward(
    tiny_checkpoint: Checkpoint, kernels: Kernels, family: str, num_threads: int
) -> None:
    """A text's reward is the same bit for bit alone, in any batch, and with its beginning shared."""
    torch.set_num_threads(num_threads)
    classifier = load_for(kernels, tiny_checkpoint(family, hidden_size=192, intermediate_size=576))
    path = PackedForward(classifier, kernels=kernels)
    rows = [*random_rows(classifier, lengths=(5, 1, 133, 300)), *rows_that_share(classifier)]
    alone = {row: path.run([row]).rewards[0] for row in rows}

    for batch in shuffled_batches(rows, seed=0) + shuffled_batches(rows, seed=1):
        assert path.run(batch).rewards == [alone[row] for row in batch]


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_a_kept_prompt_does_not_change_a_bit_of_a_reward(
    tiny_checkpoint: Checkpoint, kernels: Kernels, family: str
) -> None:
    """On kernels too a reward has the same bits whether its prompt was computed now or in an earlier pass."""
    classifier = load_for(kernels, tiny_checkpoint(family, hidden_size=192, intermediate_size=576))
    path = PackedForward(classifier, kernels=kernels, cache_bytes=2**24)
    rows = [*random_rows(classifier, lengths=(90, 133, 300)), *rows_that_share(classifier)]
    alone = {row: path.run([row]).rewards[0] for row in rows}
    num_cached_tokens = 0

    for batch in [batch for seed in range(3) for batch in shuffled_batches(rows, seed=seed)]:
        output = path.run(batch, prompts=[len(row) * 2 // 3 for row in batch])
        assert output.rewards == [alone[row] for row in batch]
        num_cached_tokens += output.cached_tokens

    assert num_cached_tokens > 0


def test_a_reward_that_is_no_number_stays_alone(tiny_checkpoint: Checkpoint, kernels: Kernels) -> None:
    """A poisoned token spoils the rewards of its own rows, and no bit of the others', shared beginnings or not."""
    classifier = load_for(kernels, tiny_checkpoint("llama"))
    path = PackedForward(classifier, kernels=kernels)
    rows = rows_that_share(classifier)
    poison = rows[0][-1] if all(rows[0][-1] not in row[:-1] for row in rows) else classifier.config.vocab_size - 1
    healthy = [row for row in rows if poison not in row]
    wanted = path.run(healthy).rewards
    classifier.model.get_input_embeddings().weight.data[poison] = float("nan")
    spoilt = [(*row, poison) for row in healthy[:3]]

    found = path.run([*healthy, *spoilt]).rewards

    assert found[: len(healthy)] == wanted
    assert all(reward != reward for reward in found[len(healthy) :])


def test_plain_forwards_come_back(tiny_checkpoint: Checkpoint, kernels: Kernels) -> None:
    """A classifier that ran on kernels runs as transformers wrote it again, bit for bit, as the probe needs it."""
    classifier = load_for(kernels, tiny_checkpoint("qwen3"))
    rows = rows_with_endings(classifier)
    before = plain_rewards(classifier, rows)
    PackedForward(classifier, kernels=kernels)

    assert plain_rewards(classifier, rows) == before
    assert not any(isinstance(vars(module).get("forward"), KernelForward) for module in classifier.body.modules())


def test_packed_weights_are_not_kept_twice(tiny_checkpoint: Checkpoint, kernels: Kernels) -> None:
    """Once the path is chosen the plain weights are freed; the rewards stay, and going back is refused."""
    classifier = load_for(kernels, tiny_checkpoint("gemma2"))
    path = PackedForward(classifier, kernels=kernels)
    rows = random_rows(classifier)
    before = path.run(rows).rewards

    drop_plain_weights(classifier.body)

    layers = [module for module in classifier.body.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(layer.weight.numel() for layer in layers) == 0
    assert path.run(rows).rewards == before
    with pytest.raises(RuntimeError, match="plain weights were dropped"):
        detach_kernels(classifier.body)


class TwistedNorm(torch.nn.Module):
    """Has the name and the parameters of a norm, and computes something else."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon = norm.variance_epsilon

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.weight * states / (states.abs().mean(-1, keepdim=True) + self.variance_epsilon)


TwistedNorm.__name__ = "TwistedRMSNorm"


def test_what_computes_something_else_is_left_alone(tiny_checkpoint: Checkpoint, kernels: Kernels) -> None:
    """A module is judged by its numbers, not by its name: a block with a strange norm keeps its own forward."""
    body = load_for(kernels, tiny_checkpoint("llama")).body
    body.layers[1].input_layernorm = TwistedNorm(body.layers[1].input_layernorm)

    attach_kernels(body, kernels)

    assert "forward" not in vars(body.layers[1].input_layernorm)
    assert "forward" not in vars(body.layers[1])
    assert isinstance(body.layers[1].post_attention_layernorm.forward, KernelNorm)


def test_the_engine_says_what_it_runs_on(tiny_checkpoint: Checkpoint, machine_kernels: Kernels) -> None:
    """In bfloat16 on a CPU an engine takes the kernels by itself, and its description names them."""
    settings = ModelSettings(device="cpu", dtype="bfloat16", num_threads=1)
    load = {"pad_token_id": 0, "max_input_tokens": 200}

    engine = load_torch_engine(tiny_checkpoint("llama"), settings, BatchingSettings(), **load)
    without = load_torch_engine(
        tiny_checkpoint("llama"), settings.model_copy(update={"kernels": "off"}), BatchingSettings(), **load
    )

    assert engine.info.kernels == machine_kernels.name
    assert without.info.kernels is None
    sequences = [TokenSequence((7, 8, 9, 10)), TokenSequence((11, 12))]
    assert engine.forward(sequences).rewards == pytest.approx(without.forward(sequences).rewards, abs=0.1)


def test_going_without_is_logged(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where kernels would help and there are none, a line says why, and ``on`` does not start."""

    def missing() -> Kernels:
        raise KernelsUnavailable("there is no C++ compiler (g++) to make them with: install g++")

    monkeypatch.setattr(torch_engine.bindings, "load_kernels", missing)
    settings = ModelSettings(device="cpu", dtype="bfloat16", num_threads=1)
    load = {"pad_token_id": 0, "max_input_tokens": 200}

    with caplog.at_level(logging.WARNING):
        engine = load_torch_engine(tiny_checkpoint("llama"), settings, BatchingSettings(), **load)

    assert engine.info.kernels is None
    assert "install g++" in caplog.text
    with pytest.raises(SettingsError, match=r"model\.kernels is on.*install g"):
        load_torch_engine(
            tiny_checkpoint("llama"), settings.model_copy(update={"kernels": "on"}), BatchingSettings(), **load
        )


@pytest.mark.parametrize("other", [{"compile": True}, {"forward": "padded"}], ids=str)
def test_wishes_that_exclude_each_other_are_refused(tiny_checkpoint: Checkpoint, other: dict[str, object]) -> None:
    """Kernels run neither in compiled blocks nor in padded batches."""
    settings = ModelSettings.model_validate({"device": "cpu", "dtype": "bfloat16", "kernels": "on", **other})

    with pytest.raises(SettingsError, match=r"model\.kernels is on"):
        load_torch_engine(tiny_checkpoint("llama"), settings, BatchingSettings(), pad_token_id=0, max_input_tokens=200)
