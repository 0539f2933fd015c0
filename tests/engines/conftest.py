"""Tiny checkpoints for the engine tests, each written once per run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes a tiny checkpoint (``write_tiny_checkpoint``) and returns its folder."""
    folders: dict[str, Path] = {}

    def write(family: str, **options: Any) -> Path:
        key = f"{family} {sorted(options.items())}"
        if key not in folders:
            folders[key] = write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", family, **options)
        return folders[key]

    return write


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    """Use one thread, which is faster for tiny matrices, above all where other processes use the cores too."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
