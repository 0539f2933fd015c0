"""Files are identified by their SHA-256."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from reward_client.hashing import file_sha256


def test_the_hash_covers_the_bytes_of_the_file(tmp_path: Path) -> None:
    """It is the standard SHA-256 of the content, whatever the name; a missing file is an OSError."""
    (tmp_path / "a").write_bytes(b"content")

    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"content").hexdigest()
    with pytest.raises(FileNotFoundError):
        file_sha256(tmp_path / "b")
