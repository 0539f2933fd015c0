"""Scores the request of any scoring route and notes what the access log, the metrics and the headers report of it."""

from __future__ import annotations

import time

from service.assembly import ServedModel
from service.diagnostics.item_state import Outcome
from service.errors import HttpError, Overloaded
from service.http.facts import RequestFacts
from service.http.loop_load import LoopLoad
from service.records import ScoreRequest, Timings
from service.request_state import ScoredRequest

SERVICE_UNAVAILABLE = 503


def note_parsed(served: ServedModel, facts: RequestFacts, num_items: int) -> float:
    """Note the items of a parsed request; return the seconds from its arrival.

    Raises:
        QuotaExceeded: the API key has used up its quota.
    """
    if facts.quota is not None:
        facts.quota.take(num_items)
    parse_s = time.perf_counter() - facts.started_at
    served.metrics.stage_duration.labels("parse").observe(parse_s)
    facts.items = num_items
    return parse_s


async def score_and_note(
    served: ServedModel, request: ScoreRequest, facts: RequestFacts, parse_s: float
) -> tuple[ScoredRequest, Timings]:
    """Score a request; return the answer and its timings, which include the stages that only the HTTP side measures.

    Raises:
        HttpError: as `Scorer.score`.
    """
    age_s = facts.age_s
    try:
        if facts.load is not None:
            _refuse_late(served, request, facts.load, facts.waited_s)
        scored = await served.scorer.score(request, age_s=age_s)
    except HttpError as error:
        if facts.quota is not None and error.status == SERVICE_UNAVAILABLE:
            facts.quota.give_back(len(request.items))
        raise
    total_s = time.perf_counter() - facts.started_at
    stages = scored.timings
    timings = Timings(parse_s, stages.tokenize_s, stages.queue_s, stages.engine_s, total_s, stages.admission_s)
    _note_answer(facts, scored.outcomes, scored.usage.scored_tokens, timings)
    return scored, timings


def _refuse_late(served: ServedModel, request: ScoreRequest, load: LoopLoad, waited_s: float) -> None:
    """Note the deadline of a request, and refuse one that the event loop could not answer in time.

    Raises:
        Overloaded: it could not, and does not wait for room until its deadline.
    """
    timeout_s = min(request.timeout_s, served.settings.limits.deadline_s)
    load.note_timeout(timeout_s)
    if request.waits_for_room:
        return
    try:
        load.refuse_late(timeout_s, waited_s)
    except Overloaded as refusal:
        served.metrics.shed.labels(reason=refusal.code).inc()
        served.metrics.items.labels(outcome="shed").inc(len(request.items))
        raise


def _note_answer(facts: RequestFacts, outcomes: tuple[Outcome, ...], scored_tokens: int, timings: Timings) -> None:
    facts.failed = sum(isinstance(outcome, HttpError) for outcome in outcomes)
    facts.scored_tokens = scored_tokens
    facts.timings = timings
