"""The rolling monitors of a replica: one over everything it scores, and one for each run that names itself.

They hold state and know neither clock, thread nor metric: whoever calls them does so from one thread. A window is a row
of batches; a batch is closed once it is large enough, and between two requests, so that the completions of a prompt
stay together.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

from service.diagnostics.diagnosis import siblings_of
from service.diagnostics.monitors.alarms import SCOPES, SIGNALS, stepped, steps_of
from service.diagnostics.monitors.cusum import Cusum, family_threshold
from service.diagnostics.monitors.observation import Observation, ObservedItems
from service.diagnostics.monitors.reference import MonitorReference
from service.diagnostics.monitors.report import read_sums, read_window, window_correlation
from service.diagnostics.monitors.window import WindowStatistics, merge_windows, summarize
from service.errors import HttpError
from service.records import Score, ScoreRequest, TokenSequence
from service.settings import MonitorSettings

Listener = Callable[[ObservedItems, Sequence[Observation]], None]
"""Told of all items, each once, in groups that are whole."""


@dataclass(frozen=True, slots=True)
class MonitorState:
    """What a monitor knows, by value: of one replica, or of several merged.

    ``sums``: the cumulative sums by signal; merged, those that have run farthest. ``num_alarms``: alarms begun, by
    signal. ``threshold``: where a sum is an alarm. ``num_batches``: steps that the sums have made. ``num_replicas``:
    from how many this comes.
    """

    statistics: WindowStatistics
    threshold: float
    sums: dict[str, Cusum]
    num_alarms: dict[str, int]
    num_batches: int
    num_replicas: int = 1

    def merged(self, other: MonitorState) -> MonitorState:
        """Return both together: statistics and counts add up exactly, of each sum the farther side is kept."""
        return MonitorState(
            self.statistics.merged(other.statistics),
            self.threshold,
            {name: _farther(total, other.sums[name]) for name, total in self.sums.items()},
            dict(Counter(self.num_alarms) + Counter(other.num_alarms)),
            self.num_batches + other.num_batches,
            self.num_replicas + other.num_replicas,
        )


@dataclass(frozen=True, slots=True)
class MonitorView:
    """What one replica, or all of them, can say of everything or of one run. ``state`` is None of an unknown run.

    ``runs``: the runs that are remembered. ``incomplete``: whether some replica did not answer.
    """

    state: MonitorState | None
    runs: tuple[str, ...]
    incomplete: bool = False


class Monitor:
    """One window over a stream of items."""

    def __init__(self, settings: MonitorSettings, reference: MonitorReference | None) -> None:
        self._settings = settings
        self._reference = reference
        self._threshold = family_threshold(len(SIGNALS), settings.false_alarm_batches)
        self._pending: list[Observation] = []
        self._batches: deque[WindowStatistics] = deque()
        self._sums = {name: Cusum() for name in SIGNALS}
        self._num_alarms: Counter[str] = Counter()
        self._num_batches = 0

    def observe(self, items: Sequence[Observation]) -> None:
        """Take in the items of one request."""
        self._pending += items
        if len(self._pending) >= self._settings.batch_items:
            self._close_batch()

    def state(self) -> MonitorState:
        """Return the window with what has not filled a batch yet, and the sums as of the last full one."""
        statistics = merge_windows([*self._batches, self._summarized_pending()])
        return MonitorState(statistics, self._threshold, dict(self._sums), dict(self._num_alarms), self._num_batches)

    def _close_batch(self) -> None:
        batch = self._summarized_pending()
        self._pending = []
        self._batches.append(batch)
        num_items = sum(kept.num_items for kept in self._batches)
        while num_items - self._batches[0].num_items >= self._settings.window_items:
            num_items -= self._batches.popleft().num_items
        if self._reference is not None:
            self._step(batch, self._reference)

    def _step(self, batch: WindowStatistics, reference: MonitorReference) -> None:
        before = self._sums
        self._sums = stepped(before, steps_of(batch, reference), self._threshold)
        self._num_batches += 1
        self._num_alarms.update(name for name in SIGNALS if self._sums[name].alarming and not before[name].alarming)

    def _summarized_pending(self) -> WindowStatistics:
        thresholds = None if self._reference is None else self._reference.tell_thresholds
        return summarize(ObservedItems.of(self._pending), thresholds)


class Monitors:
    """All monitors of a replica.

    Args:
        settings: window, thresholds, number of runs.
        reference: of the calibration; without one nothing is said of drift.
        listener: told of every item once, some time after it was observed and at the latest by `flush`.
    """

    def __init__(
        self, settings: MonitorSettings, reference: MonitorReference | None, listener: Listener | None = None
    ) -> None:
        self.settings = settings
        self.reference = reference
        self._listener = listener
        self._all = Monitor(settings, reference)
        self._runs: OrderedDict[str, Monitor] = OrderedDict()
        self._untold: list[Observation] = []
        self._prompts = itertools.count(1)

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of the runs that are remembered, the one heard of last at the end."""
        return tuple(self._runs)

    def observe(self, items: Sequence[Observation], run_id: str | None = None) -> None:
        """Take in the scored items of one request, for everything and for its run."""
        if not items:
            return
        self._all.observe(items)
        if run_id is not None:
            self._run(run_id).observe(items)
        self._untold += items
        if len(self._untold) >= self.settings.batch_items:
            self.flush()

    def observe_request(
        self, request: ScoreRequest, encoded: Sequence[TokenSequence | HttpError], outcomes: Sequence[Score | HttpError]
    ) -> None:
        """Take in the items of a request that got a reward.

        Args:
            request: with its items and its run.
            encoded: what tokenization made of them, in order.
            outcomes: their Scores, or errors.
        """
        scores = {place: outcome for place, outcome in enumerate(outcomes) if isinstance(outcome, Score)}
        prompts: dict[int, int] = {}
        for group in siblings_of(request.items, scores):
            prompts |= dict.fromkeys(group, next(self._prompts))
        self.observe(
            [
                Observation(score, prompts.get(place) or next(self._prompts), *_length_of(encoded[place]))
                for place, score in scores.items()
            ],
            request.run_id,
        )

    def state(self, run_id: str | None = None) -> MonitorState | None:
        """Return what is known of everything, or of one run; None of a run that is not remembered."""
        if run_id is None:
            return self._all.state()
        monitor = self._runs.get(run_id)
        return None if monitor is None else monitor.state()

    def view(self, run_id: str | None = None) -> MonitorView:
        """Return `state` with the names of the runs."""
        return MonitorView(self.state(run_id), self.runs)

    def flush(self) -> None:
        """Tell the listener what it has not been told."""
        if self._listener is not None and self._untold:
            self._listener(ObservedItems.of(self._untold), self._untold)
        self._untold = []

    def _run(self, run_id: str) -> Monitor:
        if run_id not in self._runs:
            self._runs[run_id] = Monitor(self.settings, self.reference)
            if len(self._runs) > self.settings.max_runs:
                self._runs.popitem(last=False)
        self._runs.move_to_end(run_id)
        return self._runs[run_id]


def _length_of(encoded: TokenSequence | HttpError) -> tuple[int | None, bool]:
    """Return the completion's tokens, where the border to the prompt is known, and whether the prompt was cut."""
    return (encoded.num_completion_tokens, encoded.truncated) if isinstance(encoded, TokenSequence) else (None, False)


def merge_states(states: Iterable[MonitorState]) -> MonitorState | None:
    """Return the states of several replicas together; None where there is none."""
    return reduce(MonitorState.merged, states) if (states := list(states)) else None


def merge_views(views: Iterable[MonitorView], *, incomplete: bool) -> MonitorView:
    """Return what several replicas say together."""
    known = list(views)
    state = merge_states(view.state for view in known if view.state is not None)
    return MonitorView(state, tuple(sorted({run for view in known for run in view.runs})), incomplete)


def describe_state(
    state: MonitorState, reference: MonitorReference | None, settings: MonitorSettings
) -> dict[str, Any]:
    """Say what a state means, JSON-ready, for ``/v1/monitor``."""
    readings = read_window(state.statistics, reference, settings)
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
            *({"name": found.name, "scope": found.scope, "severity": found.state}
              for found in readings if found.state in {"warn", "critical"}),
            *({"name": f"cusum_{found.signal}", "scope": None, "severity": "warn"} for found in sums if found.alarm),
        ],
        "monitors": [asdict(reading) for reading in readings],
        "cusum": {
            "definition": "Two-sided cumulative sums of batches against the reference, in standard errors; alarm above "
            "the threshold. Designed for one false alarm of all signals together in false_alarm_batches batches.",
            "threshold": state.threshold,
            "batches": state.num_batches,
            "false_alarm_batches": settings.false_alarm_batches,
            "signals": [asdict(found) for found in sums],
        },
    }  # fmt: skip


def _farther(one: Cusum, other: Cusum) -> Cusum:
    return Cusum(
        max(one.up, other.up),
        max(one.down, other.down),
        one.alarming_up or other.alarming_up,
        one.alarming_down or other.alarming_down,
    )
