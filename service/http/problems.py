"""Responses for errors: every refusal, also one of the web framework, becomes an RFC 9457 problem."""

from __future__ import annotations

import difflib
import random

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from service.errors import ClientGone, HttpError, InternalError, MethodNotAllowed, RouteNotFound, Unauthenticated
from service.http.facts import RequestFacts, facts_of
from service.protocols.problem import MEDIA_TYPE, render_problem, retry_after_s

CHALLENGES = 'Bearer realm="reward-service", Basic realm="reward-service", charset="UTF-8"'
"""How a key may be presented."""
MAX_COMPARED_CHARS = 64
"""Characters of a path that is no route which are compared with the routes."""


def problem_response(error: HttpError, facts: RequestFacts) -> Response:
    """The response for an error; its code goes into the facts."""
    return Response(render_problem(error, facts.request_id), error.status, problem_headers(error, facts), MEDIA_TYPE)


def problem_headers(error: HttpError, facts: RequestFacts) -> dict[str, str]:
    """The headers of an answer with an error; its code goes into the facts."""
    facts.code = error.code
    wait_s = retry_after_s(error, random.random())  # noqa: S311 - spreads clients over time, protects nothing
    headers = {} if wait_s is None else {"Retry-After": str(wait_s)}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = CHALLENGES
    return headers


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)  # noqa: S101 - Starlette looks handlers up by class
    return problem_response(error, facts_of(request))


async def _on_framework_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - as above
    headers = dict(error.headers or {})
    if "Allow" in headers:
        headers["Allow"] = ", ".join(sorted(headers["Allow"].split(", ")))
    known: dict[int, HttpError] = {
        404: RouteNotFound(_no_such_route(request)),
        405: MethodNotAllowed(f"This route takes {headers.get('Allow', 'other methods')}"),
    }
    response = problem_response(known.get(error.status_code, InternalError()), facts_of(request))
    response.headers.update(headers)
    return response


def _no_such_route(request: Request) -> str:
    """The detail of a 404; it names the nearest route and never the path, which is the client's text."""
    paths = [route.path for route in request.app.routes]
    nearest = difflib.get_close_matches(request.url.path[:MAX_COMPARED_CHARS], paths, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else "; /openapi.json lists the routes"
    return f"There is no such route here{hint}"


async def _on_disconnect(request: Request, _: Exception) -> Response:
    return problem_response(ClientGone("The client left before its request was complete"), facts_of(request))


EXCEPTION_HANDLERS = {
    HttpError: _on_http_error,
    HTTPException: _on_framework_error,
    ClientDisconnect: _on_disconnect,
}
"""Starlette's handlers by exception class."""
