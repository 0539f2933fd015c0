"""The URL of the service is checked, this machine is asked without a proxy, and a proxy that fails is named."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import pytest
from misbehaving_server import FakeServer, Request, ok, response, running, scores
from reward_client import RetryPolicy, RewardClient
from reward_client.addresses import is_loopback, proxy_of_environment, service_url
from reward_client.errors import InvalidArgument, RequestRejected, ServiceUnavailable, ServiceUnreachable

QUICK = RetryPolicy(max_attempts=2, first_wait_s=0.005, max_wait_s=0.02, jitter_s=0.005)
PROXY_VARIABLES = [
    name for scheme in ("http", "https", "all", "no") for name in (f"{scheme}_proxy", f"{scheme}_PROXY".upper())
]


@pytest.fixture(autouse=True)
def environment_without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)


class Proxy(FakeServer):
    """A proxy that answers what the service would; it sees whole URLs."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield ok(scores(request))


class RefusingProxy(FakeServer):
    """A proxy that reaches nothing."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield response("502 Bad Gateway", b"<html>no route</html>", "Content-Type: text/html")


class LockedProxy(FakeServer):
    """A proxy that wants a password."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield response("407 Proxy Authentication Required", b"")


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("HTTPS://models.example/rm//", "https://models.example/rm"),
        ("http://[::1]:8000/a/b", "http://[::1]:8000/a/b"),
        ("http://user:word@host", "http://user:word@host"),
    ],
)
def test_root_urls(url: str, root: str) -> None:
    """A root URL loses the slash at its end; a path before the service's own stays."""
    assert service_url(url) == root


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://h:8000/v1/score", "Give the root URL of the service, without /v1/score: http://h:8000$"),
        ("http://user:word@h/rm/v1/compare/", "without /v1/compare: http://h/rm$"),
        ("http://h/readyz", "without /readyz: http://h$"),
        ("http://h/v1", "without /v1: http://h$"),
        ("localhost:8000", "must start with http:// or https://"),
        ("127.0.0.1:8000", "must start with http:// or https://"),
        ("//h", "must start with http:// or https://"),
        ("ftp://h", "must start with http:// or https://"),
        ("", "is empty"),
        (" ", "is empty"),
        ("http://", "names no host"),
        ("http://h :8000", "no spaces"),
        ("http://h\n", "no spaces, line breaks"),
        ("http://h:eight", "port is a number"),
        ("http://h:70000", "port is a number"),
        ("http://h:0", "port 0"),
        ("http://[::1", "cannot be read"),
        ("http://" + "a" * 70, "not valid"),
        ("http://a..b", "not valid"),
        ("http://\u2603\u202e", "not valid"),
        ("http://h?x=1", "no query"),
        ("http://h/#x", "no fragment"),
        (None, "must be a string such as"),
        (b"http://h", "must be a string such as"),
    ],
)
def test_other_urls_are_refused(url: object, message: str) -> None:
    """Each mistake is told with what to give instead, and no password is repeated."""
    with pytest.raises(InvalidArgument, match=message) as caught:
        service_url(url)

    assert "word" not in str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "x.localhost", "127.0.0.1", "127.9.9.9", "::1", "0.0.0.0"])  # noqa: S104  (a destination)
def test_loopback_hosts(host: str) -> None:
    """Names and addresses of this machine are recognised."""
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["localhost.example", "128.0.0.1", "10.0.0.1", "example", "fe80::1", "127.0.0.1.example"]
)
def test_other_hosts(host: str) -> None:
    """Names that only look like it are not."""
    assert not is_loopback(host)


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_this_machine_is_asked_without_a_proxy(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever proxy the environment names, a service on the loopback interface is asked directly."""
    monkeypatch.setenv(variable, "socks5://127.0.0.1:9" if "all" in variable.lower() else "http://127.0.0.1:9")
    with running(FakeServer()) as server, RewardClient(server.url, retries=QUICK) as client:
        assert client.score(["q"], ["1"]) == [1.0]


def test_other_machines_are_asked_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy of the environment gets the whole URL."""
    with running(Proxy()) as proxy, RewardClient("http://models.invalid/rm", retries=QUICK) as client:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert client.score(["q"], ["1"]) == [1.0]

    assert [request.path for request in proxy.requests] == ["http://models.invalid/rm/v1/score"]


def test_explicit_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that is given is used for this machine too, and instead of that of the environment."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with running(Proxy()) as proxy, RewardClient("http://127.0.0.1:1", proxy=proxy.url, retries=QUICK) as client:
        assert client.score(["q"], ["1"]) == [1.0]

    assert len(proxy.requests) == 1


@pytest.mark.parametrize(
    ("excluded", "proxy"),
    [
        ("", "http://p:3128"),
        ("10.1.2.3", None),
        ("example.com, 10.0.0.0/8", None),
        ("192.168.0.0/16,nonsense/x", "http://p:3128"),
        ("*", None),
    ],
)
def test_exclusions_from_the_proxy(excluded: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """``no_proxy`` excludes addresses, networks, and everything by an asterisk; a proxy needs no scheme."""
    monkeypatch.setenv("http_proxy", "p:3128")
    monkeypatch.setenv("no_proxy", excluded)

    assert proxy_of_environment("http://10.1.2.3:8000") == proxy


def test_proxy_that_is_down_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exception names service and proxy and the cause, without the password of the proxy."""
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    named = "No answer from http://models.invalid through the proxy http://127.0.0.1:9: connection refused"
    with (
        RewardClient("http://models.invalid", retries=QUICK) as client,
        pytest.raises(ServiceUnreachable, match=named) as caught,
    ):
        client.score(["q"], ["1"])

    assert "secret" not in str(caught.value)


def test_proxy_that_reaches_nothing_is_named() -> None:
    """A 502 of the proxy is retried and named."""
    with (
        running(RefusingProxy()) as proxy,
        RewardClient("http://models.invalid", proxy=proxy.url, retries=QUICK) as client,
        pytest.raises(ServiceUnavailable, match=f"through the proxy {proxy.url}: 502 Bad Gateway without a problem"),
    ):
        client.score(["q"], ["1"])

    assert len(proxy.requests) == 2


def test_proxy_that_wants_a_password_is_named() -> None:
    """A 407 of the proxy is final."""
    with (
        running(LockedProxy()) as proxy,
        RewardClient("http://models.invalid", proxy=proxy.url, retries=QUICK) as client,
        pytest.raises(RequestRejected, match=f"through the proxy {proxy.url} answered 407 without a problem document"),
    ):
        client.score(["q"], ["1"])


def test_proxy_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SOCKS proxy without the package for it is an InvalidArgument that names both."""
    monkeypatch.setitem(sys.modules, "socksio", None)
    with (
        RewardClient("http://models.invalid", proxy="socks5://127.0.0.1:9") as client,
        pytest.raises(InvalidArgument, match=r"The proxy socks5://127.0.0.1:9 cannot be used: SOCKS needs .* socksio"),
    ):
        client.score(["q"], ["1"])
