"""``serve deploy`` on a running Ray cluster: several models, a change of model, and scaling by load."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from ray_cluster import RunningCluster, application, running_cluster
from serving import eventually

from service.autoscaling import QueuedTokensPolicy
from service.engines.oracle import oracle_reward_of_text

pytestmark = pytest.mark.slow

SETTINGS = {"batching": {"max_batch_tokens": 1024}}
ALPHA = application("alpha", 2, {"salt": "a"}, **SETTINGS)
BETA = application("beta", 1, {"salt": "b"}, **SETTINGS)
POLICY = f"{QueuedTokensPolicy.__module__}:{QueuedTokensPolicy.__name__}"


def scaled_application() -> dict[str, Any]:
    """An application of one to three replicas, each of which computes 5,000 tokens per second."""
    scaled = application("scaled", 1, {"salt": "s", "seconds_per_token": 2e-4}, **SETTINGS)
    deployment = scaled["deployments"][0]
    del deployment["num_replicas"]
    deployment["autoscaling_config"] = {
        "min_replicas": 1,
        "max_replicas": 3,
        "look_back_period_s": 11,
        "upscale_delay_s": 1,
        "downscale_delay_s": 2,
        "policy": {"policy_function": POLICY, "policy_kwargs": {"target_queue_s": 0.5}},
    }
    return scaled


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """A running Ray cluster with three applications from one file."""
    short_intervals = {"RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5"}
    with running_cluster(tmp_path_factory.mktemp("deploy"), variables=short_intervals) as running:
        yield running


@pytest.fixture
def cluster(shared_cluster: RunningCluster) -> RunningCluster:
    """The cluster with the three applications as they are at first, whatever an earlier test has deployed."""
    shared_cluster.deploy(*(everywhere(app) for app in (ALPHA, BETA, scaled_application())))

    def is_as_at_first() -> bool:
        if not are_running(shared_cluster, "alpha", "beta", "scaled"):
            return False
        answer = httpx2.get(f"{shared_cluster.url}/alpha/v1/model", timeout=10, trust_env=False)
        return answer.status_code == 200 and answer.json()["model"]["version"] == "oracle-a"

    assert eventually(is_as_at_first, 180), shared_cluster.status()
    return shared_cluster


def everywhere(app: dict[str, Any], **oracle: Any) -> dict[str, Any]:
    """The application without a limit of replicas on the one node, and with changes of its oracle."""
    deployment = {key: value for key, value in app["deployments"][0].items() if key != "max_replicas_per_node"}
    args = app["args"] | {"oracle": app["args"]["oracle"] | oracle}
    return app | {"args": args, "deployments": [deployment | {"graceful_shutdown_timeout_s": 20}]}


def are_running(cluster: RunningCluster, *names: str) -> bool:
    status = cluster.status()
    return all(name in status and status[name]["status"] == "RUNNING" for name in names)


class Load:
    """What callers without any retries got while the block ran."""

    def __init__(self) -> None:
        self.versions: Counter[str] = Counter()
        self.failed: list[str] = []


@asynccontextmanager
async def load(url: str, *, callers: int, items: int = 4) -> AsyncIterator[Load]:
    """Post requests from so many callers until the block ends; each reward must be that of the version it names."""
    result, stop, numbers = Load(), asyncio.Event(), itertools.count()

    async def call(client: httpx2.AsyncClient) -> None:
        number = next(numbers)
        pairs = [(f"question {number} ", f"answer {index} " * 8) for index in range(items)]
        body = {"items": [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]}
        try:
            answer = await client.post(f"{url}/v1/score", json=body)
        except httpx2.HTTPError as error:
            result.failed.append(repr(error))
            return
        if answer.status_code != 200:
            result.failed.append(f"{answer.status_code} {answer.text}")
            return
        version = answer.headers["X-Model-Version"]
        salt = version.removeprefix("oracle-")
        rewards = [scored["reward"] for scored in answer.json()["results"]]
        assert answer.json()["model"]["version"] == version
        assert rewards == [oracle_reward_of_text(prompt, completion, salt) for prompt, completion in pairs]
        result.versions[version] += 1

    async def work(client: httpx2.AsyncClient) -> None:
        while not stop.is_set():
            await call(client)

    limits = httpx2.Limits(max_connections=callers)
    async with httpx2.AsyncClient(timeout=60, limits=limits, trust_env=False) as client, asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(work(client))
        try:
            yield result
        finally:
            stop.set()


async def until(condition: Any, seconds: float) -> bool:
    return await asyncio.to_thread(eventually, condition, seconds)


@pytest.mark.soak
async def test_several_models(cluster: RunningCluster) -> None:
    """Two models of one file answer under their own prefixes, and no answer is of the other model."""
    async with load(f"{cluster.url}/alpha", callers=2) as alpha, load(f"{cluster.url}/beta", callers=2) as beta:
        await asyncio.sleep(2)

    assert alpha.failed == beta.failed == []
    assert alpha.versions.keys() == {"oracle-a"}
    assert beta.versions.keys() == {"oracle-b"}


async def test_change_of_model(cluster: RunningCluster) -> None:
    """A deploy with other settings replaces the model under load: nothing fails, and a bad model changes nothing."""
    others = (everywhere(BETA), everywhere(scaled_application()))
    versions = Counter[str]()

    async with load(f"{cluster.url}/alpha", callers=4) as change:
        await asyncio.to_thread(cluster.deploy, everywhere(ALPHA, salt="a2"), *others)
        assert await until(lambda: change.versions["oracle-a2"] > 0, 90)
        assert await until(lambda: are_running(cluster, "alpha"), 90)
        versions |= change.versions
    # A key of more than 64 bytes is refused by BLAKE2b: the warm-up of the new replicas fails.
    async with load(f"{cluster.url}/alpha", callers=4) as bad:
        await asyncio.to_thread(cluster.deploy, everywhere(ALPHA, salt="x" * 65), *others)
        assert await until(lambda: cluster.status()["alpha"]["status"] in {"DEPLOY_FAILED", "UNHEALTHY"}, 90)
        await asyncio.sleep(1)

    print(f"change of model: {dict(versions)}, bad model: {dict(bad.versions)}")
    assert change.failed == bad.failed == []
    assert versions.keys() == {"oracle-a", "oracle-a2"}
    assert bad.versions.keys() == {"oracle-a2"}


@pytest.mark.soak
async def test_scaling_by_load(cluster: RunningCluster) -> None:
    """Replicas follow the waiting tokens from one to three and back, and no request fails on the way."""
    url = f"{cluster.url}/scaled"
    async with load(url, callers=24, items=8) as heavy:
        assert await until(lambda: cluster.num_running("scaled") == 3, 90), cluster.status()["scaled"]
    async with load(url, callers=1, items=1) as light:
        assert await until(lambda: cluster.num_running("scaled") == 1, 90), cluster.status()["scaled"]

    print(f"1 to 3 replicas: {heavy.versions.total()} requests; back to 1: {light.versions.total()} requests")
    assert heavy.failed == light.failed == []
