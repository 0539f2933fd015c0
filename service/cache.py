"""Folders in the user's cache that are built once: merged checkpoints, compiled kernels."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_directory() -> Path:
    """The service's folder in this user's cache: ``$XDG_CACHE_HOME/reward-service``, else under ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "reward-service"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return ``folder``, filled by ``build`` if it does not exist yet; it is never incomplete.

    ``build`` fills a temporary folder beside it, which is then renamed. Of two processes that build at the same time,
    the first to finish wins and the other uses its result, so a crash leaves no lock behind.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        unfinished = Path(temporary) / "unfinished"
        unfinished.mkdir()
        build(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder
