"""Start and stop of the real server: no accepted request is lost, and no process or port is left behind."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import psutil
import pytest
from serving import RUNTIMES, RunningServer, alive, eventually, listening_ports, open_ports, serving, started, stop
from tiny_models import write_tiny_checkpoint

from service.engines.oracle import oracle_reward_of_text

STOP_WITHIN_S = 15.0
ORACLE = ("--engine", "oracle")


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["SIGTERM", "SIGINT"]
)
def test_stop_answers_accepted_requests_and_leaves_nothing(
    tmp_path: Path, number: signal.Signals, runtime: str
) -> None:
    """Under load the signal stops everything within 15 s: complete answers or 503 draining, exit status 0."""
    with serving(tmp_path, *ORACLE, runtime=runtime) as server, ThreadPoolExecutor(8) as pool:
        processes = server.descendants()
        folder = server.folder() if runtime == "ray" else None
        ports = listening_ports([psutil.Process(server.process.pid), *processes])
        answers = [pool.submit(send_large_request, server.url) for _ in range(8)]
        assert eventually(lambda: is_working(server), 20.0)
        begin = time.monotonic()
        status = stop(server.process, number)
        elapsed_s = time.monotonic() - begin
        outcomes = [answer.result() for answer in answers]

    assert status == 0
    assert elapsed_s < STOP_WITHIN_S
    assert alive(processes) == []
    assert ports
    assert open_ports(ports) == set()
    assert folder is None or not folder.exists()
    assert "scored" in outcomes
    assert set(outcomes) <= {"scored", "draining"}
    assert server.output.read_text().count('"event": "scored"') == outcomes.count("scored")


def is_working(server: RunningServer) -> bool:
    return '"event": "scored"' in server.output.read_text() or any(
        line.startswith("rm_inflight_items{") and float(line.split()[-1]) > 0
        for line in httpx2.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    )


def send_large_request(url: str) -> str:
    """Send one request of 512 items and return its outcome; every reward is checked."""
    items = [{"prompt": f"{n} ", "completion": "word " * 100} for n in range(512)]
    answer = httpx2.post(f"{url}/v1/score", json={"items": items}, timeout=60)
    if answer.status_code == 503:
        return str(answer.json()["code"])
    assert answer.status_code == 200, answer.text
    rewards = [result["reward"] for result in answer.json()["results"]]
    assert rewards == [oracle_reward_of_text(item["prompt"], item["completion"]) for item in items]
    return "scored"


NUM_QUEUED, QUEUED_TOKENS = 48, 1000
SECONDS_PER_TOKEN = 2.5e-4
"""The queue takes twice as long as the drain."""
SLOW_ORACLE = f"""
from functools import partial
from service import assembly
from service.engines.oracle import OracleFaults
assembly.assemble_oracle = partial(
    assembly.assemble_oracle, faults=OracleFaults(seconds_per_token={SECONDS_PER_TOKEN})
)
from service.launch.command import main
raise SystemExit(main())
"""


@pytest.mark.slow
def test_stop_with_a_long_queue(tmp_path: Path) -> None:
    """With twice the work that the drain has time for, whole requests are finished, and the others get 503 draining."""

    def send(number: int) -> str:
        items = [{"prompt": f"{number:02} {n:02} ", "completion": "x" * 44} for n in range(QUEUED_TOKENS // 50)]
        answer = httpx2.post(f"{server.url}/v1/score", json={"items": items}, timeout=60)
        if answer.status_code == 200:
            rewards = [result["reward"] for result in answer.json()["results"]]
            assert rewards == [oracle_reward_of_text(item["prompt"], item["completion"]) for item in items]
            return "scored"
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        return str(answer.json()["code"])

    command = (sys.executable, "-c", SLOW_ORACLE)
    options = (*ORACLE, "--max-batch-tokens", str(QUEUED_TOKENS // 4))
    with (
        serving(tmp_path, *options, runtime="local", command=command) as server,
        ThreadPoolExecutor(NUM_QUEUED) as pool,
    ):
        answers = [pool.submit(send, number) for number in range(NUM_QUEUED)]
        assert eventually(lambda: num_in_flight(server) > 0.8 * NUM_QUEUED * QUEUED_TOKENS / 50, 5.0)
        status = stop(server.process)
        outcomes = [answer.result() for answer in answers]

    assert status == 0
    assert set(outcomes) == {"scored", "draining"}
    assert outcomes.count("scored") >= NUM_QUEUED // 4


def num_in_flight(server: RunningServer) -> float:
    """How many items have been accepted and are not answered."""
    lines = httpx2.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    return float(next(line for line in lines if line.startswith("rm_inflight_items{")).split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "number"), [("Starting Ray ...", signal.SIGTERM), ("Loading the model", signal.SIGINT)]
)
def test_stop_during_the_start(tmp_path: Path, stage: str, number: signal.Signals) -> None:
    """A server that is stopped while it starts ends at once, with the signal's status, and leaves nothing."""
    with started(tmp_path, *ORACLE) as server:
        assert eventually(lambda: stage in server.messages.read_text(), 60.0)
        time.sleep(1.5)
        processes = server.descendants()
        ports = listening_ports(processes)
        status = stop(server.process, number)

    assert status == 128 + number
    assert processes
    assert alive(processes) == []
    assert open_ports(ports) == set()
    assert server.messages.read_text().splitlines()[-2:] == [
        "Stopping the start ...",
        "reward-serve: Stopped before the service was ready.",
    ]


@pytest.mark.slow
def test_stop_while_the_checkpoint_is_checked(tmp_path: Path) -> None:
    """A server that is stopped while its checkpoint is checked ends at once and prints no more."""
    with started(tmp_path, "--model", str(write_tiny_checkpoint(tmp_path / "model"))) as server:
        assert eventually(lambda: "Checking" in server.messages.read_text(), 20.0)
        time.sleep(0.5)
        processes = server.descendants()
        status = stop(server.process)

    assert status == 128 + signal.SIGTERM
    assert processes
    assert alive(processes) == []
    assert server.messages.read_text() == (
        "Checking the checkpoint ...\nreward-serve: Stopped before the service was ready.\n"
    )


@pytest.mark.slow
def test_replica_that_cannot_start(tmp_path: Path) -> None:
    """When a replica fails to start, the command prints its reason in one sentence and saves the logs."""
    folder = tmp_path / "removed"
    folder.mkdir()
    with started(tmp_path, *ORACLE, "--log", str(folder / "log")) as server:
        assert eventually(lambda: "Starting Ray ..." in server.messages.read_text(), 30.0)
        shutil.rmtree(folder)
        status = server.process.wait(90)

    last_line = server.messages.read_text().splitlines()[-1]
    assert status == 1
    assert "reward-serve: FileNotFoundError: " in last_line
    assert Path(last_line.partition("The log is ")[2].rstrip(".")).is_file()


@pytest.mark.slow
def test_crash_of_ray_ends_the_command(tmp_path: Path) -> None:
    """When Ray's driver dies, the command says so, kills the other processes, saves the logs and exits with 1."""
    with serving(tmp_path, *ORACLE) as server:
        processes, folder = server.descendants(), server.folder()
        ports = listening_ports(processes)
        server.ray_driver().kill()
        status = server.process.wait(STOP_WITHIN_S)

    assert status == 1
    assert alive(processes) == []
    assert open_ports(ports) == set()
    assert not folder.exists()
    last_line = server.messages.read_text().splitlines()[-1]
    assert "was killed by SIGKILL" in last_line
    assert Path(last_line.partition("The log is ")[2].rstrip(".")).is_file()


@pytest.mark.slow
def test_loss_of_the_cluster_state_ends_the_command(tmp_path: Path) -> None:
    """When the process of Ray's cluster state dies, the command ends in seconds with a sentence, and leaves nothing."""
    with serving(tmp_path, *ORACLE) as server:
        processes = server.descendants()
        assert {"gcs_server", "raylet"} <= {process.name() for process in processes}
        next(process for process in processes if process.name() == "gcs_server").kill()
        status = server.process.wait(5)

    assert status == 1
    assert alive(processes) == []
    assert "Ray's process gcs_server has ended" in server.messages.read_text().splitlines()[-1]


@pytest.mark.slow
def test_killed_command_ends_ray(tmp_path: Path) -> None:
    """When the start command is killed, the Ray driver sees the end of its pipe and shuts down in order."""
    with serving(tmp_path, *ORACLE) as server:
        processes, folder = server.descendants(), server.folder()
        server.process.kill()
        server.process.wait()

        assert eventually(lambda: not alive(processes), 30.0)
    shutil.rmtree(folder)


@pytest.mark.slow
def test_two_servers_side_by_side(server_url: str, tmp_path: Path) -> None:
    """A second server on the same machine chooses other ports; one scrape shows all its replicas."""
    with serving(tmp_path, *ORACLE, "--replicas", "2") as second:
        for url in (server_url, second.url):
            answer = httpx2.post(f"{url}/v1/score", json={"items": [{"prompt": "a", "completion": "b"}]})
            assert answer.json()["results"][0]["reward"] == oracle_reward_of_text("a", "b")
        exposition = httpx2.get(f"{second.url}/metrics").text

    ready = [line for line in exposition.splitlines() if line.startswith("rm_ready{")]
    assert len({line.partition('replica="')[2].partition('"')[0] for line in ready}) == 2
    assert "rm_metrics_scrape_incomplete 0.0" in exposition


STAGES = {
    "ray": [
        "Starting Ray ...",
        "Starting Ray Serve ...",
        "Loading the model and warming up ...",
        "Waiting for the first answer through HAProxy ...",
    ],
    "local": ["Loading the model and warming up ..."],
}


SUMMARY = "oracle, version oracle: engine oracle, packed on cpu, float32."


def test_messages_of_a_start(oracle_server: RunningServer) -> None:
    """Without a terminal the start prints a few plain lines and a command to paste; Ray and uvicorn print nothing."""
    lines = oracle_server.messages.read_text().splitlines()
    httpx2.post(f"{oracle_server.url}/v1/score", json={"items": [{"text": "a"}]}, headers={"X-Request-Id": "messages"})

    assert eventually(lambda: '"messages"' in oracle_server.output.read_text(), 5.0)
    logged = [json.loads(line) for line in oracle_server.output.read_text().splitlines()]
    stages = STAGES[oracle_server.runtime]
    assert lines[: len(stages)] == stages
    assert lines[len(stages)].startswith("Ready in ")
    assert lines[len(stages)].endswith(f"s: {oracle_server.url} serves {SUMMARY}")
    assert lines[len(stages) + 2].startswith("curl ")
    assert len(lines) == len(stages) + 6
    assert [line["event"] for line in logged if line["request_id"] == "messages"] == ["scored"]


@pytest.mark.slow
def test_start_behind_a_proxy_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that name a proxy for HTTP, here one that does not exist, keep no server from becoming ready."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(tmp_path, *ORACLE, "--replicas", "2") as server:

        def is_complete() -> bool:
            exposition = httpx2.get(f"{server.url}/metrics", trust_env=False, timeout=10).text
            return "rm_metrics_scrape_incomplete 0.0" in exposition

        assert eventually(is_complete, 20.0)
