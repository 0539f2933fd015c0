"""The shell and Python blocks of the quickstart and of the how-to pages run, and print what the pages say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from documented_blocks import DOCS, STARTS_A_SERVER, TESTED, check_output, read_blocks, run_block, write_commands
from serving import RunningServer, serving
from tiny_calibration import write_calibrated_checkpoint, write_pairs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl"),
]

OF_A_MODEL = ("batch-scoring.md", "how-to/serve-a-checkpoint.md")
"""Pages with commands that load a model in a process of their own, which takes many seconds."""


def _page(path: Path) -> object:
    name = path.relative_to(DOCS).as_posix()
    return pytest.param(path, id=name, marks=[pytest.mark.soak] if name in OF_A_MODEL else [])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated tiny checkpoint."""
    return write_calibrated_checkpoint(tmp_path_factory.mktemp("model") / "my-reward-model")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The server that all pages talk to; it has the name of the demo model, which the quickstart starts."""
    options = ("--model", str(model), "--name", "demo", "--device", "cpu", "--num-threads", "1")
    with serving(tmp_path_factory.mktemp("server"), *options, runtime="local") as started:
        yield started


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_commands(tmp_path_factory.mktemp("commands") / "bin")


@pytest.fixture
def world(model: Path, tmp_path: Path) -> Path:
    """The folder of a reader: the checkpoint and the data files that the pages name."""
    shutil.copytree(model, tmp_path / "my-reward-model")
    write_pairs(tmp_path / "pairs.jsonl", 60, seed=1)
    write_pairs(tmp_path / "heldout-pairs.jsonl", 40, seed=2)
    rows = [
        {"prompt": f"What is {number} plus three?", "completion": "It is so." + " Sure." * copy}
        for number in range(20)
        for copy in range(4)
    ]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("page", [_page(path) for path in TESTED])
def test_the_blocks_of_a_page_run(page: Path, server: RunningServer, commands: Path, world: Path) -> None:
    """Each block ends with status 0 and prints what the page says; a start prints what the server of the test did."""
    address = server.url.removeprefix("http://")
    for block in read_blocks(page):
        if block.title is not None:
            (world / block.title).write_text(block.text)
        elif block.is_run:
            printed = run_block(block, world, commands, address)
            if block.output is not None:
                check_output(block, printed, address)
        elif block.marker == STARTS_A_SERVER and block.output is not None:
            check_output(block, server.messages.read_text(), address)
