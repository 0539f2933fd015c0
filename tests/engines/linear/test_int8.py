"""int8 quantizes groups of 32 elements, runs on the CPU kernels or not at all, and is another model version."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from tiny_classifiers import load_tiny, random_rows
from torch import nn

from service.assembly import arithmetic_of
from service.engines.devices.device import has_avx512_vnni
from service.engines.kernels import build, choice
from service.engines.linear.int8 import GROUP_SIZE, Int8Linear, fake_quantize, layers_for_int8, quantize_int8
from service.engines.torch import load_torch_engine
from service.errors import SettingsError
from service.records import TokenSequence
from service.settings import BatchingSettings, ModelSettings

Checkpoint = Callable[..., Path]

load_engine = partial(load_torch_engine, pad_token_id=0, max_input_tokens=200)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_scale_of_a_group_is_its_largest_magnitude() -> None:
    """No element changes by more than half a step of its own group, and the largest one of a group does not change."""
    elements = random(5, 4 * GROUP_SIZE) * torch.tensor([1.0, 100.0, 1e-4, 1.0]).repeat_interleave(GROUP_SIZE)
    largest = elements.unflatten(-1, (4, GROUP_SIZE)).abs().amax(dim=-1, keepdim=True)

    moved = (fake_quantize(elements) - elements).abs().unflatten(-1, (4, GROUP_SIZE))

    assert (moved <= largest / 127 / 2 * 1.001).all()
    assert torch.allclose(
        fake_quantize(elements).unflatten(-1, (4, GROUP_SIZE)).abs().amax(dim=-1, keepdim=True), largest
    )


def test_zeros_stay_zeros_and_nan_stays_in_its_group() -> None:
    """A group of zeros is not divided by zero, and NaN affects its own group only."""
    elements = random(1, 2 * GROUP_SIZE)
    elements[0, 3] = torch.nan

    found = fake_quantize(elements)

    assert found[0, :GROUP_SIZE].isnan().any()
    assert torch.equal(found[0, GROUP_SIZE:], fake_quantize(elements[:, GROUP_SIZE:])[0])
    assert torch.equal(fake_quantize(torch.zeros(2, GROUP_SIZE)), torch.zeros(2, GROUP_SIZE))


def test_linear_layers_of_the_body_are_quantized(tiny_checkpoint: Checkpoint) -> None:
    """Every projection of every block multiplies in int8; the head and layers of unsuitable widths do not."""
    classifier = load_tiny(tiny_checkpoint("llama"), torch.bfloat16)
    before = classifier.body.layers[0].self_attn.q_proj.weight.clone()

    assert quantize_int8(classifier.body) == 7 * classifier.config.num_hidden_layers

    layer = classifier.body.layers[0].self_attn.q_proj
    states = random(3, layer.in_features, seed=1).to(torch.bfloat16)
    assert isinstance(layer, Int8Linear)
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer(states), (fake_quantize(states) @ fake_quantize(before).T).to(torch.bfloat16))
    assert type(classifier.model.score) is nn.Linear
    assert layers_for_int8(nn.ModuleDict({"odd": nn.Linear(48, 64)})) == []
    with pytest.raises(SettingsError, match="no layer has a width"):
        quantize_int8(nn.ModuleDict({"odd": nn.Linear(48, 64)}))


@pytest.mark.skipif(not has_avx512_vnni(), reason="this CPU has no AVX-512 VNNI")
def test_an_engine_multiplies_in_int8(tiny_checkpoint: Checkpoint) -> None:
    """It reports int8, is another version than bfloat16, changes rewards a little, and is batch-invariant."""
    folder = tiny_checkpoint("qwen2", hidden_size=128, intermediate_size=256)
    settings = ModelSettings(device="cpu", quantization="int8", num_threads=1)
    engine = load_engine(folder, settings, BatchingSettings())
    plain = load_engine(folder, ModelSettings(device="cpu", dtype="bfloat16", num_threads=1), BatchingSettings())
    classifier = load_tiny(folder)
    sequences = [TokenSequence(row) for row in random_rows(classifier, lengths=tuple(range(3, 150, 3)))]

    found, unchanged = engine.forward(sequences).rewards, plain.forward(sequences).rewards

    assert (engine.info.kernels, engine.info.arithmetic) == ("avx512-int8", "bfloat16, int8")
    assert arithmetic_of(engine.info) != arithmetic_of(plain.info)
    assert engine.info.quantization_error["max_difference"] > 0
    assert found != unchanged
    assert spearmanr(found, unchanged).statistic > 0.97
    assert [engine.forward([sequence]).rewards[0] for sequence in sequences] == list(found)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"compile": True}, "compiled blocks"),
        ({"forward": "padded"}, "padded batches"),
        ({"kernels": "off"}, "must not be off"),
        ({"dtype": "float32"}, "not float32"),
    ],
    ids=["compiled", "padded", "without-kernels", "fp32"],
)
def test_settings_that_exclude_int8_are_refused(
    tiny_checkpoint: Checkpoint, other: dict[str, object], reason: str
) -> None:
    """The start ends with one error and does not fall back silently."""
    settings = ModelSettings.model_validate({"device": "cpu", "quantization": "int8", **other})

    with pytest.raises(SettingsError, match=f"quantization is int8.*{reason}"):
        load_engine(tiny_checkpoint("llama"), settings, BatchingSettings())


def test_a_cpu_without_vnni_is_refused(tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the instruction set there is no start, and the error names it."""
    monkeypatch.setattr(build, "has_avx512_vnni", lambda: False)
    monkeypatch.setattr(choice, "load_kernels", choice.load_kernels.__wrapped__)  # without the cache

    with pytest.raises(SettingsError, match=r"quantization is int8.*(VNNI|AVX-512)"):
        load_engine(tiny_checkpoint("llama"), ModelSettings(device="cpu", quantization="int8"), BatchingSettings())


def test_a_model_without_a_path_on_kernels_is_refused(tiny_checkpoint: Checkpoint) -> None:
    """An encoder runs padded, which has no int8: it does not start in bfloat16 instead."""
    with pytest.raises(SettingsError, match="quantization is int8"):
        load_engine(tiny_checkpoint("bert"), ModelSettings(device="cpu", quantization="int8"), BatchingSettings())
