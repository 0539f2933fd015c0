"""A Ray cluster of several nodes on this machine, in a process of its own, with applications of a Serve configuration.

Run as a script it starts the cluster, prints ``ready``, and then follows the lines of its standard input: ``kill N``
ends node N, but never the head, node 0, without warning and starts another one; the end of the input ends everything.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import yaml
from ray_serve_command import documented_environment
from serving import eventually, free_port

from service.launch.ray_environment import _PATIENCE as PATIENCE

START_TIMEOUT_S = 240.0
SIMULATED_APP = "loadtest.simulated_app:build_app"


@dataclass(frozen=True)
class RunningCluster:
    """A started cluster. ``url`` is where its proxies listen, all on one port."""

    url: str
    process: subprocess.Popen[bytes]
    messages: Path
    config: dict[str, Any]
    """The Serve configuration without applications."""
    environment: dict[str, str]
    dashboard: str
    """Address of Ray's REST interface."""

    def deploy(self, *applications: dict[str, Any]) -> None:
        """Run ``serve deploy`` with these applications; Ray then brings them about."""
        file = self.messages.parent / "serve_config.yaml"
        file.write_text(yaml.safe_dump(self.config | {"applications": list(applications)}))
        serve = Path(sys.executable).parent / "serve"
        subprocess.run([serve, "deploy", "-a", self.dashboard, str(file)], env=self.environment, check=True)

    def status(self) -> dict[str, Any]:
        """By name what Ray reports of each application."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        answer = httpx2.get(f"{self.dashboard}/api/serve/applications/", headers=token, timeout=30.0, trust_env=False)
        applications: dict[str, Any] = answer.raise_for_status().json()["applications"]
        return applications

    def num_running(self, name: str) -> int:
        """How many replicas of an application run."""
        replicas = self.status()[name]["deployments"]["reward"]["replicas"]
        return sum(replica["state"] == "RUNNING" for replica in replicas)

    def kill_node(self, number: int) -> None:
        """End a node and its replica at once; another node starts in its place."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"kill {number}\n".encode())
        self.process.stdin.flush()


def application(name: str, replicas: int, oracle: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A simulated application of a Serve configuration, under the route prefix of its name."""
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": SIMULATED_APP,
        "args": {"model": {"engine": "oracle"}, "oracle": oracle, "log": "/dev/null", **settings},
        "deployments": [
            {
                "name": "reward",
                "num_replicas": replicas,
                "max_replicas_per_node": 1,
                "ray_actor_options": {"num_cpus": 0.1},
            }
        ],
    }


@contextmanager
def running_cluster(
    folder: Path, *applications: dict[str, Any], nodes: int = 1, variables: Mapping[str, str] | None = None
) -> Iterator[RunningCluster]:
    """Run the applications on a cluster of so many nodes until the block ends.

    Args:
        folder: gets the cluster's output.
        applications: that are deployed before the block begins.
        nodes: of the cluster.
        variables: further environment variables of all its processes.
    """
    port = free_port()
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": port},
        "logging_config": {"enable_access_log": False},
    }
    dashboard_port = free_port()
    messages = folder / "cluster.txt"
    # Ray's Unix sockets need a short path, shorter than pytest's.
    with tempfile.TemporaryDirectory(prefix="rs-", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        environment = documented_environment(ha_proxy=False, folder=ray_folder)
        environment |= {**PATIENCE, "PYTHONPATH": ":".join(sys.path), **(variables or {})}
        del environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]  # it is for a single node
        wanted = {
            "nodes": nodes,
            "dashboard_port": dashboard_port,
            "config": config | {"applications": list(applications)},
        }
        with messages.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, __file__, json.dumps(wanted)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env=environment,
            )
        try:
            assert eventually(
                lambda: process.poll() is not None or "ready\n" in messages.read_text(), START_TIMEOUT_S
            ), messages.read_text()
            assert process.poll() is None, messages.read_text()
            url, dashboard = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}"
            yield RunningCluster(url, process, messages, config, environment, dashboard)
        finally:
            family = descendants(process)
            assert process.stdin is not None
            process.stdin.close()
            end(process, family)


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """All processes below this one; none where it has ended."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def end(process: subprocess.Popen[bytes], family: list[psutil.Process], timeout_s: float = 10.0) -> None:
    """Wait for a process that runs Ray to end, and kill what is left of its family."""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for relative in family:
        try:
            relative.kill()
        except psutil.NoSuchProcess:
            continue


def main() -> None:
    """Run the cluster that the first argument describes."""
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster
    from ray.serve.schema import ServeDeploySchema

    wanted = json.loads(sys.argv[1])
    resources = {"num_cpus": 2, "object_store_memory": 80_000_000}
    cluster = Cluster(
        initialize_head=True,
        connect=False,
        head_node_args={**resources, "include_dashboard": True, "dashboard_port": wanted["dashboard_port"]},
    )
    others = [cluster.add_node(**resources) for _ in range(wanted["nodes"] - 1)]
    ray.init(address=cluster.address, log_to_driver=False)
    config = ServeDeploySchema.model_validate(wanted["config"])
    serve.start(proxy_location="EveryNode", http_options=wanted["config"]["http_options"])
    if config.applications:
        serve.context._get_global_client().deploy_apps(config, _blocking=False)
    names = {application.name for application in config.applications}
    while {name for name, status in serve.status().applications.items() if status.status == "RUNNING"} != names:
        time.sleep(0.5)
    print("ready", flush=True)
    for line in sys.stdin:
        index = int(line.split()[1]) - 1
        cluster.remove_node(others[index], allow_graceful=False)
        print(line.strip(), flush=True)
        others[index] = cluster.add_node(**resources)


if __name__ == "__main__":
    main()
