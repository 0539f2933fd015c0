"""The same application started by Ray's own command, behind Ray's Python proxy instead of HAProxy."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx2
import pytest
import yaml
from ray_cluster import descendants, end
from ray_serve_command import ROOT, documented_environment
from serving import answers_ready, eventually, free_port

from service.engines.oracle import oracle_reward_of_text

pytestmark = pytest.mark.slow


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
            family = descendants(process)
            process.send_signal(signal.SIGINT)
            end(process, family, 30)

    assert answer.json()["results"][0]["reward"] == oracle_reward_of_text("a", "b")
    assert len(answer.headers.get_list("X-Request-Id")) == 1
    assert (refusal.status_code, refusal.json()["code"]) == (400, "malformed_body")
    assert "rm_metrics_scrape_incomplete 0.0" in exposition
