"""The rolling monitors of a replica: one over all items that it scores, and one for each run that sends an id.

They hold state and use no thread or metric; clocks are passed in, and all calls must come from one thread. A window is
a queue of batches. A batch is closed once it is large enough, and only between two requests, so that the completions of
a prompt stay in one batch.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.diagnosis import siblings_of
from service.diagnostics.item_state import ItemState
from service.diagnostics.monitors.alarm_times import AlarmTimes, earliest, iso_time, window_alarms
from service.diagnostics.monitors.alarms import SIGNALS, stepped, steps_of
from service.diagnostics.monitors.cusum import Cusum, family_threshold
from service.diagnostics.monitors.distributions import NO_ITEMS, numbers_of
from service.diagnostics.monitors.drift import DriftState
from service.diagnostics.monitors.drift_monitor import UNCALIBRATED, DriftMonitor, DriftSubject
from service.diagnostics.monitors.drift_report import describe_drift, drift_alarms
from service.diagnostics.monitors.observation import Observation, ObservedItems
from service.diagnostics.monitors.reference import MonitorReference
from service.diagnostics.monitors.report import read_sums, read_window, window_correlation
from service.diagnostics.monitors.window import WindowStatistics, merge_windows, summarize
from service.diagnostics.phrasing import Wording
from service.records import SCOPES, Scope, Score
from service.settings import MonitorSettings

IDLE_S = 3600.0
"""Seconds without a request after which a run may be dropped for a new one, however many items it had."""

Listener = Callable[[ObservedItems, Sequence[Observation]], None]
"""Called with all items, each once; the completions of a prompt come in one call."""


@dataclass(frozen=True, slots=True, eq=False)
class MonitorState:
    """The state of a monitor by value: of one replica, or of several merged."""

    statistics: WindowStatistics

    threshold: float
    """Above it a cumulative sum is in alarm."""

    sums: dict[str, Cusum]
    """Cumulative sums by signal; merged, the largest of each direction."""

    num_alarms: dict[str, int]
    """Alarms that have begun, by signal."""

    num_batches: int
    """Steps of the cumulative sums."""

    drift: DriftState

    num_replicas: int = 1
    """Number of replicas that were merged."""

    items: NDArray[np.float32] = field(default_factory=lambda: NO_ITEMS, repr=False)
    """Reward, completion tokens and p-value of each item of the window, [n, 3]."""

    alarm_times: AlarmTimes = field(default_factory=dict)
    """When each alarm that is on has begun, as of the last full batch; merged, the earliest time."""

    def merged(self, other: MonitorState) -> MonitorState:
        """Return both merged: statistics and counts exactly, of each cumulative sum the larger value."""
        return MonitorState(
            self.statistics.merged(other.statistics),
            self.threshold,
            {name: _largest(total, other.sums[name]) for name, total in self.sums.items()},
            dict(Counter(self.num_alarms) + Counter(other.num_alarms)),
            self.num_batches + other.num_batches,
            self.drift.merged(other.drift),
            self.num_replicas + other.num_replicas,
            np.concatenate([self.items, other.items]),
            earliest(self.alarm_times, other.alarm_times),
        )


@dataclass(frozen=True, slots=True)
class MonitorView:
    """The answer of one replica, or of all of them, about all items or about one run."""

    state: MonitorState | None
    """None for an unknown run."""

    runs: tuple[str, ...]
    """Names of the runs that have a window."""

    incomplete: bool = False
    """Whether a replica did not answer, or serves another model or calibration."""

    build: str = ""
    """Model, calibration and code of the replica: only views of one build have the same statistics."""


class Monitor:
    """One rolling window over a stream of items, with its cumulative sums.

    Args:
        settings: window and thresholds.
        reference: reference of the calibration; without one (None) drift is not monitored.
        wall_clock: seconds since 1970, for the times of alarms.
        subject: what the drift monitor compares.
    """

    def __init__(
        self,
        settings: MonitorSettings,
        reference: MonitorReference | None,
        wall_clock: Callable[[], float] = time.time,
        subject: DriftSubject = UNCALIBRATED,
    ) -> None:
        self._settings = settings
        self._reference = reference
        self._wall_clock = wall_clock
        self._alarm_times = AlarmTimes()
        self._items: deque[NDArray[np.float32]] = deque()
        self._threshold = family_threshold(len(SIGNALS), settings.false_alarm_batches)
        self._pending: list[Observation] = []
        self._batches: deque[WindowStatistics] = deque()
        self._sums = {name: Cusum() for name in SIGNALS}
        self._num_alarms: Counter[str] = Counter()
        self._num_batches = 0
        self._num_closed = 0
        self._drift = DriftMonitor(subject, settings.false_alarm_batches, settings.drift_prompts)
        self.seen_at = 0.0
        """When a request of the run was last seen, in seconds of the clock; set by the owner."""

    @property
    def num_batches(self) -> int:
        """Batches that are complete, those that have left the window included."""
        return self._num_closed

    def observe(self, items: Sequence[Observation]) -> None:
        """Add the items of one request."""
        self._pending += items
        if len(self._pending) >= self._settings.batch_items:
            self._close_batch()

    def state(self) -> MonitorState:
        """Return the window, items of the unfinished batch included, and the sums as of the last full batch."""
        statistics = merge_windows([*self._batches, self._summarized_pending()])
        return MonitorState(
            statistics,
            self._threshold,
            dict(self._sums),
            dict(self._num_alarms),
            self._num_batches,
            self._drift.state(),
            items=np.concatenate([*self._items, numbers_of(self._pending)]),
            alarm_times=dict(self._alarm_times),
        )

    def _close_batch(self) -> None:
        batch = self._summarized_pending()
        self._drift.observe(self._pending)
        self._items.append(numbers_of(self._pending))
        self._pending = []
        self._num_closed += 1
        self._batches.append(batch)
        num_items = sum(closed.num_items for closed in self._batches)
        while num_items - self._batches[0].num_items >= self._settings.window_items:
            num_items -= self._batches.popleft().num_items
            self._items.popleft()
        if self._reference is not None:
            self._step(batch, self._reference)
        self._note_alarms()

    def _step(self, batch: WindowStatistics, reference: MonitorReference) -> None:
        before = self._sums
        self._sums = stepped(before, steps_of(batch, reference), self._threshold)
        self._num_batches += 1
        self._num_alarms.update(name for name in SIGNALS if self._sums[name].alarming and not before[name].alarming)

    def _note_alarms(self) -> None:
        """Note the time of alarms that have begun with this batch, and forget that of alarms that have ended."""
        drifting = {f"cusum_{name}" for name in SIGNALS if self._sums[name].alarming}
        alarms = drifting | window_alarms(self._batches, self._reference, self._settings)
        alarms |= set(drift_alarms(self._drift.state()))
        now = self._wall_clock()
        self._alarm_times = {name: self._alarm_times.get(name, now) for name in alarms}

    def _summarized_pending(self) -> WindowStatistics:
        thresholds = None if self._reference is None else self._reference.style_thresholds
        return summarize(ObservedItems.of(self._pending), thresholds)


class Monitors:
    """All monitors of a replica.

    Args:
        settings: window, thresholds, number of runs.
        reference: reference of the calibration; without one (None) drift is not monitored.
        listener: called with every item once, some time after it was observed and at the latest by `flush`.
        clock: seconds, monotonic.
        subject: what the drift monitors compare.
    """

    def __init__(
        self,
        settings: MonitorSettings,
        reference: MonitorReference | None,
        listener: Listener | None = None,
        clock: Callable[[], float] = time.monotonic,
        subject: DriftSubject = UNCALIBRATED,
    ) -> None:
        self.settings = settings
        self.reference = reference
        self.subject = subject
        self._listener = listener
        self._clock = clock
        self._all = Monitor(settings, reference, subject=subject)
        self._runs: OrderedDict[str, Monitor] = OrderedDict()
        self._unreported: list[Observation] = []
        self._prompts = itertools.count(1)

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of the runs that have a window, the least recently used one first."""
        return tuple(self._runs)

    def observe(self, items: Sequence[Observation], run_id: str | None = None) -> None:
        """Add the scored items of one request to the common window and to that of its run."""
        if not items:
            return
        self._all.observe(items)
        if run_id is not None:
            self._run(run_id).observe(items)
        self._unreported += items
        if len(self._unreported) >= self.settings.batch_items:
            self.flush()

    def observe_request(self, items: Sequence[ItemState], run_id: str | None = None) -> None:
        """Add those of all items of a request that have a reward, as `observe`."""
        scores = {index: item.outcome for index, item in enumerate(items) if isinstance(item.outcome, Score)}
        prompts: dict[int, int] = {}
        for group in siblings_of(items, scores):
            prompts |= dict.fromkeys(group, next(self._prompts))
        self.observe(
            [
                Observation(
                    score,
                    prompts.get(index) or next(self._prompts),
                    *_length_of(items[index]),
                    _wording_of(items[index]),
                )
                for index, score in scores.items()
            ],
            run_id,
        )

    def state(self, run_id: str | None = None) -> MonitorState | None:
        """Return the state of the common window, or of one run's; None for a run without a window."""
        if run_id is None:
            return self._all.state()
        monitor = self._runs.get(run_id)
        return None if monitor is None else monitor.state()

    def view(self, run_id: str | None = None) -> MonitorView:
        """Return `state` together with the names of the runs."""
        return MonitorView(self.state(run_id), self.runs)

    def flush(self) -> None:
        """Pass the items to the listener that it has not received yet."""
        if self._listener is not None and self._unreported:
            self._listener(ObservedItems.of(self._unreported), self._unreported)
        self._unreported = []

    def _run(self, run_id: str) -> Monitor:
        if run_id not in self._runs:
            if len(self._runs) >= self.settings.max_runs:
                del self._runs[self._dropped_run()]
            self._runs[run_id] = Monitor(self.settings, self.reference, subject=self.subject)
        self._runs.move_to_end(run_id)
        self._runs[run_id].seen_at = self._clock()
        return self._runs[run_id]

    def _dropped_run(self) -> str:
        """Return the run that makes room.

        It is the least recently seen one, if it has been idle for ``IDLE_S``; else one with the fewest batches. A
        caller who sends many names has runs of few items, which displace each other and no run in training.
        """
        oldest = next(iter(self._runs))
        if self._clock() - self._runs[oldest].seen_at >= IDLE_S:
            return oldest
        fewest = min(run.num_batches for run in self._runs.values())
        return next(name for name, run in self._runs.items() if run.num_batches == fewest)


def _length_of(item: ItemState) -> tuple[int | None, bool]:
    """Return the number of completion tokens (None where unknown), and whether the item was truncated."""
    sequence = item.sequence
    return (None, False) if sequence is None else (sequence.num_completion_tokens, sequence.truncated)


def _wording_of(item: ItemState) -> Wording | None:
    return None if item.text is None else item.text.wording


def merge_states(states: Iterable[MonitorState]) -> MonitorState | None:
    """Return the states of several replicas merged; None where there is none."""
    return reduce(MonitorState.merged, states) if (states := list(states)) else None


def merge_views(views: Iterable[MonitorView], *, incomplete: bool) -> MonitorView:
    """Return the views of several replicas merged; those of another build than the first one's are left out."""
    first, *others = views
    known = [first, *(view for view in others if view.build == first.build)]
    incomplete = incomplete or len(known) <= len(others)
    state = merge_states(view.state for view in known if view.state is not None)
    return MonitorView(state, tuple(sorted({run for view in known for run in view.runs})), incomplete, first.build)


def describe_state(
    state: MonitorState,
    reference: MonitorReference | None,
    settings: MonitorSettings,
    outputs: Sequence[str] = (),
    subject: DriftSubject = UNCALIBRATED,
) -> dict[str, Any]:
    """Return a state as JSON-ready values for ``/v1/monitor``.

    Args:
        state: of one replica, or of several merged.
        reference: of the calibration.
        settings: of the monitors.
        outputs: names of the outputs of the model.
        subject: what the drift monitors compare.
    """
    readings = read_window(state.statistics, reference, settings, outputs)
    sums = read_sums(state.sums, state.num_alarms, state.threshold) if reference is not None else []
    return {
        "window": {
            "items": state.statistics.num_items,
            "prompts": state.statistics.clusters.prompts,
            "size": settings.window_items * state.num_replicas,
            "batch_items": settings.batch_items,
            "ess": {scope: max(0.0, window_correlation(state.statistics, scope).size) for scope in SCOPES},
            "replicas": state.num_replicas,
        },
        "alarms": [
            *(_alarm(found.name, found.scope, found.state, state)
              for found in readings if found.state in {"warn", "critical"}),
            *(_alarm(f"cusum_{found.signal}", None, "warn", state) for found in sums if found.alarm),
            *(_alarm(name, None, "warn", state) for name in drift_alarms(state.drift)),
        ],
        "monitors": [asdict(reading) for reading in readings],
        "cusum": {
            "definition": "Two-sided cumulative sums of each batch's deviation from the reference in standard errors. "
            "Above the threshold a sum is in alarm. Designed for one false alarm of all signals together in "
            "false_alarm_batches batches.",
            "threshold": state.threshold,
            "batches": state.num_batches,
            "false_alarm_batches": settings.false_alarm_batches,
            "signals": [asdict(found) for found in sums],
        },
        "drift": describe_drift(state.drift, subject, settings.false_alarm_batches),
    }  # fmt: skip


def _alarm(name: str, scope: Scope | None, severity: str, state: MonitorState) -> dict[str, Any]:
    since = state.alarm_times.get(name if scope is None else f"{name}_{scope}")
    return {"name": name, "scope": scope, "severity": severity, "since": None if since is None else iso_time(since)}


def _largest(one: Cusum, other: Cusum) -> Cusum:
    return Cusum(
        max(one.up, other.up),
        max(one.down, other.down),
        one.alarming_up or other.alarming_up,
        one.alarming_down or other.alarming_down,
    )
