"""The Ray Serve application: one deployment that is HTTP ingress and engine at once.

The only module that imports Ray. It wraps what ``assembly`` builds and ``routes`` answers into a replica, gathers
metrics from all of them, and holds the process that ``reward-serve`` supervises.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from typing import Any, TextIO

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from service.assembly import ServedModel, assemble
from service.diagnostics.monitors.monitor import MonitorView, merge_views
from service.http.access_log import Journal
from service.http.routes import OpenRequests, create_routes
from service.launch.launch import Launch
from service.metrics import merge_expositions
from service.settings import read_settings

APP_NAME = "reward"
SCRAPE_TIMEOUT_S = 2.0
ANSWER_S = 0.5
"""How long a computed answer may take through the sockets once the scorer has ended."""
OBJECT_STORE_BYTES = 200_000_000
"""Ray's object store; nothing large goes through it."""
_OUR_ERROR = re.compile(r"service\.errors\.\w+: (.+)")


class RewardReplica:
    """One replica: a loaded and warmed model behind its routes. It exists only once it can answer."""

    async def __init__(self, tree: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        settings = read_settings(tree)
        self._journal = Journal(settings.log)
        self._served: ServedModel = await asyncio.to_thread(assemble, settings)
        await self._served.scorer.start()
        self._open_requests = OpenRequests()
        self._siblings: DeploymentHandle | None = None
        self._name = serve.get_replica_context().replica_tag

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Give Ray the routes; called once, after the constructor."""
        return create_routes(
            self._served,
            self._exposition_of_all,
            self._journal,
            self._open_requests,
            monitors=self._monitors_of_all,
            host_echoes_request_id=True,
        )

    async def check_health(self) -> None:
        """Raise when this replica must be replaced; Ray asks every few seconds."""
        self._served.scorer.check_health()

    async def exposition(self) -> tuple[str, str]:
        """This replica's name and its own metrics, in Prometheus' text format."""
        return self._name, self._served.metrics.render().decode()

    async def monitors(self, run_id: str | None) -> tuple[str, MonitorView]:
        """This replica's name and what its monitors know of everything, or of one run."""
        return self._name, self._served.monitors.view(run_id)

    async def drain(self, drain_s: float) -> None:
        """Take no new requests, and return once the accepted ones are answered or ``drain_s`` is over."""
        await self._served.scorer.stop(drain_s)
        await self._open_requests.wait_until_none(ANSWER_S)

    async def _exposition_of_all(self) -> str:
        own_name, own = await self.exposition()
        texts, incomplete = await self._ask_all("exposition")
        # Parsing the texts of many replicas takes tens of milliseconds, in which the event loop must answer others.
        return await asyncio.to_thread(
            merge_expositions, {own_name: own} | texts, incomplete=incomplete or own_name not in texts
        )

    async def _monitors_of_all(self, run_id: str | None) -> MonitorView:
        own_name, own = await self.monitors(run_id)
        views, incomplete = await self._ask_all("monitors", run_id)
        return merge_views(({own_name: own} | views).values(), incomplete=incomplete or own_name not in views)

    async def _ask_all(self, method: str, *arguments: Any) -> tuple[dict[str, Any], bool]:
        """Ask every replica; return the answers by replica, and whether some did not answer in time."""
        if self._siblings is None:
            context = serve.get_replica_context()
            self._siblings = serve.get_deployment_handle(context.deployment, context.app_name)
        try:
            answers = await self._siblings.broadcast(method, *arguments).results_async(
                timeout_s=SCRAPE_TIMEOUT_S, return_exceptions=True
            )
        except (TimeoutError, RayServeException):
            return {}, True
        by_replica = dict(answer for answer in answers if not isinstance(answer, BaseException))
        return by_replica, len(by_replica) < len(answers)

    async def __del__(self) -> None:
        """Stop the engine thread and free the device; Ray calls it once, after the drain."""
        await self._served.scorer.stop(0.0)
        self._journal.close()


deployment: Any = serve.deployment(
    name="reward",
    max_ongoing_requests=512,
    # A checkpoint that is refused once is refused again: one try, and the reason is the answer.
    max_constructor_retry_count=1,
    health_check_period_s=10,
    health_check_timeout_s=30,
    graceful_shutdown_timeout_s=30,
    graceful_shutdown_wait_loop_s=0.2,
)(serve.ingress()(RewardReplica))


def build_app(args: dict[str, Any]) -> serve.Application:
    """Build the application for ``serve run`` and ``serve deploy``.

    Args:
        args: the settings tree, as ``args`` of the application in serve_config.yaml.

    Raises:
        SettingsError: a key is unknown or a value malformed.
    """
    settings = read_settings(args)
    return deployment.bind(settings.model_dump(mode="json"))


def main() -> None:
    """Run Ray and the application until standard input ends, then drain and shut everything down in order.

    Standard input carries the Launch as its first line and stays open; its end, also by the death of the start command,
    is the request to stop. The file descriptor named by the first argument gets one JSON line per stage.
    """
    launch = Launch(**json.loads(sys.stdin.readline()))
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8", buffering=1) as reports:
        try:
            _start(launch, reports)
        except Exception as error:
            _report(reports, failed=_reason(error))
            raise
        _report(reports, stage="running")
        sys.stdin.read()
        _stop(launch.drain_s)


def _start(launch: Launch, reports: TextIO) -> None:
    _report(reports, stage="ray")
    ray.init(
        address="local",  # a Ray of our own, also where another one runs
        num_cpus=launch.cpus * launch.replicas,
        num_gpus=launch.gpus * launch.replicas,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=f"{launch.folder}/ray",  # Ray opens its folder to everybody; the one around it is ours
    )
    _report(reports, stage="serve")
    serve.start(
        http_options={"host": launch.host, "port": launch.port},
        logging_config={"enable_access_log": False},
    )
    _report(reports, stage="model")
    replicas = deployment.options(
        num_replicas=launch.replicas,
        ray_actor_options={"num_cpus": launch.cpus, "num_gpus": launch.gpus},
        graceful_shutdown_timeout_s=launch.drain_s,
        # Ray makes a record of every request and drops it then, unless records of that level are off altogether.
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    serve.run(replicas.bind(launch.settings), name=APP_NAME, route_prefix="/")


def _stop(drain_s: float) -> None:
    # Serve stops its proxy at once with the replicas; whoever was accepted must have an answer before that.
    handle = serve.get_app_handle(APP_NAME)
    handle.broadcast("drain", drain_s).results(timeout_s=drain_s + 1.0, return_exceptions=True)
    serve.shutdown()
    ray.shutdown()


def _reason(error: Exception) -> str:
    """The sentence of our own error wherever Ray has wrapped it, or else the last line of what Ray says."""
    said = str(getattr(error, "cause", None) or error)
    applications = serve.status().applications if ray.is_initialized() else {}
    if APP_NAME in applications:
        said = "\n".join([said, *(found.message for found in applications[APP_NAME].deployments.values())])
    ours = _OUR_ERROR.findall(said)
    return str(ours[-1] if ours else said.strip().splitlines()[-1])


def _report(reports: TextIO, **facts: str) -> None:
    reports.write(json.dumps(facts) + "\n")
