"""A checkpoint that is stored quantized is served with its widened weights, or refused by the name of its format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import FORMATS, compressed, quantize_checkpoint
from safetensors.torch import load_file, save_file
from tiny_classifiers import load_tiny, random_rows
from tiny_models import write_tiny_causal_lm, write_tiny_checkpoint
from transformers import AutoModelForSequenceClassification

from export.convert import convert
from service.assembly import assemble
from service.checkpoints.adapter import merge_adapter
from service.checkpoints.checkpoint import model_version, open_checkpoint
from service.engines.parity import plain_rewards
from service.errors import CheckpointError
from service.records import TokenSequence
from service.settings import ModelSettings, read_settings
from training.base_checkpoint import read_base_facts


def write_quantized(folder: Path, name: str, *, family: str = "llama", **config: Any) -> tuple[Path, Path]:
    """Write a quantized checkpoint, and beside it the same one with the widened weights in float32."""
    plain = write_tiny_checkpoint(folder / "plain", family, **config)
    quantized = folder / "quantized"
    shutil.copytree(plain, quantized)
    quantize_checkpoint(quantized, FORMATS[name], plain)
    return quantized, plain


def edit_config(folder: Path, **entries: Any) -> None:
    content = json.loads((folder / "config.json").read_bytes()) | entries
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_weights_give_the_rewards_of_the_widened_ones(name: str, tmp_path: Path) -> None:
    """A loaded checkpoint gives the rewards of transformers on the weights that NumPy widens, and names its format."""
    quantized, plain = write_quantized(tmp_path, name)
    reference = AutoModelForSequenceClassification.from_pretrained(plain, dtype=torch.float32).eval()
    loaded = load_tiny(quantized)
    rows = random_rows(loaded, (5, 40, 70))

    rewards = plain_rewards(loaded, rows)

    with torch.inference_mode():
        expected = [float(reference(torch.tensor([row])).logits[0, 0]) for row in rows]
    assert rewards == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.05
    checkpoint = open_checkpoint(quantized, ModelSettings(path=str(quantized)))
    assert FORMATS[name].words in str(checkpoint.stored_quantization)
    assert checkpoint.num_parameters == sum(weight.numel() for weight in reference.parameters())


def test_a_quantized_checkpoint_is_served(tmp_path: Path) -> None:
    """The engine's rewards are those of the widened weights, and the answer of /v1/model says that they were."""
    quantized, plain = write_quantized(tmp_path, "fine-grained fp8")
    served = assemble(read_settings({"model": {"path": str(quantized), "device": "cpu", "dtype": "float32"}}), taps=())
    reference = load_tiny(plain)
    rows = random_rows(reference, (5, 40, 70))

    rewards = served.scorer.pipeline.engine.forward([TokenSequence(row) for row in rows]).rewards

    assert list(rewards) == pytest.approx(plain_rewards(reference, rows), abs=1e-4)
    assert served.description()["stored_quantization"] == "fp8: fp8 in 48 x 40 blocks"
    assert "activations are not quantized" in served.description()["notes"][0]


@pytest.mark.parametrize("name", ["fine-grained fp8", "pack-quantized int4"])
def test_matrices_are_rounded_once_to_the_dtype_of_the_body(name: str, tmp_path: Path) -> None:
    """In bfloat16 each matrix is the widened one, computed in float32 and rounded once, bit for bit."""
    quantized, plain = write_quantized(tmp_path, name)

    loaded = load_tiny(quantized, torch.bfloat16).model.state_dict()

    true = load_file(plain / "model.safetensors")
    matrices = [name for name in true if name.endswith("proj.weight")]
    assert all(torch.equal(loaded[name], true[name].to(torch.bfloat16)) for name in matrices)
    assert loaded["score.weight"].dtype == torch.float32


def test_quantized_experts_are_widened(tmp_path: Path) -> None:
    """Experts that are stored one by one, each with its scales, are widened before transformers joins them."""
    quantized, plain = write_quantized(tmp_path, "fine-grained fp8", family="qwen3_moe")

    rows = random_rows(load_tiny(plain), (5, 40))

    assert plain_rewards(load_tiny(quantized), rows) == pytest.approx(plain_rewards(load_tiny(plain), rows), abs=1e-5)


def test_the_version_covers_scales_and_format(tmp_path: Path) -> None:
    """Another scale is another model, and so is another block size; a checkpoint that is not quantized says nothing."""
    quantized, plain = write_quantized(tmp_path, "fine-grained fp8")

    def version() -> str:
        checkpoint = open_checkpoint(quantized, ModelSettings(path=str(quantized)))
        return model_version(checkpoint, dtype="float32", template="chat").version

    first = version()
    weights = load_file(quantized / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight_scale_inv"] *= 2
    save_file(weights, quantized / "model.safetensors", {"format": "pt"})
    second = version()
    edit_config(quantized, quantization_config={"quant_method": "fp8", "weight_block_size": [48, 40], "scale_fmt": "x"})

    assert len({first, second, version()}) == 3
    assert open_checkpoint(plain, ModelSettings(path=str(plain))).stored_quantization is None


def test_a_quantized_value_head_checkpoint_is_converted(tmp_path: Path) -> None:
    """reward-convert widens the body to the dtype of the configuration, and says so."""
    plain = write_tiny_causal_lm(tmp_path / "plain")
    shutil.copytree(plain, tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", FORMATS["int-quantized"], plain)
    weights = load_file(tmp_path / "source" / "model.safetensors")
    head = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    save_file(weights | {"v_head.weight": head}, tmp_path / "source" / "model.safetensors", {"format": "pt"})

    conversion = convert(tmp_path / "source", tmp_path / "out")

    converted, true = load_file(tmp_path / "out" / "model.safetensors"), load_file(plain / "model.safetensors")
    assert torch.equal(converted["model.layers.1.mlp.up_proj.weight"], true["model.layers.1.mlp.up_proj.weight"])
    assert any("int8 with a scale per matrix or row) were widened to float32" in note for note in conversion.notes)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, r"by gptq; .*serve the unquantized model"),
    "awq": ({"quant_method": "awq", "bits": 4}, r"by awq; .*serve the unquantized model"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"by bitsandbytes; .*call dequantize\(\)"),
    "mxfp4": ({"quant_method": "mxfp4"}, r"by mxfp4; .*call dequantize\(\)"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "by modelopt; "),
    "no method": ({"bits": 4}, "by a method without a name; "),
    "nvfp4": (compressed("nvfp4-pack-quantized", num_bits=4, type="float"), r"\(format nvfp4-pack-quantized\)"),
    "2:4 sparsity": (compressed("marlin-24", num_bits=4), r"\(format marlin-24\)"),
    "sparse": (
        compressed("float-quantized", num_bits=8, type="float") | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        r"\(sparsity format sparse-24-bitmask\)",
    ),
    "rotated": (
        compressed("pack-quantized", num_bits=4) | {"transform_config": {"config_groups": {"R1": {}}}},
        "transforms of weights",
    ),
    "three bits": (compressed("pack-quantized", num_bits=3), "integers of 3 bits"),
    "no groups": ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "copy or save"),
    "block of nothing": ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "copy or save"),
    "text": ("fp8", "is not an object"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_format_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """One sentence names the method or the format, and what to serve instead."""
    folder = write_tiny_checkpoint(tmp_path)
    config, sentence = REFUSED[name]
    edit_config(folder, quantization_config=config)

    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(folder, ModelSettings(path=str(folder)))


def without_config(folder: Path) -> None:
    """fp8 weights without the configuration that names their scales."""
    content = json.loads((folder / "config.json").read_bytes())
    del content["quantization_config"]
    (folder / "config.json").write_text(json.dumps(content))


def without_scale(folder: Path) -> None:
    """The scales of one matrix are lost."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def other_block(folder: Path) -> None:
    """The configuration names another block size than the weights have."""
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})


def infinite_scale(folder: Path) -> None:
    """One scale is not finite."""
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight_scale_inv"][0, 0] = torch.inf
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


DAMAGES: dict[Callable[[Path], None], str] = {
    without_config: r"stores .* as F8_E4M3 without the scales",
    without_scale: r"stores model\.layers\.0\.mlp\.up_proj\.weight as F8_E4M3 without the scales",
    other_block: r"do not match its quantization_config \(fp8: fp8 in 16 x 16 blocks\): .*F8_E4M3, .*_scale_inv",
    infinite_scale: r"NaN or infinity in model\.layers\.0\.mlp\.up_proj\.weight_scale_inv",
}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES.items(), ids=[damage.__name__ for damage in DAMAGES])
def test_a_damaged_quantized_checkpoint_is_refused(
    damage: Callable[[Path], None], sentence: str, tmp_path: Path
) -> None:
    """Weights whose numbers are not known are never guessed."""
    quantized, _ = write_quantized(tmp_path, "fine-grained fp8")
    damage(quantized)

    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(quantized, ModelSettings(path=str(quantized)))


def test_integers_without_scales_are_refused(tmp_path: Path) -> None:
    """A matrix of integers in a checkpoint that is not quantized has no numbers that could be served."""
    folder = write_tiny_checkpoint(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.ones(96, 64, dtype=torch.int8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(CheckpointError, match=r"up_proj\.weight as I8 without the scales"):
        open_checkpoint(folder, ModelSettings(path=str(folder)))


def test_a_quantized_model_is_no_base(tmp_path: Path) -> None:
    """Adapters are merged into, and training starts from, unquantized weights only."""
    quantized, _ = write_quantized(tmp_path, "int-quantized")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "SEQ_CLS"}))
    save_file({"base_model.model.score.weight": torch.ones(1, 64)}, adapter / "adapter_model.safetensors")

    with pytest.raises(CheckpointError, match="cannot be a base for training: take the unquantized model"):
        read_base_facts(quantized)
    with pytest.raises(CheckpointError, match="cannot be the base of an adapter: take the unquantized model"):
        merge_adapter(adapter, tmp_path / "merged", quantized)
