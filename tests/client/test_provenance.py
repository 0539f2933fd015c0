"""The base of a served model, and its comparison with a KL reference, in functions and in the real application."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from http_application import checkpoint_client
from reward_client.provenance import TRAINING_MANIFEST_FILE, Origin, base_hash, check_reference, read_origin
from tiny_adapters import write_adapter
from tiny_models import write_tiny_checkpoint

from service.checkpoints.adapter import merge_adapter

HASH = hashlib.sha256(b"weights").hexdigest()
ORIGIN = Origin("org/sft-v3", HASH)


def write_manifest(folder: Path, **facts: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRAINING_MANIFEST_FILE).write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize("asked", ["org/sft-v3", "sft-v3", HASH, HASH[:8]])
def test_the_origin_is_recognised_by_name_and_hash(asked: str) -> None:
    """Its full name, the last part of it, its hash, and a prefix of the hash."""
    check = check_reference(ORIGIN, asked)

    assert check.same is True
    assert "was initialised from org/sft-v3" in check.detail


@pytest.mark.parametrize("asked", ["sft-v4", "org", "other/sft-v3x", "0" * 64, HASH[:7]])
def test_another_checkpoint_is_recognised(asked: str) -> None:
    """Other names and hashes; fewer than eight digits of a hash are a name."""
    check = check_reference(ORIGIN, asked)

    assert check.same is False
    assert "another checkpoint" in check.detail


@pytest.mark.parametrize("origin", [None, Origin("org/sft-v3", None)])
def test_without_a_record_the_comparison_is_undecided(origin: Origin | None) -> None:
    """Without a manifest, or without a hash in it, a hash is neither the same nor another."""
    assert check_reference(origin, HASH).same is None


def test_a_manifest_is_read_as_training_writes_it(tmp_path: Path) -> None:
    """Base and hash; of a folder on the training machine only its name."""
    named = read_origin(write_manifest(tmp_path / "a", base="org/sft-v3", base_hash=HASH))
    local = read_origin(write_manifest(tmp_path / "b", base="/home/someone/runs/sft-v3", base_hash=None))

    assert named == ORIGIN
    assert local == Origin("sft-v3", None)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"base": ""}', '{"base": 3}'])
def test_an_unreadable_manifest_is_no_origin(tmp_path: Path, content: str) -> None:
    """An invalid manifest never prevents serving."""
    (tmp_path / TRAINING_MANIFEST_FILE).write_text(content)

    assert read_origin(tmp_path) is None
    assert read_origin(tmp_path / "nowhere") is None


def test_the_base_hash_covers_all_shards(tmp_path: Path) -> None:
    """It is the hash of the files' hashes in the order of their names; None without weights."""
    assert base_hash(tmp_path) is None
    for name, content in (("b.safetensors", b"2"), ("a.safetensors", b"1")):
        (tmp_path / name).write_bytes(content)

    digests = "".join(hashlib.sha256(content).hexdigest() for content in (b"1", b"2"))

    assert base_hash(tmp_path) == hashlib.sha256(digests.encode()).hexdigest()


@pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")
def test_merging_copies_the_training_manifest(tmp_path: Path) -> None:
    """The merged folder, which is served, has the origin of the adapter."""
    base = write_tiny_checkpoint(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base)
    write_manifest(adapter, base="org/sft-v3", base_hash=HASH)

    assert read_origin(merge_adapter(adapter, tmp_path / "merged")) == ORIGIN


async def test_the_service_compares_references(tmp_path: Path) -> None:
    """``/v1/model`` always names the origin, and compares it with a given reference; an empty one is refused."""
    checkpoint = write_tiny_checkpoint(tmp_path / "model")
    write_manifest(checkpoint, base="org/sft-v3", base_hash=HASH)

    async with checkpoint_client(checkpoint) as client:
        plain = (await client.get("/v1/model")).json()
        same = (await client.get("/v1/model", params={"reference": "org/sft-v3"})).json()
        other = (await client.get("/v1/model", params={"reference": "0" * 64})).json()
        empty = await client.get("/v1/model", params={"reference": ""})

    assert plain["initialised_from"] == {"name": "org/sft-v3", "base_hash": HASH}
    assert "reference" not in plain
    assert (same["reference"]["asked"], same["reference"]["same"]) == ("org/sft-v3", True)
    assert other["reference"]["same"] is False
    assert other["model"] == plain["model"]
    assert (empty.status_code, empty.json()["code"]) == (422, "invalid_request")
