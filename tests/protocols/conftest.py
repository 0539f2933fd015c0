"""Applications that the tests of the protocols send requests to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from http_application import Application, application
from scored_texts import COMPLETION, PROMPT
from tiny_models import write_tiny_checkpoint

from service.engines.oracle import OracleFaults


@pytest.fixture
async def oracle(tmp_path: Path) -> AsyncIterator[Application]:
    """The oracle, whose reward is a known function of the text; control characters make it fail."""
    async with application(tmp_path, faults=OracleFaults.by_control_bytes()) as running:
        yield running


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a chat template, whose tokenizer adds a BOS."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
async def model(tmp_path: Path, checkpoint: Path) -> AsyncIterator[Application]:
    """The checkpoint, served."""
    settings = {"path": str(checkpoint), "name": "tiny", "num_threads": 1, "kernels": "off"}
    async with application(tmp_path, model=settings, batching={"deterministic": True}) as running:
        yield running


@pytest.fixture(scope="session")
def rendered(checkpoint: Path) -> str:
    """PROMPT and COMPLETION in the chat template of the checkpoint, with its BOS."""
    from transformers import AutoTokenizer

    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": COMPLETION}]
    return str(AutoTokenizer.from_pretrained(checkpoint).apply_chat_template(turns, tokenize=False))
