"""Applications that the tests of the protocols send requests to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from http_application import Application, application
from scored_texts import COMPLETION, PROMPT
from tiny_calibration import write_calibrated_checkpoint
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


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def model(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> AsyncIterator[Application]:
    """The checkpoint, served to all tests in the event loop of the session, in which they have to run."""
    settings = {"path": str(checkpoint), "name": "tiny", "num_threads": 1, "kernels": "off"}
    folder = tmp_path_factory.mktemp("served")
    async with application(folder, model=settings, batching={"deterministic": True}) as running:
        yield running


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def calibrated_model(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Application]:
    """A tiny model with a calibration, served as ``model`` is."""
    folder = tmp_path_factory.mktemp("calibrated")
    settings = {"path": str(write_calibrated_checkpoint(folder)), "num_threads": 1, "kernels": "off"}
    async with application(folder, model=settings) as running:
        yield running


@pytest.fixture(scope="session")
def rendered(checkpoint: Path) -> str:
    """PROMPT and COMPLETION in the chat template of the checkpoint, with its BOS."""
    from transformers import AutoTokenizer

    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": COMPLETION}]
    return str(AutoTokenizer.from_pretrained(checkpoint).apply_chat_template(turns, tokenize=False))
