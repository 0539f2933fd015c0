"""A bundle is served only as it was exported: every file has its recorded sha256, and the engine must support it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_bundles import change_manifest, write_tiny_bundle
from tiny_models import write_tiny_checkpoint

from service.assembly import needs_gpu, open_model
from service.checkpoints.bundle import (
    FORMAT_VERSION,
    GRAPH_DATA_FILE,
    GRAPH_FILE,
    is_bundle,
    open_bundle,
    read_manifest,
)
from service.checkpoints.files import BUNDLE_MANIFEST_FILE
from service.errors import CheckpointError, SettingsError
from service.settings import ModelSettings


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_tiny_bundle(tmp_path / "bundle")


def opened(folder: Path, **settings: object):
    return open_bundle(folder, ModelSettings.model_validate({"path": str(folder), **settings}))


def test_a_complete_bundle_is_opened(bundle: Path) -> None:
    """The record has name, limit, template and the hashes of the exported checkpoint, which its calibration needs."""
    checkpoint = opened(bundle).checkpoint

    assert is_bundle(bundle)
    assert (checkpoint.name, checkpoint.max_input_tokens, checkpoint.has_chat_template) == ("bundle", 512, True)
    assert checkpoint.hashes.weights == "d" * 64
    assert open_model(ModelSettings(path=str(bundle), engine="onnx")).checkpoint.hashes == checkpoint.hashes


@pytest.mark.parametrize("name", [GRAPH_FILE, "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_one_changed_byte_refuses_the_bundle(bundle: Path, name: str) -> None:
    """A flipped bit in any file that determines a reward is found, and the file is named."""
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)

    with pytest.raises(CheckpointError, match=name):
        opened(bundle)


def test_a_missing_file_is_named(bundle: Path) -> None:
    """The message of an incomplete bundle names the missing file."""
    (bundle / "tokenizer.json").unlink()

    with pytest.raises(CheckpointError, match=r"lacks the file tokenizer\.json"):
        opened(bundle)


def test_a_data_file_must_be_in_the_manifest(bundle: Path) -> None:
    """A data file that the manifest does not list could hold any weights."""
    (bundle / GRAPH_DATA_FILE).write_bytes(b"weights")

    with pytest.raises(CheckpointError, match="does not list"):
        opened(bundle)


def test_no_file_outside_of_the_folder_is_read(bundle: Path) -> None:
    """A file name in the manifest cannot lead out of the folder."""
    change_manifest(bundle, files={**read_manifest(bundle).files, "../other": "0" * 64})

    with pytest.raises(CheckpointError, match=r"\.\./other"):
        opened(bundle)


def test_a_calibration_may_be_replaced(bundle: Path) -> None:
    """The calibration determines no reward, so it is not among the verified files."""
    (bundle / "calibration.safetensors").write_bytes(b"any")

    assert opened(bundle).manifest.name == "tiny"


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"format": 1}', '{"format_version": 1}', f'{{"format_version": {FORMAT_VERSION}}}', "{"],
)
def test_an_invalid_manifest_is_refused_with_a_remedy(bundle: Path, content: str) -> None:
    """Content that is not JSON, another format version, or missing entries."""
    (bundle / BUNDLE_MANIFEST_FILE).write_text(content)

    with pytest.raises(CheckpointError, match="reward-export"):
        opened(bundle)


def test_the_token_limit_is_that_of_the_export(bundle: Path) -> None:
    """A setting may lower the limit and may not raise it."""
    assert opened(bundle, max_input_tokens=100).checkpoint.max_input_tokens == 100
    with pytest.raises(CheckpointError, match="takes 512 at most"):
        opened(bundle, max_input_tokens=513)


def test_the_version_depends_on_the_graph_below_fp32(bundle: Path) -> None:
    """In fp32 the model's version does not depend on the graph's bytes; in int8 it does."""
    fp32 = opened(bundle).arithmetic
    change_manifest(bundle, precision="int8")
    int8 = opened(bundle).arithmetic

    assert fp32 == "float32"
    assert int8.startswith("int8 ")
    assert len(int8) == len("int8 ") + 64


def test_the_torch_engine_takes_no_bundle(bundle: Path) -> None:
    """The engine setting must support the folder."""
    with pytest.raises(SettingsError, match="ONNX bundle"):
        open_model(ModelSettings(path=str(bundle), engine="torch"))


def test_a_bundle_is_not_quantized_again(bundle: Path) -> None:
    """A graph's precision was chosen at its export, so a setting for another one is an error."""
    with pytest.raises(SettingsError, match=r"quantization is int8, but .* is an ONNX bundle"):
        open_model(ModelSettings(path=str(bundle), quantization="int8"))


def test_the_onnx_engine_takes_no_checkpoint(tmp_path: Path) -> None:
    """The error for the onnx engine on a plain checkpoint names the export command."""
    folder = write_tiny_checkpoint(tmp_path / "model")

    with pytest.raises(SettingsError, match=f"reward-export {folder} OUT"):
        open_model(ModelSettings(path=str(folder), engine="onnx"))


def test_int8_needs_no_gpu(bundle: Path) -> None:
    """An int8 bundle runs on the CPU of any machine, and refuses a GPU."""
    change_manifest(bundle, precision="int8")

    assert needs_gpu(ModelSettings(path=str(bundle)), bundle) is False
    with pytest.raises(SettingsError, match="int8 on CPUs only"):
        needs_gpu(ModelSettings(path=str(bundle), device="cuda"), bundle)
