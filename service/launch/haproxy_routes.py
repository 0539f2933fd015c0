"""The routes in Ray's configuration of HAProxy: which there are, and which of the one before are kept. Pure.

While ``serve deploy`` builds a changed application, Ray forgets its route although its replicas run: the controller
clears the target state until the build has ended (``_clear_target_state_and_store_config`` in
ray/serve/_private/application_state.py), and HAProxy is reloaded without the application. Its callers would get 503 for
the seconds of the build, and 404 where another application has routes.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from service.errors import ServerStartError

Address = tuple[str, int]
"""Host and port of a replica."""
_SERVER = re.compile(r"(?m)^\s+server \S+ (\S+):(\d+) check(?! backup)")
_ROUTE = re.compile(r"(?m)^\s+use_backend (\S+) if is_\1$")
_AFTER_ROUTES = re.compile(r"(?m)^\s+default_backend ")
_AFTER_LABELS = re.compile(r"(?m)^\s+(# Static routing|use_backend )")


def has_routes(config: str) -> bool:
    """Whether a configuration has replicas to which requests go."""
    return _SERVER.search(config) is not None


def replicas_of(config: str) -> list[Address]:
    """Host and port of each replica in a configuration, or in a part of one."""
    return [(host, int(port)) for host, port in _SERVER.findall(config)]


def with_earlier_routes(config: str, previous: str, is_open: Callable[[Address], bool]) -> str:
    """Return a configuration with the routes that it lacks and that the one before it had.

    A route is kept while one of its replicas accepts connections and none of their addresses belongs to another
    application. An application that was deleted keeps its route until its replicas have ended and HAProxy is reloaded.

    Args:
        config: the new configuration, as `haproxy_config.changed` returns it.
        previous: the one that HAProxy has at present, of the same ports.
        is_open: returns whether a replica accepts connections.

    Raises:
        ServerStartError: a route has no place in the new configuration: another version of Ray.
    """
    if not has_routes(config):
        return previous if any(map(is_open, replicas_of(previous))) else config
    present = set(_ROUTE.findall(config))
    for name in _ROUTE.findall(previous):
        if name in present:
            continue
        replicas = replicas_of(_section(previous, name))
        if any(map(is_open, replicas)) and not set(replicas) & set(replicas_of(config)):
            config = _with_route(config, previous, name)
    return config


def _with_route(config: str, previous: str, name: str) -> str:
    """Insert a route among those of a configuration, which are tried from the longest prefix to the shortest."""
    known = rf"is_{re.escape(name)}"
    shorter = next((other for other in _ROUTE.findall(config) if _rank(config, other) > _rank(previous, name)), None)
    acls = _lines(previous, rf"acl {known} .*")
    labels = _lines(previous, rf"http-request set-var-fmt\(.* if {known} .*")
    route = _lines(previous, rf"use_backend .* if {known}")
    after_labels, after_routes = _AFTER_LABELS, _AFTER_ROUTES
    if shorter is not None:
        after_routes = re.compile(rf"(?m)^\s+use_backend {re.escape(shorter)} if ")
        after_labels = re.compile(rf"(?m)^\s+http-request set-var-fmt\(.* if is_{re.escape(shorter)} ")
    config = _inserted(config, re.compile(r"(?m)^\s+acl is_"), acls)
    config = _inserted(config, after_labels, labels)
    config = _inserted(config, after_routes, route)
    return _inserted(config, re.compile(r"(?m)^listen stats$"), _section(previous, name))


def _rank(config: str, name: str) -> tuple[int, str]:
    """The place of a route in Ray's order: by decreasing length of the prefix, then by the prefix."""
    found = re.search(rf"(?m)^\s+acl is_{re.escape(name)} path (\S+)$", config)
    prefix = found[1] if found else ""
    return -len(prefix), prefix


def _section(config: str, name: str) -> str:
    """The backend of a route, or nothing."""
    found = re.search(rf"(?m)^backend {re.escape(name)}\n(?:\s.*\n)*", config)
    return found[0] if found else ""


def _lines(config: str, pattern: str) -> str:
    return "".join(found[0] for found in re.finditer(rf"(?m)^\s+{pattern}\n", config))


def _inserted(config: str, before: re.Pattern[str], text: str) -> str:
    """Insert lines before the first line that a pattern matches."""
    if not text:
        return config
    found = before.search(config)
    if found is None:
        raise ServerStartError(
            f"Ray's configuration of HAProxy has no line for {before.pattern}: this version of Ray is not known."
        )
    return config[: found.start()] + text + config[found.start() :]
