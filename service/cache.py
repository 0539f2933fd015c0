"""Folders that are built once and stored in the user's cache: merged checkpoints, compiled CPU kernels."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_directory() -> Path:
    """Return the cache folder: ``$XDG_CACHE_HOME/reward-service``, else ``~/.cache/reward-service``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "reward-service"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return ``folder``, after filling it by ``build`` if it does not exist yet; it is never incomplete.

    ``build`` fills a temporary folder in the same parent folder, which is then renamed. If two processes build at the
    same time, the first result is used and the second is dropped. There is no lock that a crash could leave behind.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as build_dir:
        unfinished = Path(build_dir) / "unfinished"
        unfinished.mkdir()
        build(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder
