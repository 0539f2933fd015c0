"""The servers of all conformance tests: a tiny model with a BOS token in float32, and the demo model.

The demo model is served in bfloat16, where a reward on a CPU is bit-identical in every batch, so a client has to end
with exactly the number of ``/v1/score``. In float32 rewards of one text may differ by a rounding error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from reward_client import RewardClient
from serving import RunningServer, serving
from tiny_models import write_tiny_checkpoint
from transformers import AutoTokenizer

from service.checkpoints.demo import obtain_demo_model
from service.errors import StartupError

START_TIMEOUT_S = 600.0
"""The check of the demo model's rewards at its start takes a minute of one core."""

Same = Callable[[Sequence[float]], Any]
"""What equals rewards that are as close to the given ones as the served model allows."""


@dataclass(frozen=True)
class Served:
    """A model and how it is served."""

    checkpoint: Path
    options: tuple[str, ...]
    tolerance: float
    """Largest difference between two rewards of one text; 0: they are equal bit for bit."""


@pytest.fixture(scope="session", params=["tiny", pytest.param("demo", marks=pytest.mark.soak)])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """One of the two models."""
    if request.param == "tiny":
        folder = write_tiny_checkpoint(tmp_path_factory.mktemp("conformance") / "tiny", "llama")
        return Served(folder, ("--dtype", "float32", "--num-threads", "1"), 1e-5)
    try:
        folder = obtain_demo_model()
    except StartupError as error:
        pytest.skip(f"The demo model could not be obtained: {error}")
    return Served(folder, ("--dtype", "bfloat16", "--num-threads", "1"), 0.0)


@pytest.fixture(scope="session")
def checkpoint(served: Served) -> Path:
    """The served checkpoint; its tokenizer is also that of the actors."""
    return served.checkpoint


@pytest.fixture(scope="session")
def same(served: Served) -> Same:
    """Compares rewards of the clients to those of ``/v1/score``."""
    return lambda rewards: pytest.approx(rewards, rel=0, abs=served.tolerance)


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def server(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """``reward-serve`` with the model, ready."""
    folder = tmp_path_factory.mktemp("conformance-server")
    options = ("--model", str(served.checkpoint), *served.options)
    with serving(folder, *options, timeout_s=START_TIMEOUT_S) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[RewardClient]:
    """The reference: what ``/v1/score`` answers."""
    with RewardClient(server.url, deadline_s=60) as opened:
        yield opened
