"""The address of the service and of the proxy in front of it.

Pure, but for the environment that names proxies. Addresses are printed without user names and passwords.
"""

from __future__ import annotations

import ipaddress
import re
import urllib.request
from urllib.parse import SplitResult, urlsplit, urlunsplit

import httpx2

from reward_client.errors import InvalidArgument

ROUTES = (
    *("/v1/score", "/v1/compare", "/v1/model", "/v1/monitor", "/v1"),
    *("/livez", "/readyz", "/healthz", "/health", "/metrics", "/openapi.json"),
)
"""Ends of URLs that name a route of the service instead of its root."""

_EXAMPLE = "http://127.0.0.1:8000"


def service_url(url: object) -> str:
    """Return the root URL of the service, without a slash at its end; a path before the service's own is left in it.

    Raises:
        InvalidArgument: it is no URL with http:// or https:// and a host, or names one of the routes.
    """
    if not isinstance(url, str):
        raise InvalidArgument(f"The URL of the service must be a string such as {_EXAMPLE}, not {type(url).__name__}")
    parts = _split(url, "The URL of the service")
    if parts.scheme not in {"http", "https"}:
        raise InvalidArgument(f"The URL of the service must start with http:// or https://, such as {_EXAMPLE}")
    if parts.query or parts.fragment:
        raise InvalidArgument(f"The URL of the service must have no query and no fragment, such as {_EXAMPLE}")
    path = re.sub("/+$", "", parts.path)
    for route in ROUTES:
        if path.endswith(route):
            root = urlunsplit((parts.scheme, parts.netloc, path.removesuffix(route), "", ""))
            raise InvalidArgument(f"Give the root URL of the service, without {route}: {shown_url(root)}")
    root = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
    try:
        httpx2.URL(root).host.encode("idna")
    except (httpx2.InvalidURL, UnicodeError):
        raise InvalidArgument("The URL of the service has a host name that is not valid") from None
    return root


def proxy_url(proxy: object) -> str:
    """Return the URL of a proxy.

    Raises:
        InvalidArgument: it is no URL with http, https, socks5 or socks5h.
    """
    wanted = "A proxy must be a URL that starts with http://, https://, socks5:// or socks5h://"
    if not isinstance(proxy, str):
        raise InvalidArgument(f"{wanted}, not {type(proxy).__name__}")
    if _split(proxy, "The URL of the proxy").scheme not in {"http", "https", "socks5", "socks5h"}:
        raise InvalidArgument(f"{wanted}, such as http://proxy.example:3128")
    return proxy


def proxy_of_environment(url: str) -> str | None:
    """Return the proxy that ``http_proxy``, ``https_proxy`` or ``all_proxy`` name for a URL.

    None where ``no_proxy`` names its host, and for this machine: a proxy elsewhere cannot reach its loopback interface.
    Entries of ``no_proxy`` are host names, which also stand for the names below them, addresses, and networks such as
    ``10.0.0.0/8``.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]) or _in_network(host, proxies):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's loopback interface."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified  # 0.0.0.0 as a destination is this machine too


def shown_url(url: str) -> str:
    """Return a URL without the user name and the password in it."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _split(url: str, noun: str) -> SplitResult:
    if not url.strip():
        raise InvalidArgument(f"{noun} is empty")
    if re.search(r"[\s\x00-\x1f\x7f\\]", url):
        raise InvalidArgument(f"{noun} must have no spaces, line breaks or backslashes")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InvalidArgument(
            f"{noun} has a host or a port that cannot be read; the port is a number to 65535"
        ) from None
    # Without slashes, the part before a colon is read as the scheme: localhost:8000.
    if "://" in url and not parts.hostname:
        raise InvalidArgument(f"{noun} names no host")
    if port == 0:
        raise InvalidArgument(f"{noun} has port 0, which nothing listens on")
    return parts


def _in_network(host: str, proxies: dict[str, str]) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    for entry in proxies.get("no", "").split(","):
        try:
            if "/" in entry and address in ipaddress.ip_network(entry.strip(), strict=False):
                return True
        except ValueError:
            continue
    return False
