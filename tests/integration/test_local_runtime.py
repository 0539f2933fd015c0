"""The local runtime: one process without Ray, from its first moment to its last."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import faulty_server
import httpx2
import psutil
import pytest
import torch
from reward_client import RewardClient
from reward_client.errors import RequestRejected
from serving import RunningServer, eventually, listening_ports, serving, started, stop
from tiny_models import write_tiny_checkpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from service.engines.oracle import oracle_reward_of_text

ORACLE = ("--engine", "oracle")
TRIGGER = "\x01"
"""A text that triggers the fault of a faulty server."""


def faulty(fault: str) -> tuple[str, ...]:
    """The command of a server whose engine has a fault: ``dies``, or a number of seconds that a pass takes."""
    return (sys.executable, str(Path(faulty_server.__file__)), fault)


def score(url: str, text: str) -> httpx2.Response:
    return httpx2.post(f"{url}/v1/score", json={"items": [{"text": text}]}, timeout=60)


def test_one_process_with_one_port_and_without_ray(local_server: RunningServer) -> None:
    """The server is one process that listens on one port, and has loaded neither Ray nor torch for the oracle."""
    process = psutil.Process(local_server.process.pid)
    libraries = {Path(region.path).name for region in process.memory_maps()}

    assert local_server.descendants() == []
    assert len(listening_ports([process])) == 1
    assert [name for name in libraries if name.startswith("_multiarray_umath")]
    assert not [name for name in libraries if name.startswith(("_raylet", "libtorch"))]


def test_answers_while_the_model_loads(tmp_path: Path) -> None:
    """While the model loads the process is alive and not ready; a stop ends it at once with the signal's status."""
    with started(tmp_path, "--model", str(write_tiny_checkpoint(tmp_path / "model")), runtime="local") as server:
        assert eventually(lambda: answers(server), 30.0)
        live = httpx2.get(f"{server.url}/livez", timeout=30)
        ready = httpx2.get(f"{server.url}/readyz", headers={"X-Request-Id": "early"}, timeout=30)
        scored = score(server.url, "a")
        unknown = httpx2.get(f"{server.url}/nothing", timeout=30)
        begin = time.monotonic()
        status = stop(server.process)
        elapsed_s = time.monotonic() - begin

    assert live.status_code == 200
    for refusal in (ready, scored):
        assert (refusal.status_code, refusal.json()["code"]) == (503, "not_ready")
        assert refusal.headers["Content-Type"] == "application/problem+json"
        assert int(refusal.headers["Retry-After"]) >= 1
        assert refusal.headers["X-Request-Id"] == refusal.json()["instance"].removeprefix("urn:request:")
    assert ready.headers["X-Request-Id"] == "early"
    assert unknown.status_code == 404
    assert status == 128 + signal.SIGTERM
    assert elapsed_s < 5.0
    assert server.messages.read_text().splitlines() == [
        "Checking the checkpoint ...",
        "Stopping the start ...",
        "reward-serve: Stopped before the service was ready.",
    ]


def answers(server: RunningServer) -> bool:
    try:
        return httpx2.get(f"{server.url}/livez", timeout=30).status_code == 200
    except httpx2.ConnectError:
        return False


def test_dead_engine_ends_the_process(tmp_path: Path) -> None:
    """When the engine dies its request gets 503, /livez fails, and the process ends with status 1 and one sentence."""
    with serving(tmp_path, *ORACLE, runtime="local", command=faulty("dies")) as server:
        assert score(server.url, "a").json()["results"][0]["reward"] == oracle_reward_of_text("", "a")
        failed = score(server.url, TRIGGER)
        assert not answers_alive(server.url)
        status = server.process.wait(15)

    assert (failed.status_code, failed.json()["code"]) == (503, "engine_unavailable")
    assert status == 1
    assert server.messages.read_text().splitlines()[-1] == "reward-serve: The engine thread has died."


def answers_alive(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/livez", timeout=30).status_code == 200
    except httpx2.HTTPError:
        return False


def test_second_signal_ends_the_drain(tmp_path: Path) -> None:
    """A second signal ends the wait for a pass: its request gets 503 draining, and the status is 0."""
    with serving(tmp_path, *ORACLE, runtime="local", command=faulty("30")) as server, ThreadPoolExecutor(1) as pool:
        answer = begin_pass(server, pool)
        server.process.send_signal(signal.SIGINT)
        assert eventually(lambda: "Stopping" in server.messages.read_text(), 5.0)
        begin = time.monotonic()
        status = stop(server.process, signal.SIGINT)
        elapsed_s = time.monotonic() - begin

    assert (answer.result().status_code, answer.result().json()["code"]) == (503, "draining")
    assert status == 0
    assert elapsed_s < 4.0


@pytest.mark.slow
def test_pass_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    """After the drain a pass that hangs is abandoned: its request gets 503 draining, and the status is 0."""
    with serving(tmp_path, *ORACLE, runtime="local", command=faulty("300")) as server, ThreadPoolExecutor(1) as pool:
        answer = begin_pass(server, pool)
        begin = time.monotonic()
        status = stop(server.process)
        elapsed_s = time.monotonic() - begin

    assert answer.result().json()["code"] == "draining"
    assert status == 0
    assert elapsed_s < 15.0


def begin_pass(server: RunningServer, pool: ThreadPoolExecutor) -> Future[httpx2.Response]:
    """Send the text whose pass takes long, and return once the pass runs."""
    answer = pool.submit(score, server.url, TRIGGER)

    def is_in_flight() -> bool:
        metrics = httpx2.get(f"{server.url}/metrics", timeout=30).text
        return 'rm_inflight_items{replica="local"} 1.0' in metrics

    assert eventually(is_in_flight, 10.0)
    return answer


def test_api_keys_of_a_real_server(tmp_path: Path) -> None:
    """A server with keys scores for the client that has one, and for no other; without keys it stays on loopback."""
    keys = tmp_path / "keys.yaml"
    command = "from service.commands import reward_key; raise SystemExit(reward_key())"
    make = [sys.executable, "-c", command, "trainer", "--file", str(keys)]
    key = subprocess.run(make, check=True, capture_output=True, text=True).stdout.strip()
    with serving(tmp_path, "--engine", "oracle", "--api-keys", str(keys), runtime="local") as server:
        with RewardClient(server.url, api_key=key) as client:
            assert client.score(["2+2?"], ["4"]) == [oracle_reward_of_text("2+2?", "4")]
        with RewardClient(server.url, api_key="wrong") as client, pytest.raises(RequestRejected) as refusal:
            client.score(["2+2?"], ["4"])
    assert refusal.value.status == 401
    assert key not in server.output.read_text() + server.messages.read_text() + keys.read_text()
    with started(tmp_path, "--engine", "oracle", "--host", "0.0.0.0", runtime="local") as server:  # noqa: S104
        assert server.process.wait(20) == 1
    assert "there are no API keys" in server.messages.read_text()


@pytest.mark.slow
def test_rewards_of_a_checkpoint(tmp_path: Path, record_testsuite_property: Callable[[str, object], None]) -> None:
    """The rewards are those of plain transformers; the seconds of the start are recorded beside the result."""
    folder = write_tiny_checkpoint(tmp_path / "model")
    texts = ["one", "a longer text than the first", "and a third"]
    begin = time.monotonic()
    with serving(tmp_path, "--model", str(folder), "--dtype", "float32", runtime="local") as server:
        record_testsuite_property("local_start_ready_s", round(time.monotonic() - begin, 2))
        record_testsuite_property(
            "local_start_cpu_s", round(sum(psutil.Process(server.process.pid).cpu_times()[:2]), 2)
        )
        answer = httpx2.post(f"{server.url}/v1/score", json={"items": [{"text": text} for text in texts]}, timeout=60)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    assert [result["reward"] for result in answer.json()["results"]] == pytest.approx(expected, abs=1e-5)
    assert server.messages.read_text().startswith("Checking the checkpoint ...\nLoading the model and warming up ...\n")
