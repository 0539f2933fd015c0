"""Starts the simulated application.

Any number of replicas behind HAProxy, by Ray's own command ``serve run``; or one replica, by the local runtime.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

import psutil
import yaml

from loadtest.servers import cpu_s_by_process
from service.errors import ServerStartError
from service.launch.ports import reserved_block
from service.launch.private_folder import private_folder, write_token
from service.launch.ray_environment import direct_loopback, ray_environment

Runtime: TypeAlias = Literal["ray", "local"]
APPLICATION = "loadtest.simulated_app:build_app"
LOCAL_COMMAND = "loadtest.simulated_local"
READY_WITHIN_S = 600.0
STOP_WITHIN_S = 20.0
NOT_FOR_SERVE_RUN = (
    "REPORTER_UPDATE_INTERVAL_MS",
    "AUTOSCALER_UPDATE_INTERVAL_S",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD",
    "LOG_NAME_UPDATE_INTERVAL_S",
)
"""Variables of `ray_environment` that ``serve run`` needs as they are by default (docs/operations.md)."""
LOG = "serve.log"
DEPLOY_FAILED = "Deploying app 'reward' failed"
"""What Ray's controller writes where it refuses an application; ``serve run`` then waits for a better one."""
_DASHBOARD = re.compile(r"dashboard at \S*?(\d+\.\d+\.\d+\.\d+:\d+)")
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


PARTS = {
    "replica": ("ServeReplica", LOCAL_COMMAND),
    "proxy": ("/haproxy -",),  # and not the process that watches it
    "controller": ("ServeController",),
    "raylet": ("raylet/raylet ",),
}
"""What the command line of a process contains, by the part of the server that it is."""


@dataclass(frozen=True, slots=True)
class Simulation:
    """What is simulated.

    Args:
        replicas: their number.
        seconds_per_token: duration of a forward pass per token.
        max_batch_tokens: of a forward pass.
        oracle: further arguments of the oracle, as `loadtest.simulated_app` takes them.
        settings: further settings of the service.
    """

    replicas: int
    seconds_per_token: float
    max_batch_tokens: int
    oracle: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def serve_config(port: int, simulation: Simulation) -> dict[str, Any]:
    """Return the Serve configuration of a simulation."""
    return {
        "http_options": {"host": "127.0.0.1", "port": port},
        "logging_config": {"enable_access_log": False},
        "applications": [{
            "name": "reward",
            "route_prefix": "/",
            "import_path": APPLICATION,
            "args": {
                "oracle": {"seconds_per_token": simulation.seconds_per_token, **simulation.oracle},
                **_settings(simulation),
            },
            "deployments": [{
                "name": "reward",
                "num_replicas": simulation.replicas,
                # A sleep needs no core; Ray only counts them.
                "ray_actor_options": {"num_cpus": 0.01},
            }],
        }],
    }  # fmt: skip


def _settings(simulation: Simulation) -> dict[str, Any]:
    return {
        "model": {"engine": "oracle"},
        "batching": {"max_batch_tokens": simulation.max_batch_tokens},
        "log": os.devnull,
        **simulation.settings,
    }


class SimulatedServer:
    """A running simulation.

    Args:
        url: of its HTTP interface.
        process: that started it.
        folder: with its configuration, and the output of ``serve run``.
        environment: of all its processes.
    """

    def __init__(self, url: str, process: psutil.Process, folder: Path, environment: Mapping[str, str]) -> None:
        self.url = url
        self._process = process
        self._folder = folder
        self._environment = dict(environment)

    def cpu_s(self) -> Mapping[str, float]:
        """Return the CPU seconds so far by part: ``replicas``, ``proxy`` and ``ray`` (everything else)."""
        spent: defaultdict[str, float] = defaultdict(float)
        for process in (self._process, *self._process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                spent[_part_of(" ".join(process.cmdline()))] += times.user + times.system
        return spent

    def cpu_s_by_process(self) -> dict[int, float]:
        """Return the CPU seconds so far of each living process, by process id."""
        return cpu_s_by_process(self._process)

    def processes(self, part: str) -> list[psutil.Process]:
        """Return the living processes of a part, one of `PARTS`."""
        found = []
        for process in (self._process, *self._process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                command = " ".join(process.cmdline())
                if any(name in command for name in PARTS[part]) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def redeploy(self, simulation: Simulation) -> None:
        """Run ``serve deploy`` with another configuration, whose replicas then replace those that run.

        Raises:
            ServerStartError: the command failed.
        """
        file = self._folder / "redeployed.yaml"
        file.write_text(yaml.safe_dump(serve_config(urlsplit(self.url).port or 0, simulation)), encoding="utf-8")
        command = [_serve_command(), "deploy", "--address", self._dashboard(), str(file)]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode != 0:
            raise ServerStartError(f"serve deploy ended with status {done.returncode}: {done.stderr[-1000:]}")

    def application_state(self) -> str:
        """Return the state of the application as Ray reports it, such as ``RUNNING`` or ``DEPLOY_FAILED``."""
        request = urllib.request.Request(  # noqa: S310 - Ray's own address
            f"{self._dashboard()}/api/serve/applications/",
            headers={"Authorization": f"Bearer {Path(self._environment['RAY_AUTH_TOKEN_PATH']).read_text()}"},
        )
        with _DIRECT.open(request, timeout=30.0) as answer:
            return str(json.loads(answer.read())["applications"]["reward"]["status"])

    def _dashboard(self) -> str:
        """Return the URL of Ray's REST interface.

        Raises:
            ServerStartError: it does not run.
        """
        found = _DASHBOARD.search((self._folder / LOG).read_text(errors="replace"))
        if found is None:
            raise ServerStartError("Ray's REST interface does not run, so nothing can be deployed.")
        return f"http://{found[1]}"


@contextlib.contextmanager
def simulated_server(simulation: Simulation, runtime: Runtime = "ray") -> Iterator[SimulatedServer]:
    """Run a simulation until the block ends.

    Raises:
        ServerStartError: it ended before it was ready, or was not ready in time; or the local runtime is to have
            several replicas.
    """
    if runtime == "local" and simulation.replicas > 1:
        raise ServerStartError("The local runtime has one replica; this needs Ray.")
    with (_with_ray if runtime == "ray" else _without_ray)(simulation) as server:
        yield server


@contextlib.contextmanager
def _without_ray(simulation: Simulation) -> Iterator[SimulatedServer]:
    with private_folder() as folder:
        port = _free_port()
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(_settings(simulation) | {"server": {"port": port}}), encoding="utf-8")
        oracle = json.dumps({"seconds_per_token": simulation.seconds_per_token, **simulation.oracle})
        command = [sys.executable, "-m", LOCAL_COMMAND, oracle, "--config", str(file)]
        with _started(command, dict(os.environ), folder, port, 1) as process:
            yield SimulatedServer(f"http://127.0.0.1:{port}", process, folder, os.environ)


@contextlib.contextmanager
def _with_ray(simulation: Simulation) -> Iterator[SimulatedServer]:
    with private_folder() as folder, reserved_block(port := _free_port(), simulation.replicas) as (ports, owners):
        file = folder / "serve_config.yaml"
        file.write_text(yaml.safe_dump(serve_config(port, simulation)), encoding="utf-8")
        environment = ray_environment(
            folder, ports, write_token(folder), cores=os.cpu_count() or 1, deadline_s=600.0, drain_s=1.0
        )
        environment |= direct_loopback(os.environ) | {"RAY_TMPDIR": str(folder)}
        for name in NOT_FOR_SERVE_RUN:
            environment.pop(name)
        environment = {**os.environ, **environment}
        command = [_serve_command(), "run", str(file)]
        with _started(command, environment, folder, port, simulation.replicas, owners) as process:
            yield SimulatedServer(f"http://127.0.0.1:{port}", process, folder, environment)


@contextlib.contextmanager
def _started(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    port: int,
    replicas: int,
    owners: Sequence[int] = (),
) -> Iterator[psutil.Process]:
    """Run a command until the block ends, which begins when all replicas answer; its output is in the folder."""
    log = folder / LOG
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - a fixed command
            command,
            env=environment,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=owners,
        )
    try:
        _await_all(process, port, replicas, log)
        yield psutil.Process(process.pid)
    finally:
        _stop(process)


def _serve_command() -> str:
    return str(Path(sys.executable).parent / "serve")


def _await_all(process: subprocess.Popen[bytes], port: int, replicas: int, log: Path) -> None:
    """Return once the metrics of all replicas can be read through the proxy."""
    give_up_at = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < give_up_at:
        if process.poll() is not None or DEPLOY_FAILED in log.read_text(errors="replace"):
            raise ServerStartError(f"The simulation did not start: {log.read_text(errors='replace')[-2000:]}")
        with contextlib.suppress(OSError), _DIRECT.open(f"http://127.0.0.1:{port}/metrics", timeout=10.0) as answer:
            if answer.read().decode().count("\nrm_ready{") == replicas:
                return
        time.sleep(0.5)
    raise ServerStartError(f"{replicas} replicas were not ready within {READY_WITHIN_S:.0f} s.")


def _part_of(command: str) -> str:
    if any(name in command for name in PARTS["replica"]):
        return "replicas"
    return "proxy" if "haproxy" in command.lower() or "ProxyActor" in command else "ray"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the command and all processes that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_WITHIN_S)
        for relative in [*family, psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                relative.kill()
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
