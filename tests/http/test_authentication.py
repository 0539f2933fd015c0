"""API keys: every route is denied without one, scopes are kept, quotas are counted in items."""

from __future__ import annotations

import base64
import json
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from http_application import Application, application
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from service.api_keys import ApiKey, ApiKeys, hash_of, new_key, read_api_keys
from service.errors import OutputError, QuotaExceeded, SettingsError
from service.http.authentication import PUBLIC_PATHS, Quota
from service.http.page_routes import FILES
from service.launch.exposure import keys_for
from service.launch.key_command import main
from service.settings import SecuritySettings

SCORE_KEY, ADMIN_KEY, LIMITED_KEY = "score-key", "admin-key", "limited-key"
KEYS = ApiKeys(
    [
        ApiKey(name="trainer", scope="score", sha256=hash_of(SCORE_KEY)),
        ApiKey(name="operator", scope="admin", sha256=hash_of(ADMIN_KEY)),
        ApiKey(name="guest", scope="score", sha256=hash_of(LIMITED_KEY), items_per_minute=3),
    ]
)
ITEM = {"prompt": "2+2?", "completion": "4"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[Application]:
    async with application(tmp_path, api_keys=KEYS) as started:
        yield started


def routes_of(app: Application) -> list[tuple[str, str]]:
    """Method and path of every route."""
    transport: Any = app.client._transport
    return [
        (method, route.path.replace("{model}", "oracle").replace("{version}", "1"))
        for route in transport.app.routes
        if isinstance(route, Route)
        for method in sorted(route.methods or {"GET"})
    ]


async def test_a_route_prefix_changes_no_right(app: Application) -> None:
    """Behind a route prefix, which Ray Serve passes as root_path, probes are open and metrics need the scope admin."""
    inner: Any = app.client._transport

    async def prefixed(scope: Scope, receive: Receive, send: Send) -> None:
        await inner.app({**scope, "root_path": "/helpful"}, receive, send)

    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(prefixed), base_url="http://app/helpful") as client:
        for path in ("/metrics", "/metrics/"):
            assert (await client.get(path)).status_code == 401
            assert (await client.get(path, headers=bearer(SCORE_KEY))).status_code == 403
            assert (await client.get(path, headers=bearer(ADMIN_KEY))).status_code == 200
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/v1/model")).status_code == 401


async def test_every_route_but_the_probes_is_denied_without_a_key(app: Application) -> None:
    """Every route without a valid key is 401, probes and the files of the page excepted; so is a path without route."""
    listed = routes_of(app)
    assert len(listed) > 20
    for method, path in [*listed, ("GET", "/v1/no-such-route")]:
        for headers in ({}, bearer("wrong"), basic("wrong", "wrong"), {"Authorization": "Bearer"}):
            answer = await app.client.request(method, path, headers=headers)
            if path in PUBLIC_PATHS | FILES.keys():
                assert answer.status_code == 200, path
            else:
                assert answer.status_code == 401, (method, path)
                assert answer.headers["WWW-Authenticate"].startswith("Bearer")
                assert method == "HEAD" or answer.json()["code"] == "unauthenticated"


@pytest.mark.parametrize(
    "headers",
    [bearer(SCORE_KEY), basic("", SCORE_KEY), basic(SCORE_KEY, ""), {"Authorization": f"bearer  {SCORE_KEY}"}],
)
async def test_a_key_scores_however_it_is_presented(app: Application, headers: dict[str, str]) -> None:
    """A key with scope score is taken as a Bearer token and as user or password of Basic."""
    answer = await app.post("/v1/score", {"items": [ITEM]}, **headers)
    assert answer.status_code == 200
    assert isinstance(answer.json()["results"][0]["reward"], float)


async def test_scope_score_does_not_read_what_concerns_others(app: Application) -> None:
    """Metrics, the common monitor and the names of runs need scope admin; a run that is named needs none."""
    await app.post("/v1/score", {"items": [ITEM]}, **bearer(SCORE_KEY), **{"X-Run-Id": "ppo-7"})
    for path in ("/metrics", "/v1/monitor"):
        assert (await app.client.get(path, headers=bearer(SCORE_KEY))).json()["code"] == "forbidden"
        assert (await app.client.get(path, headers=bearer(ADMIN_KEY))).status_code == 200
    own = await app.client.get("/v1/monitor", headers=bearer(SCORE_KEY) | {"X-Run-Id": "ppo-7"})
    assert own.status_code == 200
    assert own.json()["runs"] == []
    assert (await app.client.get("/v1/monitor", headers=bearer(ADMIN_KEY))).json()["runs"] == ["ppo-7"]


async def test_refusals_are_counted_and_logged_without_the_key(app: Application, tmp_path: Path) -> None:
    """The metric counts each refusal; the log has the name of the key and no key."""
    await app.client.get("/v1/model", headers=bearer("wrong-secret"))
    await app.client.get("/metrics", headers=bearer(SCORE_KEY))
    await app.client.get("/v1/model", headers=bearer(SCORE_KEY))
    metrics = (await app.client.get("/metrics", headers=bearer(ADMIN_KEY))).text
    assert 'rm_authentication_failures_total{reason="unauthenticated"} 1.0' in metrics
    assert 'rm_authentication_failures_total{reason="forbidden"} 1.0' in metrics
    await app.served.scorer.stop(0.0)
    app.access_log.close()
    log = (tmp_path / "requests.jsonl").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line.get("key") for line in lines if line["route"] == "/v1/model"] == ["trainer"]
    assert "wrong-secret" not in log
    assert SCORE_KEY not in log


@pytest.mark.parametrize("route", ["/v1/score", "/get_reward"])
async def test_a_quota_is_answered_with_429_and_a_time(app: Application, route: str) -> None:
    """A key with 3 items a minute gets 3, then 429 with the seconds until the next one; other keys are not affected."""
    body = {"items": [ITEM] * 3} if route == "/v1/score" else {"query": ["a"] * 3, "prompts": ["a"] * 3}
    assert (await app.post(route, body, **bearer(LIMITED_KEY))).status_code == 200
    refused = await app.post(route, body, **bearer(LIMITED_KEY))
    assert refused.status_code == 429
    assert 30 < int(refused.headers["Retry-After"]) <= 75
    assert (await app.post(route, body, **bearer(SCORE_KEY))).status_code == 200


async def test_a_refused_request_uses_no_quota(app: Application) -> None:
    """A request that is answered with 503 gives its items back, so that retries of a start do not end in a 429."""
    await app.served.scorer.stop(0.0)
    for _ in range(5):
        answer = await app.post("/v1/score", {"items": [ITEM] * 3}, **bearer(LIMITED_KEY))
        assert answer.json()["code"] == "draining"


def test_a_quota_refills_and_admits_a_large_request_when_it_is_full() -> None:
    """A bucket of 60 items a minute gives one back each second; a request of 100 passes a full bucket."""
    now = 0.0
    quota = Quota(60, lambda: now)
    quota.take(60)
    with pytest.raises(QuotaExceeded) as refusal:
        quota.take(1)
    assert refusal.value.retry_after_s == pytest.approx(1.0)
    now = 1.0
    quota.take(1)
    now = 100.0
    quota.take(100)
    with pytest.raises(QuotaExceeded) as refusal:
        quota.take(1)
    assert refusal.value.retry_after_s == pytest.approx(41.0)


# --- Files of keys ---------------------------------------------------------------------------------------------------


def test_the_command_makes_a_key_that_the_file_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """reward-key prints a key once and appends its hash to a file of mode 0600; the same name is refused."""
    file = tmp_path / "keys.yaml"
    assert main(["trainer", "--file", str(file)]) == 0
    assert main(["limited", "--file", str(file), "--scope", "admin", "--items-per-minute", "5"]) == 0
    first, second = capsys.readouterr().out.split()
    keys = read_api_keys(str(file))
    assert keys.find(first) == ApiKey(name="trainer", scope="score", sha256=hash_of(first))
    assert keys.find(second) == ApiKey(name="limited", scope="admin", sha256=hash_of(second), items_per_minute=5)
    assert keys.find(new_key()) is None
    assert first not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(SettingsError, match="has a key named trainer"):
        main(["trainer", "--file", str(file)])
    with pytest.raises(OutputError, match="cannot be written"):
        main(["trainer", "--file", str(tmp_path / "no" / "folder" / "keys.yaml")])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is not valid at the file"),
        ("[]", "has no key"),
        ("- {name: a, sha256: abc}", "is not valid at 0.sha256"),
        (f"- {{name: a, scope: root, sha256: {hash_of('k')}}}", "is not valid at 0.scope"),
        (f"- {{name: a, key: secret, sha256: {hash_of('k')}}}", "is not valid at 0.key"),
        (f"- {{name: a, sha256: {hash_of('k')}}}\n- {{name: a, sha256: {hash_of('l')}}}", "the same name"),
        (f"- {{name: a, sha256: {hash_of('k')}}}\n- {{name: b, sha256: {hash_of('k')}}}", "the same sha256"),
        ("{", "is not YAML"),
    ],
)
def test_an_invalid_file_of_keys_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    """Each invalid file gets one sentence with the place and without a value."""
    file = tmp_path / "keys.yaml"
    file.write_text(content)
    with pytest.raises(SettingsError, match=reason) as refusal:
        read_api_keys(str(file))
    assert "secret" not in str(refusal.value)


def test_another_interface_needs_keys_or_a_word(tmp_path: Path) -> None:
    """Without keys only loopback is served, unless authentication is none; required needs keys everywhere."""
    for host in ("127.0.0.1", "127.3.4.5", "::1", "localhost"):
        assert keys_for(SecuritySettings(), host) is None
    for host in ("0.0.0.0", "::", "192.168.1.7", "gpu-box"):  # noqa: S104 - compared, not bound
        with pytest.raises(SettingsError, match="there are no API keys"):
            keys_for(SecuritySettings(), host)
        assert keys_for(SecuritySettings(authentication="none"), host) is None
    with pytest.raises(SettingsError, match="required"):
        keys_for(SecuritySettings(authentication="required"), "127.0.0.1")
    file = tmp_path / "keys.yaml"
    main(["trainer", "--file", str(file)])
    given = SecuritySettings(api_keys=str(file), authentication="required")
    assert keys_for(given, "0.0.0.0") is not None  # noqa: S104 - compared, not bound
    with pytest.raises(SettingsError, match="leave one out"):
        keys_for(SecuritySettings(api_keys=str(file), authentication="none"))
