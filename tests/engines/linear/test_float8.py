"""fp8 is refused where it is not possible, names the layers that it changes, and is another model version."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_classifiers import load_tiny, probe_and_choose
from torch import nn

from service.assembly import arithmetic_of
from service.engines.base import EngineInfo
from service.engines.linear.float8 import float8_refusal, layers_for_float8, quantize_float8
from service.engines.parity import plain_outputs, probes_for, quantization_error
from service.engines.torch import load_torch_engine
from service.errors import SettingsError
from service.settings import BatchingSettings, ModelSettings

INFO = EngineInfo("torch", "Llama", "packed", "cuda:0", "bfloat16", "packed", max_input_tokens=8, max_batch_tokens=8)


@pytest.mark.parametrize(
    ("capability", "dtype", "has_torchao", "reason"),
    [
        (None, torch.bfloat16, True, "on a CPU"),
        ((8, 0), torch.bfloat16, True, "capability 8.0"),
        ((9, 0), torch.float16, True, "needs bfloat16"),
        ((9, 0), torch.bfloat16, False, "pip install"),
        ((8, 9), torch.bfloat16, True, ""),
        ((10, 0), torch.bfloat16, True, ""),
    ],
    ids=["cpu", "ampere", "fp16", "no-torchao", "ada", "blackwell"],
)
def test_fp8_is_refused_with_one_reason(
    capability: tuple[int, int] | None, dtype: torch.dtype, has_torchao: bool, reason: str
) -> None:
    """Each missing requirement has its own reason; where none is missing, the reason is empty."""
    refusal = float8_refusal(capability, dtype, has_torchao=has_torchao)

    assert reason in refusal
    assert bool(refusal) == bool(reason)


def test_an_engine_on_a_cpu_refuses_fp8(tiny_checkpoint) -> None:
    """The start ends with one error and does not fall back silently."""
    with pytest.raises(SettingsError, match="quantization is fp8, but the model runs on a CPU"):
        load_torch_engine(
            tiny_checkpoint("llama"),
            ModelSettings(device="cpu", quantization="fp8"),
            BatchingSettings(),
            pad_token_id=0,
            max_input_tokens=99,
        )


def test_linear_layers_of_the_body_are_quantized(tiny_checkpoint) -> None:
    """Every projection of every block is named; embeddings, head and layers of unsuitable sizes are not."""
    classifier = load_tiny(tiny_checkpoint("llama"))
    names = layers_for_float8(classifier.body)

    assert len(names) == 7 * classifier.config.num_hidden_layers
    assert all("proj" in name for name in names)
    assert not any("score" in name or "embed" in name for name in names)
    assert layers_for_float8(nn.ModuleDict({"odd": nn.Linear(16, 24), "even": nn.Linear(32, 48)})) == ["even"]


def test_a_quantized_model_is_another_version() -> None:
    """The arithmetic, a part of version and calibration, includes fp8; without fp8 it does not change."""
    quantized = replace(INFO, quantization="fp8")

    assert (INFO.arithmetic, quantized.arithmetic) == ("bfloat16", "bfloat16, fp8")
    assert arithmetic_of(INFO)["dtype"] == "bfloat16"
    assert arithmetic_of(INFO) != arithmetic_of(quantized)


def test_quantization_loss_is_separate_from_parity(tiny_checkpoint) -> None:
    """A path is compared with the plain forward of the quantized weights, and the quantization loss is reported."""
    classifier = load_tiny(tiny_checkpoint("llama"))

    probes = probes_for(classifier, max_tokens=400)
    unquantized = plain_outputs(classifier, probes)
    with torch.no_grad():
        for module in classifier.body.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(module.weight.to(torch.float8_e4m3fn).to(module.weight.dtype))

    error = quantization_error(unquantized, plain_outputs(classifier, probes))
    _, parity = probe_and_choose(classifier)

    assert parity.agrees
    assert parity.max_difference < 1e-4 < error["max_difference"]
    assert 0.5 < error["spearman"] <= 1


def test_a_changed_ranking_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Equal ranks log nothing; reversed ranks log a warning with the correlation."""
    assert quantization_error([[1.0], [2.0], [3.0]], [[1.1], [2.5], [2.6]])["spearman"] == 1
    assert not caplog.records

    assert quantization_error([[1.0], [2.0], [3.0]], [[3.0], [2.0], [1.0]])["spearman"] == -1
    assert "Spearman -1.000" in caplog.text


@pytest.mark.gpu
def test_fp8_rewards_rank_as_bf16_ones(tiny_checkpoint) -> None:
    """On a GPU with fp8 the layers are quantized, the parity probe accepts the path, and most ranks stay."""
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply fp8")
    classifier = load_tiny(tiny_checkpoint("llama"), torch.bfloat16, device=torch.device("cuda"))
    probes = probes_for(classifier, max_tokens=400)
    unquantized = plain_outputs(classifier, probes)

    quantize_float8(classifier.body)
    error = quantization_error(unquantized, plain_outputs(classifier, probes))
    _, parity = probe_and_choose(classifier)

    assert parity.agrees
    assert error["spearman"] > 0.8
