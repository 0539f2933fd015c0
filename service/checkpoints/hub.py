"""Checkpoints on a hub: what is a hub id, and its download. Nothing heavy is imported before a download begins."""

from __future__ import annotations

import re
from pathlib import Path

from service.checkpoints.files import ADAPTER_CONFIG_FILE, CONFIG_FILE
from service.errors import CheckpointError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ("*.safetensors", "*.json", "*.jinja")
"""Patterns of the files that are downloaded from a hub: weights and plain data, no code."""


def check_source(source: str) -> None:
    """Check that a checkpoint folder exists and has a configuration, or that the name may be a hub id.

    Raises:
        CheckpointError: neither; the message names the remedy.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in (CONFIG_FILE, ADAPTER_CONFIG_FILE)):
            raise CheckpointError(
                f"{folder} is not a checkpoint: it has no {CONFIG_FILE}; pass the folder that save_pretrained wrote."
            )
        return
    if folder.exists():
        raise CheckpointError(f"{source} is a file: pass the checkpoint's folder.")
    if not HUB_ID.fullmatch(source):
        raise CheckpointError(f"There is no folder {source}, nor is it a hub id (owner/name): check the path.")


def local_folder(source: str, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint: the given one, or that of a hub id after its download.

    Raises:
        CheckpointError: there is neither such a folder nor such a model on a reachable hub.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    check_source(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionResolutionError

    try:
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, RevisionResolutionError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{source} is not a local folder, and could not be downloaded from the hub ({type(error).__name__}): check "
            "the name and the network (HF_TOKEN for a gated model), or download it elsewhere and pass its folder."
        ) from error
