"""Peers run in environments of their own, give the rewards of transformers, and fail with one sentence."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from export.onnx.bundle_export import ExportPlan, export_bundle
from loadtest.compare import main
from loadtest.generator import send_all
from loadtest.peer_servers.item_batcher import MAX_BATCH_ITEMS
from loadtest.peer_servers.padded_texts import PaddedTexts
from loadtest.peers import PEERS, peer_versions
from loadtest.random_checkpoint import ModelShape, write_random_checkpoint
from loadtest.servers import PEER_SERVERS, running_graph_server, running_litserve
from loadtest.workload import LengthDistribution, cut_into_requests, draw_groups
from service.errors import ServerStartError

SHORT = LengthDistribution(median=12, sigma=0.8, longest=60)
TINY = ModelShape(vocabulary=1024, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2, positions=256)
GROUPS = draw_groups(5, 4, seed=1, prompts=SHORT, completions=SHORT)
OWN_ENVIRONMENT = [peer.name for peer in PEERS.values() if peer.has_own_environment]
PYTHON = Path(sys.executable)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("tiny"), TINY, dtype="float32")


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[float]:
    """The rewards of transformers, one item at a time."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1, dtype=torch.float32).eval()
    texts = [item["prompt"] + item["completion"] for group in GROUPS for item in group.items]
    with torch.inference_mode():
        return [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]


def test_onnxruntime_gives_the_rewards_of_plain_transformers(
    checkpoint: Path, alone: list[float], tmp_path: Path
) -> None:
    """The peer, started as the command starts it, gives each item the same reward singly and in bulk."""
    export_bundle(str(checkpoint), tmp_path / "bundle", ExportPlan(taps=()))

    with running_graph_server("onnxruntime", PYTHON, tmp_path / "bundle", "float32", tmp_path) as server:
        singly, bulk = (
            send_all(server.url, [server.wire.body(one) for one in cut_into_requests(GROUPS, size)], 8, server.wire)
            for size in (1, len(alone))
        )

    assert singly.rewards == pytest.approx(alone, abs=1e-5)
    assert bulk.rewards == pytest.approx(alone, abs=1e-5)


def test_the_head_reads_the_last_token_that_is_no_padding(checkpoint: Path) -> None:
    """Texts of different lengths in one batch are read at their own ends."""
    texts = PaddedTexts(checkpoint)

    ids, mask = texts.batch([{"prompt": "the of and", "completion": " to in"}, {"prompt": "the", "completion": " of"}])

    assert texts.last_positions(ids).tolist() == (mask.sum(axis=1) - 1).tolist() == [4, 1]
    assert ids.dtype == mask.dtype == np.int64


def test_servers_of_peers_import_nothing_of_ours() -> None:
    """Their modules run where only the peer's packages are installed."""
    folder = Path(str(importlib.import_module(f"loadtest.{PEER_SERVERS}").__file__)).parent
    ours = {"service", "export", "training", "scoring", "monitoring", "reward_client"}

    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.partition(".")[0] not in ours, file
                assert not name.startswith("loadtest") or name.startswith(f"loadtest.{PEER_SERVERS}."), file


@pytest.fixture
def litserve_server(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the LitServe peer, on a double of the class that LitServe calls."""

    class LitAPI:
        def __init__(self, max_batch_size: int, batch_timeout: float) -> None:
            self.max_batch_size = max_batch_size

    monkeypatch.setitem(sys.modules, "litserve", SimpleNamespace(LitAPI=LitAPI))
    monkeypatch.delitem(sys.modules, "loadtest.peer_servers.litserve_server", raising=False)
    return importlib.import_module("loadtest.peer_servers.litserve_server")


def test_litserve_keeps_the_rewards_of_requests_apart(
    litserve_server: Any, checkpoint: Path, alone: list[float]
) -> None:
    """Requests of different sizes share forward passes, and each gets the rewards of its own items."""
    items = [item for group in GROUPS for item in group.items]
    api = litserve_server.RewardApi(checkpoint, "float32")
    api.setup("cpu")
    requests = [{"items": items[:1]}, {"items": items[1:18]}, {"items": items[18:]}]

    outputs = api.unbatch(api.predict(api.batch([api.decode_request(one) for one in requests])))

    answers = [api.encode_response(one)["rewards"] for one in outputs]
    assert [len(one) for one in answers] == [1, 17, 2]
    assert [reward for one in answers for reward in one] == pytest.approx(alone, abs=1e-5)
    assert api.max_batch_size == MAX_BATCH_ITEMS


def test_versions_are_those_of_the_peers_environment() -> None:
    """The packages that are installed are recorded, and no others."""
    versions = peer_versions(PEERS["onnxruntime"], PYTHON)

    assert versions.keys() & {"onnxruntime", "onnxruntime-gpu"}
    assert {"transformers", "starlette", "uvicorn"} < versions.keys()


def test_a_peer_that_is_not_installed_is_named_with_its_packages(tmp_path: Path) -> None:
    """The sentence says what to install, before a model is written or a server started."""
    with pytest.raises(ServerStartError, match=r"litserve is not installed .* pip install torch=="):
        peer_versions(PEERS["litserve"], interpreter(tmp_path, versions={"torch": "2.13.0"}))


def test_a_program_that_is_no_interpreter_is_refused(tmp_path: Path) -> None:
    """A program that fails where an interpreter prints versions ends the command in one sentence."""
    with pytest.raises(ServerStartError, match="does not run as a Python interpreter"):
        peer_versions(PEERS["litserve"], program(tmp_path / "python", "exit 3"))


def test_a_peer_that_ends_early_shows_the_end_of_its_log(tmp_path: Path) -> None:
    """The error has the status and the last lines that the server wrote."""
    python = interpreter(tmp_path, versions={}, start="echo no model here; exit 3")

    with (
        pytest.raises(ServerStartError, match=r"litserve server ended with status 3\. [\s\S]*no model here"),
        running_litserve(python, tmp_path, "float32", tmp_path),
    ):
        pass


def test_a_peer_that_is_never_ready_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is removed with the folder of the run, so the error repeats its end."""
    monkeypatch.setattr("loadtest.servers.READY_WITHIN_S", 1.0)
    python = interpreter(tmp_path, versions={}, start="echo still loading; exec sleep 60")

    with (
        pytest.raises(ServerStartError, match=r"was not ready within 1 s\. [\s\S]*still loading"),
        running_litserve(python, tmp_path, "float32", tmp_path),
    ):
        pass


def test_processes_that_a_peer_leaves_behind_are_ended(tmp_path: Path) -> None:
    """LitServe's workers outlive the process that started them; after the run none uses a core."""
    left = tmp_path / "left"
    server = f"{sys.executable} -m http.server --bind 127.0.0.1"
    ready = f"cd {tmp_path}; echo ok > health; sleep 60 & echo $! > {left}; shift 6; exec {server} $2"
    python = interpreter(tmp_path, versions={}, start=ready)

    with running_litserve(python, tmp_path, "float32", tmp_path):
        worker = int(left.read_text())
        assert psutil.pid_exists(worker)

    psutil.wait_procs([psutil.Process(worker)] if psutil.pid_exists(worker) else [], timeout=5)
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE


def test_the_command_ends_with_the_error_of_a_peer_and_no_traceback(checkpoint: Path, tmp_path: Path) -> None:
    """The whole command prints the typed error with the end of the peer's log, and its status is 1."""
    python = interpreter(tmp_path, versions={"optimum-intel": "1"}, start="echo libraries are missing; exit 4")
    command = [sys.executable, "-m", "loadtest.compare", "--model", str(checkpoint), "--peer", "openvino"]

    done = subprocess.run([*command, "--peer-python", str(python)], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "ServerStartError: The openvino server ended with status 4." in done.stdout
    assert "libraries are missing" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("peer", OWN_ENVIRONMENT)
def test_an_environment_of_its_own_needs_an_interpreter(peer: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it the command ends before anything is started, and says what the environment needs."""
    with pytest.raises(SystemExit) as ended:
        main(["--peer", peer])

    assert ended.value.code == 2
    assert PEERS[peer].install in capsys.readouterr().err


def test_the_plain_server_takes_no_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    """An interpreter that would be ignored is refused."""
    with pytest.raises(SystemExit) as ended:
        main(["--peer-python", sys.executable])

    assert ended.value.code == 2
    assert "leave out --peer-python" in capsys.readouterr().err


def interpreter(folder: Path, *, versions: dict[str, str], start: str = "exit 1") -> Path:
    """Write a stand-in for a peer's interpreter, which prints these versions and starts no server but these words."""
    words = f"""if [ "$1" = -c ]; then echo '{json.dumps(versions)}'; exit; fi\n{start}"""
    return program(folder / "python", words)


def program(path: Path, words: str) -> Path:
    path.write_text(f"#!/bin/sh\n{words}\n")
    path.chmod(0o755)
    return path
