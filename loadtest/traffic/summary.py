"""The figures of a load test, for each stream of each phase: what was offered, what came back, and how late."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loadtest.traffic.checking import Checked, ExpectedReward, check
from loadtest.traffic.execution import NO_ANSWER, Batch, Exchange, PhaseRun
from loadtest.traffic.latencies import Latencies, latencies_of
from loadtest.traffic.phases import OpenStream, Stream

OVERLOADED = 503

UNANSWERED = "no answer"
"""Among the statuses: requests whose connection was refused, or broke."""


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """The batches of a burst stream."""

    num_batches: int
    completion_s: Latencies

    stall_fraction: float
    """Of the time of the loop, the part in which the trainer waits for rewards."""


@dataclass(frozen=True, slots=True)
class Second:
    """One second of a phase, by the intended start of the requests: items by what became of them."""

    good: int = 0
    late: int = 0
    refused: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class StreamSummary:
    """A stream in a phase."""

    phase: str
    stream: str
    factor: float | None
    """Offered load as a multiple of the measured capacity, where the phase is a step of an overload."""

    duration_s: float
    requests: int
    items: int
    offered_items_per_s: float

    answered_items_per_s: float
    """Items with a reward, until the last answer of the phase."""

    goodput_items_per_s: float
    """Items with a right reward within the time limit from the intended start, per second of the phase."""

    good_items: int
    late_items: int
    wrong_items: int
    item_errors: Mapping[str, int]

    statuses: Mapping[str, int]
    """Requests by HTTP status; ``none`` for those without an answer."""

    codes: Mapping[str, int]
    """Refused and failed requests by the code of the problem, or by the exception."""

    unexplained: int
    """Answers that are neither rewards nor a problem with a code."""

    retry_after_share: float | None
    """Share of the 503 answers with Retry-After; None without one."""

    latency_s: Latencies
    """Of answers with status 200, from the intended start."""

    settled_latency_s: Latencies
    """The same, of requests that were to start later than the time limit after the begin of their stream. A queue that
    filled at the begin, when a step cannot be told from a burst, is answered by then."""

    service_s: Latencies
    """Of all of these, from the first byte sent."""

    refusal_s: Latencies
    """Of 503 answers, from the first byte sent."""

    send_lag_s: Latencies
    """From the intended start to the first byte sent: how late this process or its connections were."""

    batches: BatchSummary | None
    seconds: Sequence[Second]


def summarize(run: PhaseRun, *, within_s: float, expected: ExpectedReward | None) -> list[StreamSummary]:
    """Check all answers of a phase and return the figures of each stream.

    Args:
        run: of the phase.
        within_s: time limit of a good answer.
        expected: gives the right rewards; None: they are unknown.
    """
    by_stream: defaultdict[str, list[Exchange]] = defaultdict(list)
    for exchange in run.exchanges:
        by_stream[exchange.request.stream].append(exchange)
    return [
        _summary(run, stream, by_stream[stream.name], within_s, expected)
        for stream in run.phase.streams
        if by_stream[stream.name]
    ]


def _summary(
    run: PhaseRun, stream: Stream, exchanges: Sequence[Exchange], within_s: float, expected: ExpectedReward | None
) -> StreamSummary:
    checked = [Checked() if exchange.status == NO_ANSWER else check(exchange, expected) for exchange in exchanges]
    answered = [exchange for exchange in exchanges if exchange.status == 200]
    refused = [exchange for exchange in exchanges if exchange.status == OVERLOADED]
    is_good = [exchange.latency_s <= within_s for exchange in exchanges]
    good = sum(one.num_rewards for one, good in zip(checked, is_good, strict=True) if good)
    rewards = sum(one.num_rewards for one in checked)
    items, duration_s = sum(exchange.num_items for exchange in exchanges), run.phase.duration_s
    begin_s = stream.begin_s if isinstance(stream, OpenStream) else 0.0
    return StreamSummary(
        phase=run.phase.name,
        stream=stream.name,
        factor=stream.factor if isinstance(stream, OpenStream) else None,
        duration_s=duration_s,
        requests=len(exchanges),
        items=items,
        offered_items_per_s=items / duration_s,
        answered_items_per_s=rewards / max(duration_s, max(exchange.done_s for exchange in exchanges) - begin_s),
        goodput_items_per_s=good / duration_s,
        good_items=good,
        late_items=rewards - good,
        wrong_items=sum(one.num_wrong for one in checked),
        item_errors=dict(sum((one.item_errors for one in checked), Counter[str]())),
        statuses=dict(Counter(str(exchange.status) if exchange.status else UNANSWERED for exchange in exchanges)),
        codes=dict(Counter(code for pair in zip(exchanges, checked, strict=True) if (code := _code(*pair)))),
        unexplained=sum(one.is_malformed for one in checked),
        retry_after_share=statistics.fmean(one.has_retry_after for one in refused) if refused else None,
        latency_s=latencies_of(exchange.latency_s for exchange in answered),
        settled_latency_s=latencies_of(one.latency_s for one in answered if one.intended_s >= begin_s + within_s),
        service_s=latencies_of(exchange.service_s for exchange in answered),
        refusal_s=latencies_of(exchange.service_s for exchange in refused),
        send_lag_s=latencies_of(exchange.sent_s - exchange.intended_s for exchange in exchanges),
        batches=_batches([batch for batch in run.batches if batch.stream == stream.name]),
        seconds=_seconds(exchanges, checked, within_s, begin_s, duration_s),
    )


def recovered_after_s(summary: StreamSummary, share: float = 0.95) -> float | None:
    """Return from which second on at least this share of the items of every second was good; None: from none on."""
    after = len(summary.seconds)
    for number in reversed(range(len(summary.seconds))):
        second = summary.seconds[number]
        if second.good < share * (second.good + second.late + second.refused + second.failed):
            break
        after = number
    return None if after == len(summary.seconds) else float(after)


def _code(exchange: Exchange, checked: Checked) -> str:
    return exchange.failure or checked.code


def _batches(batches: Sequence[Batch]) -> BatchSummary | None:
    if not batches:
        return None
    waited_s = sum(batch.completion_s for batch in batches)
    trained_s = sum(batch.train_s for batch in batches)
    completion_s = latencies_of(batch.completion_s for batch in batches)
    return BatchSummary(len(batches), completion_s, waited_s / max(1e-9, waited_s + trained_s))


def _seconds(
    exchanges: Sequence[Exchange], checked: Sequence[Checked], within_s: float, begin_s: float, duration_s: float
) -> list[Second]:
    counts = [Counter[str]() for _ in range(max(1, int(duration_s) + (duration_s % 1 > 0)))]
    for exchange, one in zip(exchanges, checked, strict=True):
        second = counts[min(len(counts) - 1, int(exchange.intended_s - begin_s))]
        if exchange.status == OVERLOADED:
            second["refused"] += exchange.num_items
            continue
        second["good" if exchange.latency_s <= within_s else "late"] += one.num_rewards
        second["failed"] += exchange.num_items - one.num_rewards
    return [Second(**count) for count in counts]
