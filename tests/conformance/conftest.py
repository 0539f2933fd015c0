"""One server for all conformance tests: a tiny model with a BOS token and a chat template, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reward_client import RewardClient
from serving import RunningServer, serving
from tiny_models import write_tiny_checkpoint
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The served checkpoint; its tokenizer is also that of the actors."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("conformance") / "tiny", "llama")


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """``reward-serve`` with the tiny model, ready."""
    folder = tmp_path_factory.mktemp("conformance-server")
    with serving(folder, "--model", str(checkpoint), "--dtype", "float32") as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[RewardClient]:
    """The reference: what ``/v1/score`` answers."""
    with RewardClient(server.url, deadline_s=60) as opened:
        yield opened
