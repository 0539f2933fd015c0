"""The Ray Serve application: one deployment that is both HTTP ingress and engine.

It makes a replica of the model that ``assembly`` loads and the HTTP application of
``http.routes``, collects metrics and monitors of all replicas, and is the process that ``reward-serve`` supervises.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from dataclasses import replace
from typing import Any, TextIO

import ray
from ray import serve
from starlette.types import ASGIApp

from service.assembly import ServedModel, assemble
from service.autoscaling import BUSY, QUEUE_S
from service.diagnostics.monitors.monitor import MonitorView, merge_views
from service.errors import HttpError, NotReady
from service.http.access_log import AccessLog
from service.http.open_requests import OpenRequests
from service.http.ray_headers import GATE
from service.http.routes import create_app
from service.http.tracing import request_tracer
from service.launch.exposure import keys_for
from service.launch.launch import Launch
from service.launch.ray_failures import explain_failure, is_of_ray
from service.metrics import merge_expositions
from service.request_shard import RequestShard, ShardResult
from service.settings import Settings, read_settings
from service.sibling_replicas import LoadReport, SiblingReplicas

APP_NAME = "reward"
MAX_ONGOING_REQUESTS = 100_000
SCRAPE_TIMEOUT_S = 2.0
SUMMARY_TIMEOUT_S = 30.0
"""Seconds for the first answer of a replica that has just started."""
SEND_S = 2.0
"""Longest time for rendering and sending answers that are computed, once the scorer has stopped; on a busy machine a
large one takes more than a second."""
OBJECT_STORE_BYTES = 200_000_000
"""Size of Ray's object store; nothing large goes through it."""
_SERVICE_ERROR = re.compile(r"service\.errors\.\w+: (.+)")


class RewardReplica:
    """One replica: a model behind its routes, loaded and warmed up by the constructor."""

    async def __init__(self, tree: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        settings = read_settings(tree)
        self._api_keys = keys_for(settings.security)
        self._access_log = AccessLog(settings.log)
        self._served: ServedModel = await asyncio.to_thread(self.assemble, settings)
        scorer = self._served.scorer
        await scorer.start()
        self._open_requests = OpenRequests()
        self._name = serve.get_replica_context().replica_tag
        identity = self._served.identity
        self._tracer = request_tracer(
            settings.tracing, model=identity.name, version=identity.version, replica=self._name
        )
        self._siblings = SiblingReplicas(self._served.build)
        if settings.scatter.enabled:
            scorer.scatter_over(self._siblings, settings.scatter, self._served.build)
            await self._announced(self._name)
        self._stats_at, self._stats_busy_s = time.monotonic(), scorer.engine_busy_s

    def assemble(self, settings: Settings) -> ServedModel:
        """Load the model; called in a thread."""
        return assemble(settings)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the HTTP application; Ray calls this once, after the constructor."""
        app = create_app(
            self._served,
            self._metrics_of_all_replicas,
            self._access_log,
            self._open_requests,
            monitors=self._monitors_of_all_replicas,
            api_keys=self._api_keys,
            host_echoes_request_id=True,
            tracer=self._tracer,
        )
        GATE.refusals = app.state.unread_refusals
        return app

    async def check_health(self) -> None:
        """Raise if this replica must be replaced; Ray calls this every few seconds."""
        self._served.scorer.check_health()

    async def exposition(self) -> tuple[str, str]:
        """This replica's name and its own metrics, in Prometheus' text format."""
        return self._name, self._served.metrics.render().decode()

    async def monitors(self, run_id: str | None) -> tuple[str, MonitorView]:
        """This replica's name and the state of its monitors, of all items or of one run."""
        calibration = self._served.lookup.calibration
        build = f"{self._served.build} {calibration.id if calibration else ''}"
        return self._name, replace(self._served.monitors.view(run_id), build=build)

    async def summary(self) -> str:
        """What is served, as one line for the terminal."""
        return self._served.summary

    async def load(self) -> LoadReport:
        """What a sibling needs to know before it sends a shard."""
        scorer = self._served.scorer
        return LoadReport(self._name, self._served.build, scorer.queued_tokens, scorer.state == "ready")

    @serve.multiplexed(max_num_models_per_replica=1)  # type: ignore[untyped-decorator]
    async def _announced(self, name: str) -> str:
        """Announce the name as a model that only this replica has, so that siblings can call it by its name."""
        return name

    async def compute_shard(self, shard: RequestShard) -> ShardResult | HttpError:
        """Compute a shard of a request that a sibling has received; errors are returned, as Ray wraps raised ones.

        Args:
            shard: as `Scorer.compute_shard`.
        """
        if shard.build != self._served.build:
            return NotReady("This replica serves another model version, or runs other code.")
        try:
            return await self._served.scorer.compute_shard(shard)
        except HttpError as error:
            return error

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The statistics that `QueuedTokensPolicy` reads; Ray calls this every few seconds where it scales."""
        scorer, now = self._served.scorer, time.monotonic()
        busy_s = scorer.engine_busy_s
        elapsed_s = max(now - self._stats_at, 1e-3)
        busy = (busy_s - self._stats_busy_s) / elapsed_s
        self._stats_at, self._stats_busy_s = now, busy_s
        return {QUEUE_S: float(scorer.queue_s), BUSY: min(1.0, max(0.0, busy))}

    async def drain(self, drain_s: float) -> None:
        """Refuse new requests, and return once the accepted ones are answered or after ``drain_s`` seconds."""
        await self._served.scorer.stop(drain_s)
        await self._open_requests.wait_until_none(SEND_S)

    async def _metrics_of_all_replicas(self) -> str:
        own_name, own = await self.exposition()
        texts, incomplete = await self._call_all("exposition")
        # Parsing the texts of many replicas takes tens of milliseconds, too long for the event loop.
        return await asyncio.to_thread(
            merge_expositions, {own_name: own} | texts, incomplete=incomplete or own_name not in texts
        )

    async def _monitors_of_all_replicas(self, run_id: str | None) -> MonitorView:
        own_name, own = await self.monitors(run_id)
        views, incomplete = await self._call_all("monitors", run_id)
        return merge_views(({own_name: own} | views).values(), incomplete=incomplete or own_name not in views)

    async def _call_all(self, method: str, *arguments: Any) -> tuple[dict[str, Any], bool]:
        """Call a method of every replica; return the results by replica, and whether some are missing."""
        results, incomplete = await self._siblings.call_all(method, *arguments, timeout_s=SCRAPE_TIMEOUT_S)
        return dict(results), incomplete

    async def __del__(self) -> None:
        """Stop the engine thread and free the device; Ray calls it once, after the drain."""
        await self._served.scorer.stop(0.0)
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        self._access_log.close()


def deployment_of(replica: type[RewardReplica]) -> Any:
    """Make the deployment of a kind of replica."""
    return serve.deployment(
        name="reward",
        # More than HAProxy has connections: a request that waited in Ray for another one's place, whose body may never
        # come, would be neither refused nor measured, and a probe would wait too. The scorer refuses by waiting work.
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        # A checkpoint that is refused once is refused again, so the first refusal is reported and not retried.
        max_constructor_retry_count=1,
        # A replica that does not answer three checks is replaced, at most 35 s after it froze.
        health_check_period_s=5,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.2,
    )(serve.ingress()(replica))


deployment: Any = deployment_of(RewardReplica)


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
    """Run Ray and the application until standard input ends, then drain and shut down in order.

    The first line of standard input is the Launch; the pipe then stays open. Its end, also when the start command dies,
    is the request to stop. The file descriptor given as the first argument gets one JSON line per stage.
    """
    launch = Launch(**json.loads(sys.stdin.readline()))
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8", buffering=1) as reports:
        try:
            _start_ray(launch, reports)
        except Exception as error:
            _report(reports, failed=explain_failure(str(error)), again=True)
            raise
        try:
            summary = _start_replicas(launch, reports)
        except Exception as error:
            reason = _reason(error)
            again = is_of_ray(reason)
            _report(reports, failed=explain_failure(reason) if again else reason, again=again)
            raise
        _report(reports, stage="running", summary=summary)
        sys.stdin.read()
        _stop(launch.drain_s)


def _start_ray(launch: Launch, reports: TextIO) -> None:
    _report(reports, stage="ray")
    ray.init(
        address="local",  # a Ray instance of its own, also where another one runs
        num_cpus=launch.cpus * launch.replicas,
        num_gpus=launch.gpus * launch.replicas,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=f"{launch.folder}/ray",  # Ray makes its folder readable by all; the one around it is private
    )
    _report(reports, stage="serve")
    for is_last in (False, True):
        try:
            serve.start(
                http_options={"host": launch.host, "port": launch.port}, logging_config={"enable_access_log": False}
            )
            break
        except TimeoutError:  # after a minute, which no setting changes; the next call finds what has started meanwhile
            if is_last:
                raise


def _start_replicas(launch: Launch, reports: TextIO) -> str:
    """Start the replicas; return what one of them serves, as one line."""
    _report(reports, stage="model")
    replicas = deployment.options(
        num_replicas=launch.replicas,
        ray_actor_options={"num_cpus": launch.cpus, "num_gpus": launch.gpus},
        graceful_shutdown_timeout_s=launch.drain_s,
        # Otherwise Ray creates a log record for every request, only to drop it.
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    handle = serve.run(replicas.bind(launch.settings), name=APP_NAME, route_prefix="/")
    return str(handle.summary.remote().result(timeout_s=SUMMARY_TIMEOUT_S))


def _stop(drain_s: float) -> None:
    # Serve stops its proxy together with the replicas, so accepted requests must be answered before that.
    handle = serve.get_app_handle(APP_NAME)
    handle.broadcast("drain", drain_s).results(timeout_s=drain_s + SEND_S + 0.5, return_exceptions=True)
    serve.shutdown()
    ray.shutdown()


def _reason(error: Exception) -> str:
    """The sentence of the service's own error, wherever Ray has wrapped it, else the last line of Ray's message."""
    message = str(getattr(error, "cause", None) or error)
    applications = serve.status().applications if ray.is_initialized() else {}
    if APP_NAME in applications:
        deployments = applications[APP_NAME].deployments.values()
        message = "\n".join([message, *(deployment_status.message for deployment_status in deployments)])
    own = _SERVICE_ERROR.findall(message)
    return str(own[-1] if own else message.strip().splitlines()[-1])


def _report(reports: TextIO, **facts: str | bool) -> None:
    reports.write(json.dumps(facts) + "\n")
