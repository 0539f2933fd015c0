"""The two hashes over the weights of a folder have their documented values."""

from __future__ import annotations

import hashlib
from pathlib import Path

from reward_client.provenance import base_hash

from service.checkpoints.weights import weights_sha256


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_the_weights_hash_has_the_stored_form(tmp_path: Path) -> None:
    """Calibrations and bundles store it, so its value may not change: one line of name and hash per file, in order."""
    files = [tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00002-of-00002.safetensors"]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]))

    lines = f"{files[0].name} {sha256(bytes([0]))}\n{files[1].name} {sha256(bytes([1]))}\n"

    assert weights_sha256(files) == sha256(lines.encode())
    assert weights_sha256(files[::-1]) != weights_sha256(files) != base_hash(tmp_path)
