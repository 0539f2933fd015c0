"""The same application started by Ray's own command, behind Ray's Python proxy instead of HAProxy."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx2
import psutil
import pytest
import yaml
from serving import answers_ready, eventually, free_port

from service.engines.oracle import oracle_reward_of_text

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def documented_environment(*, ha_proxy: bool, folder: str) -> dict[str, str]:
    """The environment of docs/serve.env, with ports and folders of its own."""
    lines = (ROOT / "docs" / "serve.env").read_text().splitlines()
    documented = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    own = {
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(ha_proxy)),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": folder,
        "AUTOSCALER_METRIC_PORT": str(free_port()),
        "DASHBOARD_METRIC_PORT": str(free_port()),
    }
    return {**os.environ, **documented, **own}


def test_serve_run_behind_the_python_proxy(tmp_path: Path) -> None:
    """``serve run serve_config.yaml`` serves the application, also without HAProxy."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"]["port"] = port = free_port()
    config["applications"][0]["args"] = {"model": {"engine": "oracle"}, "log": str(tmp_path / "requests.jsonl")}
    file = tmp_path / "serve_config.yaml"
    file.write_text(yaml.safe_dump(config))
    messages = tmp_path / "messages.txt"
    url = f"http://127.0.0.1:{port}"
    # Ray's Unix sockets need a short path, shorter than pytest's.
    with (
        tempfile.TemporaryDirectory(prefix="rs-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        messages.open("wb") as out,
    ):
        process = subprocess.Popen(
            [Path(sys.executable).parent / "serve", "run", str(file)],
            stdout=out,
            stderr=out,
            env=documented_environment(ha_proxy=False, folder=folder),
        )
        try:
            assert eventually(lambda: process.poll() is not None or answers_ready(url), 120), messages.read_text()
            assert process.poll() is None, messages.read_text()
            answer = httpx2.post(f"{url}/v1/score", json={"items": [{"prompt": "a", "completion": "b"}]})
            refusal = httpx2.post(f"{url}/v1/score", content=b"{")
            exposition = httpx2.get(f"{url}/metrics").text
        finally:
            family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGINT)
            end(process, family)

    assert answer.json()["results"][0]["reward"] == oracle_reward_of_text("a", "b")
    assert len(answer.headers.get_list("X-Request-Id")) == 1
    assert (refusal.status_code, refusal.json()["code"]) == (400, "malformed_body")
    assert "rm_metrics_scrape_incomplete 0.0" in exposition


def end(process: subprocess.Popen[bytes], family: list[psutil.Process]) -> None:
    """Wait for Ray's command to end, and kill the processes that it leaves, which unlike reward-serve it may do."""
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for relative in family:
        try:
            relative.kill()
        except psutil.NoSuchProcess:
            continue
