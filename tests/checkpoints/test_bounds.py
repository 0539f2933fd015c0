"""A checkpoint that names something huge is refused in one sentence before anything of that size is made."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny_checkpoint

from service.checkpoints.bounds import MAX_JSON_BYTES, MAX_LAYERS, check_configuration
from service.checkpoints.checkpoint import open_checkpoint
from service.checkpoints.configuration import read_json
from service.checkpoints.weights import read_tensor_infos
from service.errors import CheckpointError
from service.settings import ModelSettings

HUGE: dict[str, dict[str, Any]] = {
    "num_hidden_layers of 20,000": {"num_hidden_layers": 20_000},
    "num_labels of 100,000,000": {"num_labels": 100_000_000},
    "num_attention_heads of 1,000,000": {"num_attention_heads": 1_000_000},
    "max_position_embeddings of 1,000,000,000,000": {"max_position_embeddings": 10**12},
    "n_layer of 5,000": {"text_config": {"n_layer": 5_000}},
    "num_hidden_layers of 9,999": {"parts": [{"inner": {"num_hidden_layers": 9_999}}]},
    "block_sizes of 3,000": {"block_sizes": [1_000, 1_000, 1_000]},
    "num_local_experts of 1,000,000": {"num_local_experts": 1_000_000},
    "_attn_implementation of a kernel on a hub": {"_attn_implementation": "someone/kernel"},
    "attn_implementation of a kernel on a hub": {"attn_implementation": {"": "someone/kernel@v1"}},
    "experts_implementation of a kernel on a hub": {"text_config": {"experts_implementation": "someone/kernel"}},
}


def edited(folder: Path, **entries: Any) -> Path:
    write_tiny_checkpoint(folder)
    content = json.loads((folder / "config.json").read_bytes()) | entries
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def opened(folder: Path) -> None:
    open_checkpoint(folder, ModelSettings(path=str(folder)))


@pytest.mark.parametrize(("refusal", "entries"), HUGE.items(), ids=list(HUGE))
def test_a_configuration_of_a_huge_model_is_refused_at_once(
    refusal: str, entries: dict[str, Any], tmp_path: Path
) -> None:
    """The sentence has the entry, whether at the top or inside, and nothing of its size is made."""
    folder = edited(tmp_path, **entries)
    memory, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()

    with pytest.raises(CheckpointError, match=refusal) as raised:
        opened(folder)

    assert str(raised.value).count(". ") == 0
    assert time.process_time() - begin < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100 * 1024


def test_entries_of_real_models_pass() -> None:
    """The largest numbers of published models are below the bounds."""
    check_configuration(
        Path("config.json"),
        {
            "num_hidden_layers": 126,
            "max_window_layers": 80,
            "n_routed_experts": 384,
            "num_experts": 512,
            "num_attention_heads": 128,
            "max_position_embeddings": 10_485_760,
            "vocab_size": 262_400,
            "num_labels": 1_000,
            "layer_types": ["full_attention"] * 100,
            "_attn_implementation": "flash_attention_2",
            "rope_theta": 5e8,
        },
    )
    with pytest.raises(CheckpointError, match=f"may have {MAX_LAYERS:,} layers"):
        check_configuration(Path("config.json"), {"num_hidden_layers": MAX_LAYERS + 1})


@pytest.mark.parametrize("depth", [100, 100_000])
def test_a_deeply_nested_configuration_is_refused(depth: int, tmp_path: Path) -> None:
    """Neither reading nor copying the values runs into Python's limit on recursion."""
    folder = write_tiny_checkpoint(tmp_path)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(f'{text.rstrip().removesuffix("}")}, "deep": {"[" * depth}{"]" * depth}}}')

    with pytest.raises(CheckpointError, match="nested in more than 64 levels"):
        opened(folder)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """A configuration larger than any is not read into memory."""
    file = tmp_path / "config.json"
    with file.open("wb") as stream:
        stream.truncate(MAX_JSON_BYTES + 1)  # takes no space on the disk

    with pytest.raises(CheckpointError, match=r"has 67,108,865 bytes; the limit is 67,108,864"):
        read_json(file)


def write_header(file: Path, header: bytes) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header)


def test_a_header_with_millions_of_tensors_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    """1.5 million empty tensors, which take gigabytes once they are parsed, end with a sentence."""
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    file = tmp_path / "model.safetensors"
    write_header(file, ("{" + ",".join(entry % index for index in range(1_100_000)) + "}").encode())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pytest.raises(CheckpointError, match="more than 262,144 tensors"):
        read_tensor_infos([file])

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300 * 1024


def test_a_header_of_hundreds_of_megabytes_is_refused_unread(tmp_path: Path) -> None:
    """The length that a file claims for its header is checked first; a false one is a damaged file."""
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write((90 * 1024 * 1024).to_bytes(8, "little"))
        stream.truncate(100 * 1024 * 1024)
    with pytest.raises(CheckpointError, match="has a header of 94,371,840 bytes"):
        read_tensor_infos([file])

    file.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_tensor_infos([file])
