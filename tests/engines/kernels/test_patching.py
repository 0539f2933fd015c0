"""A model on the CPU kernels gives the rewards of plain transformers, with the same bits in any batch composition."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_classifiers import (
    load_tiny,
    packed_path,
    probe_and_choose,
    random_rows,
    rows_that_share,
    rows_with_endings,
    shuffled_batches,
)
from tiny_models import DECODER_FAMILIES
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from service.engines.attention.layout import PackedLayout
from service.engines.base import StatePooling, StateTap
from service.engines.devices.device import has_avx2
from service.engines.kernels import choice
from service.engines.kernels.bindings import Kernels
from service.engines.kernels.blocks import FusedDecoderBlock
from service.engines.kernels.build import KernelsUnavailable
from service.engines.kernels.fused_modules import (
    FusedActAndMul,
    FusedGatedMlp,
    FusedRmsNorm,
    KernelForward,
    RopeAttention,
)
from service.engines.kernels.patching import attach_kernels, detach_kernels, drop_plain_weights, packs_all_linear_layers
from service.engines.linear.int8 import quantize_int8
from service.engines.model.classifier import Classifier
from service.engines.model.taps import StateQuery
from service.engines.parity import plain_rewards
from service.engines.torch import load_torch_engine
from service.errors import SettingsError
from service.records import TokenSequence
from service.settings import BatchingSettings, ModelSettings

Checkpoint = Callable[..., Path]

FUSED_BLOCK_FAMILIES = {"llama", "qwen2", "qwen3", "mistral", "phi3"}
"""Families whose blocks add attention and feed-forward layer to the residual stream, each behind one norm."""


def load_for(kernels: Kernels, folder: Path) -> Classifier:
    """Return a classifier in the dtype of the kernels, with linear layers in their arithmetic."""
    classifier = load_tiny(folder, kernels.dtype)
    if kernels.is_int8:
        quantize_int8(classifier.body)
    return classifier


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_rewards_agree_with_plain_transformers(tiny_checkpoint: Checkpoint, kernels: Kernels, family: str) -> None:
    """Every family passes the parity probe on the kernels of each target, shared prefixes included."""
    path, parity = probe_and_choose(load_for(kernels, tiny_checkpoint(family)), "packed", 512, kernels=kernels)

    assert path.kernels is kernels
    assert path.min_shared_prefix_tokens is not None
    assert parity.agrees


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_a_model_runs_on_kernels_where_it_can(tiny_checkpoint: Checkpoint, kernels: Kernels, family: str) -> None:
    """Products, norms and rotary embeddings of every family run on kernels, and all blocks whole where they fit."""
    body = load_for(kernels, tiny_checkpoint(family, hidden_size=192, intermediate_size=576)).body
    attach_kernels(body, kernels)

    kinds = Counter(type(vars(module).get("forward")) for module in body.modules())

    assert packs_all_linear_layers(body)
    assert kinds[FusedRmsNorm] > 0
    assert kinds[RopeAttention] == len(body.layers)
    assert kinds[FusedDecoderBlock] == (len(body.layers) if family in FUSED_BLOCK_FAMILIES else 0)
    assert kinds[FusedGatedMlp] == (0 if family in FUSED_BLOCK_FAMILIES else len(body.layers))


def test_act_and_mul_is_fused_where_products_are_not(tiny_checkpoint: Checkpoint, kernels: Kernels) -> None:
    """Where the width of a layer does not allow packing, products are torch's and the activation is a kernel's."""
    classifier = load_for(kernels, tiny_checkpoint("llama", intermediate_size=72))

    path, parity = probe_and_choose(classifier, "packed", 512, kernels=kernels)

    assert path.kernels is kernels
    assert parity.agrees
    assert all(isinstance(block.mlp.forward, FusedActAndMul) for block in classifier.body.layers)
    assert not packs_all_linear_layers(classifier.body)


@pytest.mark.parametrize("family", DECODER_FAMILIES)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_batch_composition_changes_no_bit_of_a_reward(
    tiny_checkpoint: Checkpoint, kernels: Kernels, family: str, num_threads: int
) -> None:
    """A sequence's reward is bit-identical alone, in any batch, and with a shared prefix."""
    torch.set_num_threads(num_threads)
    classifier = load_for(kernels, tiny_checkpoint(family, hidden_size=192, intermediate_size=576))
    path = packed_path(classifier, kernels=kernels)
    rows = [*random_rows(classifier, lengths=(5, 1, 133, 300)), *rows_that_share(classifier)]
    alone = {row: path.run([row]).rewards[0] for row in rows}

    for batch in shuffled_batches(rows, seed=0) + shuffled_batches(rows, seed=1):
        assert path.run(batch).rewards == [alone[row] for row in batch]


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_a_cached_prompt_changes_no_bit_of_a_reward(tiny_checkpoint: Checkpoint, kernels: Kernels, family: str) -> None:
    """On kernels too a reward has the same bits whether its prompt is computed or taken from the prefix cache."""
    classifier = load_for(kernels, tiny_checkpoint(family, hidden_size=192, intermediate_size=576))
    path = packed_path(classifier, kernels=kernels, cache_bytes=2**24)
    rows = [*random_rows(classifier, lengths=(90, 133, 300)), *rows_that_share(classifier)]
    alone = {row: path.run([row]).rewards[0] for row in rows}
    num_cached_tokens = 0

    for batch in [batch for seed in range(3) for batch in shuffled_batches(rows, seed=seed)]:
        output = path.run(batch, prompts=[len(row) * 2 // 3 for row in batch])
        assert output.rewards == [alone[row] for row in batch]
        num_cached_tokens += output.cached_tokens

    assert num_cached_tokens > 0


@pytest.mark.parametrize("family", sorted(FUSED_BLOCK_FAMILIES))
def test_the_last_block_computes_only_what_is_read(
    tiny_checkpoint: Checkpoint, kernels: Kernels, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Attention and feed-forward layer of the last block run for the tokens that the head reads, with the same bits."""
    classifier = load_for(kernels, tiny_checkpoint(family, hidden_size=192, intermediate_size=576))
    path = packed_path(classifier, kernels=kernels)
    rows = [*random_rows(classifier, lengths=(133, 300)), *rows_that_share(classifier)]
    steps = [(len(row) // 2,) for row in rows]
    num_rows: list[int] = []
    attn_out_mlp = kernels.attn_out_mlp

    def counting(states: torch.Tensor, *others: Any) -> None:
        num_rows.append(states.shape[1])
        attn_out_mlp(states, *others)

    monkeypatch.setattr(kernels, "attn_out_mlp", counting)
    found = [path.run(rows), path.run(rows, steps=steps)]
    num_blocks = classifier.config.num_hidden_layers
    num_read = [num_rows[num_blocks - 1], num_rows[2 * num_blocks - 1]]
    num_rows.clear()
    monkeypatch.setattr(PackedLayout, "reading", lambda layout, _tokens: layout)
    expected = [path.run(rows), path.run(rows, steps=steps)]

    assert num_read[0] == len(set(rows)) < num_read[1] <= 2 * len(rows)
    assert min(num_rows) == max(num_rows) > 300
    assert found[0].rewards == expected[0].rewards
    assert found[1].outputs is not None
    assert expected[1].outputs is not None
    assert np.array_equal(np.concatenate(found[1].outputs), np.concatenate(expected[1].outputs))


@pytest.mark.parametrize("first", [0, 30])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_states_after_the_last_block_are_complete(
    tiny_checkpoint: Checkpoint, kernels: Kernels, pooling: StatePooling, first: int
) -> None:
    """A mean after the last block is over tokens that it has computed, and reading it changes no bit of a reward."""
    classifier = load_for(kernels, tiny_checkpoint("llama"))
    plain = [classifier.body(torch.tensor([row])).last_hidden_state[0] for row in random_rows(classifier, (40, 90))]
    path = packed_path(classifier, kernels=kernels)
    rows = random_rows(classifier, lengths=(40, 90))
    tap = StateTap(classifier.config.num_hidden_layers, pooling)

    found = path.run(rows, StateQuery((tap,), ((0, first), (1, 2 * first))))

    means = [states[begin:].float().mean(0) for states, begin in zip(plain, (first, 2 * first), strict=True)]
    expected = torch.stack(means if pooling == "mean" else [states[-1].float() for states in plain])
    assert found.states is not None
    tolerance = (0.1 if kernels.is_int8 else 0.05) * float(expected.abs().max())
    torch.testing.assert_close(torch.from_numpy(found.states[:, 0]), expected, atol=tolerance, rtol=0)
    assert found.rewards == path.run(rows).rewards


def test_a_nan_reward_does_not_spread(tiny_checkpoint: Checkpoint, kernels: Kernels) -> None:
    """A NaN embedding makes the rewards of its sequences NaN and changes no bit of others, shared prefixes or not."""
    classifier = load_for(kernels, tiny_checkpoint("llama"))
    path = packed_path(classifier, kernels=kernels)
    rows = rows_that_share(classifier)
    nan_token = rows[0][-1] if all(rows[0][-1] not in row[:-1] for row in rows) else classifier.config.vocab_size - 1
    healthy = [row for row in rows if nan_token not in row]
    expected = path.run(healthy).rewards
    classifier.model.get_input_embeddings().weight.data[nan_token] = float("nan")
    corrupted = [(*row, nan_token) for row in healthy[:3]]

    found = path.run([*healthy, *corrupted]).rewards

    assert found[: len(healthy)] == expected
    assert all(reward != reward for reward in found[len(healthy) :])


def test_a_projection_outside_of_its_block_is_an_error(tiny_checkpoint: Checkpoint, kernels: Kernels) -> None:
    """A projection of a fused block returns the block's product once, and never an old one."""
    body = load_for(kernels, tiny_checkpoint("llama")).body
    attach_kernels(body, kernels)
    layer = body.layers[0].self_attn.q_proj
    layer.forward.product = torch.zeros(1)

    layer(torch.zeros(1, 1, layer.in_features))

    with pytest.raises(RuntimeError, match="outside of its fused block"):
        layer(torch.zeros(1, 1, layer.in_features))


def test_detaching_restores_the_own_forwards(tiny_checkpoint: Checkpoint, kernels: Kernels) -> None:
    """A classifier that ran on kernels runs plain transformers again, bit for bit, as the parity probe requires."""
    classifier = load_for(kernels, tiny_checkpoint("qwen3"))
    rows = rows_with_endings(classifier)
    before = plain_rewards(classifier, rows)
    packed_path(classifier, kernels=kernels)

    assert plain_rewards(classifier, rows) == before
    assert not any(isinstance(vars(module).get("forward"), KernelForward) for module in classifier.body.modules())


def test_unpacked_weights_are_dropped(tiny_checkpoint: Checkpoint, kernels: Kernels) -> None:
    """Once the path is chosen the unpacked weights are freed: the rewards do not change, and detaching is refused."""
    classifier = load_for(kernels, tiny_checkpoint("gemma2"))
    path = packed_path(classifier, kernels=kernels)
    rows = random_rows(classifier)
    before = path.run(rows).rewards

    drop_plain_weights(classifier.body)

    layers = [module for module in classifier.body.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(layer.weight.numel() for layer in layers) == 0
    assert path.run(rows).rewards == before
    with pytest.raises(RuntimeError, match="unpacked weights were dropped"):
        detach_kernels(classifier.body)


class MeanMagnitudeNorm(torch.nn.Module):
    """Has the name and the parameters of a norm, but computes the mean magnitude."""

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight: torch.nn.Parameter = norm.weight
        self.variance_epsilon: float = norm.variance_epsilon

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.weight * states / (states.abs().mean(-1, keepdim=True) + self.variance_epsilon)


MeanMagnitudeNorm.__name__ = "MeanMagnitudeRMSNorm"


def test_a_module_that_computes_something_else_is_not_replaced(tiny_checkpoint: Checkpoint, kernels: Kernels) -> None:
    """A module is matched by its results, not by its name: a block with another norm keeps its own forward."""
    body = load_for(kernels, tiny_checkpoint("llama")).body
    body.layers[1].input_layernorm = MeanMagnitudeNorm(body.layers[1].input_layernorm)

    attach_kernels(body, kernels)

    assert "forward" not in vars(body.layers[1].input_layernorm)
    assert "forward" not in vars(body.layers[1])
    assert isinstance(body.layers[1].post_attention_layernorm.forward, FusedRmsNorm)


def test_the_engine_reports_its_kernels(tiny_checkpoint: Checkpoint, machine_kernels: Kernels) -> None:
    """In bfloat16 on a CPU an engine uses the kernels by default, and its description names them."""
    settings = ModelSettings(device="cpu", dtype="bfloat16", num_threads=1)
    load = partial(load_torch_engine, pad_token_id=0, max_input_tokens=200)

    engine = load(tiny_checkpoint("llama"), settings, BatchingSettings())
    without = load(tiny_checkpoint("llama"), settings.model_copy(update={"kernels": "off"}), BatchingSettings())

    assert engine.info.kernels == machine_kernels.name
    assert without.info.kernels is None
    sequences = [TokenSequence((7, 8, 9, 10)), TokenSequence((11, 12))]
    assert engine.forward(sequences).rewards == pytest.approx(without.forward(sequences).rewards, abs=0.1)


def test_a_cpu_with_avx2_alone_serves_float32_on_kernels(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``auto`` is float32 there, rewards are those of plain transformers within 1e-4, and the log says why."""
    if not has_avx2():
        pytest.skip("this CPU has no AVX2")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(choice, "load_kernels", choice.load_kernels.__wrapped__)  # without the cache
    if choice.kernels_for("auto", torch.device("cpu"), torch.float32)[0] is None:
        pytest.skip("the CPU kernels are not available")
    folder, settings = tiny_checkpoint("qwen2"), ModelSettings(device="cpu", num_threads=1)
    rows = random_rows(load_tiny(folder))

    with caplog.at_level(logging.INFO):
        engine = load_torch_engine(folder, settings, BatchingSettings(), pad_token_id=0, max_input_tokens=200)

    assert (engine.info.kernels, engine.info.dtype) == ("avx2", "float32")
    assert "float32 on cpu (model.dtype is auto, and this CPU does not multiply bfloat16 natively)" in caplog.text
    assert "on the compiled CPU kernels for avx2" in caplog.text
    found = engine.forward([TokenSequence(row) for row in rows]).rewards
    assert found == pytest.approx(plain_rewards(load_tiny(folder), rows), abs=1e-4)


def test_missing_kernels_are_logged(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where kernels would help but are not available, a warning gives the reason, and ``on`` refuses the start."""

    def missing(arithmetic: str) -> Kernels:
        raise KernelsUnavailable("no C++ compiler (g++) is installed to compile them: install g++")

    monkeypatch.setattr(choice, "load_kernels", missing)
    settings = ModelSettings(device="cpu", dtype="bfloat16", num_threads=1)
    load = partial(load_torch_engine, pad_token_id=0, max_input_tokens=200)

    with caplog.at_level(logging.WARNING):
        engine = load(tiny_checkpoint("llama"), settings, BatchingSettings())

    assert engine.info.kernels is None
    assert "install g++" in caplog.text
    with pytest.raises(SettingsError, match=r"model\.kernels is on.*install g"):
        load(tiny_checkpoint("llama"), settings.model_copy(update={"kernels": "on"}), BatchingSettings())


@pytest.mark.parametrize("other", [{"compile": True}, {"forward": "padded"}], ids=str)
def test_settings_that_exclude_each_other_are_refused(tiny_checkpoint: Checkpoint, other: dict[str, object]) -> None:
    """The kernels support neither compiled blocks nor padded batches."""
    settings = ModelSettings.model_validate({"device": "cpu", "dtype": "bfloat16", "kernels": "on", **other})

    with pytest.raises(SettingsError, match=r"model\.kernels is on"):
        load_torch_engine(tiny_checkpoint("llama"), settings, BatchingSettings(), pad_token_id=0, max_input_tokens=200)
