"""The folders that the service makes once and keeps in the user's cache: merged checkpoints, compiled kernels."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_directory() -> Path:
    """The folder of this user's cache that we may fill: ``$XDG_CACHE_HOME/reward-service``, else under ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "reward-service"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return ``folder``, filled by ``build`` if it does not exist yet; never a half-filled one.

    ``build`` fills a temporary folder beside it, which is then renamed into place. Of two processes that build at the
    same time, the first to finish wins and the other takes what it finds, so no lock can be left behind by a crash.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as workplace:
        unfinished = Path(workplace) / "unfinished"
        unfinished.mkdir()
        build(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder
