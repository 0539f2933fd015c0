"""Every metric of a replica, declared once with its unit and buckets; and the merging of all replicas' expositions.

Each replica counts for itself in a registry of its own and knows nothing of its siblings. Label values come from closed
sets in our code, never from a request, so the number of series is bounded.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from service.errors import Draining, EngineUnavailable, NotReady, Overloaded
from service.records import SCOPES, ModelIdentity

SECONDS = tuple(0.001 * 2**power for power in range(16))
"""1 ms to 32.768 s."""

COUNTS = tuple(2**power for power in range(13))
"""1 to 4,096 items."""

TOKENS = tuple(2**power for power in range(18))
"""1 to 131,072 tokens."""

REWARDS = tuple(sorted([*range(-16, 17), -0.5, 0.5]))
"""-16 to 16 in steps of 1, and +-0.5."""

REWARDS_Z = tuple(step / 2 for step in range(-8, 9))
"""-4 to 4 reference deviations in steps of a half."""

P_VALUES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
"""The edges at which rates of false alarms are read."""

MOMENTS = ("n", "groups", "zr_pos", "zr_neg", "zl_pos", "zl_neg", "zr2", "zl2", "sum2", "diff2")
"""Sums of which PromQL makes the correlation of reward and length, none of which can fall; see docs/monitoring.md."""

OUTCOMES = ("ok", "truncated", "invalid", "non_finite", "shed", "expired", "cancelled", "error")
STYLES = ("headers", "list_items", "bold", "emoji", "hedges", "flattery")


class Metrics:
    """The metrics of one replica. Attributes are the metrics themselves; their help texts say what they count."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._declare_traffic()
        self._declare_time()
        self._declare_batcher()
        self._declare_health()
        self._declare_quality()
        self._declare_monitors()
        self._refresh: Callable[[], None] = lambda: None

    def refresh_with(self, refresh: Callable[[], None]) -> None:
        """Call this before every rendering, to bring up to date what is counted in batches."""
        self._refresh = refresh

    def render(self) -> bytes:
        """Return the exposition of this replica in Prometheus' text format 0.0.4."""
        self._refresh()
        return generate_latest(self.registry)

    def describe_calibration(self, calibration_id: str, n_cal: int, n_prompts: int, created_s: float) -> None:
        """Publish which calibration p-values are ranks in; once. ``created_s``: seconds since 1970."""
        for metric in (self.calibration, self.calibration_created):
            self.registry.register(metric)
        self.calibration.info({"id": calibration_id, "n_cal": str(n_cal), "n_prompts": str(n_prompts)})
        self.calibration_created.set(created_s)

    def describe_model(self, identity: ModelIdentity, sha256: str, dtype: str, device: str) -> None:
        """Publish what is served."""
        self.model.info(
            {"model": identity.name, "version": identity.version, "sha256": sha256, "dtype": dtype, "device": device}
        )

    def describe_build(self, version: str, revision: str) -> None:
        """Publish which code serves it."""
        self.build.info({"version": version, "revision": revision, "python": platform.python_version()})

    def observe_request(self, route: str, code: str, seconds: float) -> None:
        """Count one answered request.

        Args:
            route: the route's template, never a path that a client sent.
            code: the HTTP status, or the code of the problem that was answered.
            seconds: from arrival to answer.
        """
        self.requests.labels(route=route, code=code).inc()
        self.request_duration.labels(route=route).observe(seconds)

    def _declare_traffic(self) -> None:
        registry = self.registry
        self.requests = Counter(
            "rm_requests", "Requests by route and by HTTP status or problem code.", ["route", "code"], registry=registry
        )
        self.items = Counter(
            "rm_items",
            "Items by outcome: ok, truncated (scored, prompt cut), invalid (refused alone), non_finite, shed, expired, "
            "cancelled (client gone), error.",
            ["outcome"],
            registry=registry,
        )
        for outcome in OUTCOMES:  # increase() misses what a series begins with
            self.items.labels(outcome=outcome)
        self.tokens = Counter(
            "rm_tokens",
            "Tokens of batches: real (of the sequences), padding (computed beside them), shared (the part of real that "
            "was not computed again), kept (the part of shared that an earlier pass had computed).",
            ["kind"],
            registry=registry,
        )
        self.shed = Counter("rm_shed", "Requests refused on purpose, by reason.", ["reason"], registry=registry)
        for refusal in (Overloaded, NotReady, Draining, EngineUnavailable):
            self.shed.labels(reason=refusal.code)
        self.reward = Histogram("rm_reward", "Raw rewards. The sum can fall.", buckets=REWARDS, registry=registry)
        self.completion_length = Histogram(
            "rm_completion_length_tokens",
            "Completion tokens of scored items whose border between prompt and completion is known.",
            buckets=TOKENS,
            registry=registry,
        )

    def _declare_time(self) -> None:
        self.request_duration = Histogram(
            "rm_request_duration_seconds",
            "From the arrival of a request to its answer.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.stage_duration = Histogram(
            "rm_stage_duration_seconds",
            "Time in a stage: parse, tokenize, queue and serialize once a request; forward and diagnose once a batch.",
            ["stage"],
            buckets=SECONDS,
            registry=self.registry,
        )

    def _declare_batcher(self) -> None:
        registry = self.registry
        self.queue_items = Gauge("rm_queue_items", "Sequences that wait for the engine.", registry=registry)
        self.queue_tokens = Gauge(
            "rm_queue_tokens", "Tokens that wait, those of requests being tokenized estimated.", registry=registry
        )
        self.queue_oldest = Gauge(
            "rm_queue_oldest_seconds", "How long the oldest waiting sequence has waited.", registry=registry
        )
        self.inflight_items = Gauge("rm_inflight_items", "Items accepted and not yet answered.", registry=registry)
        self.budget_tokens = Gauge("rm_budget_tokens", "Tokens that one forward pass may hold.", registry=registry)
        self.batch_items = Histogram("rm_batch_items", "Sequences of a batch.", buckets=COUNTS, registry=registry)
        self.batch_tokens = Histogram("rm_batch_tokens", "Tokens of a batch.", buckets=TOKENS, registry=registry)
        self.forwards = Counter(
            "rm_forward_passes",
            "Forward passes; more than batches where a failing batch was halved.",
            registry=registry,
        )

    def _declare_health(self) -> None:
        registry = self.registry
        self.model = Info("rm_model", "What is served.", registry=registry)
        self.build = Info("rm_build", "Which code serves it.", registry=registry)
        self.ready = Gauge("rm_ready", "1 when this replica takes requests.", registry=registry)
        self.oom = Counter("rm_oom", "Batches that ran out of the device's memory.", registry=registry)
        self.replica_starts = Counter("rm_replica_starts", "Starts of this replica.", registry=registry)
        self.replica_starts.inc()

    def _declare_quality(self) -> None:
        registry = self.registry
        self.ood_flag = Counter(
            "rm_ood_flag", "Items flagged as out of distribution, by what decided.", ["reason"], registry=registry
        )
        self.ood_pvalue = Histogram(
            "rm_ood_pvalue",
            "Conformal p-values; uniform on what the calibration knows. Their count is the number of judged items.",
            buckets=P_VALUES,
            registry=registry,
        )
        self.ood_neglogp = Counter(
            "rm_ood_neglogp", "Sum of the judged items' combined -ln p, each capped at 12.", registry=registry
        )
        self.reward_z = Histogram(
            "rm_reward_z",
            "Rewards in deviations from the calibration's mean. The sum can fall.",
            buckets=REWARDS_Z,
            registry=registry,
        )
        self.moment = Counter(
            "rm_moment",
            "Sums over items of the standardised reward (zr) and log length (zl), pooled or about the means of their "
            "prompts; groups counts prompts.",
            ["stat", "scope"],
            registry=registry,
        )
        self.style = Counter("rm_style", "Tells of style in completions, by kind.", ["kind"], registry=registry)
        self.words = Counter("rm_words", "Words of the completions in which tells were counted.", registry=registry)
        self.groups = Counter(
            "rm_groups", "Prompts with two or more judged completions in one request.", registry=registry
        )
        self.top1_ood = Counter(
            "rm_top1_ood", "Those of rm_groups whose best completion is flagged.", registry=registry
        )
        self.pairs = Counter("rm_pairs", "Pairs of completions of one prompt.", registry=registry)
        self.tied_pairs = Counter("rm_tied_pairs", "Those of rm_pairs with the same reward.", registry=registry)
        for stat in MOMENTS:
            for scope in SCOPES:
                self.moment.labels(stat=stat, scope=scope)
        for kind in STYLES:
            self.style.labels(kind=kind)

    def _declare_monitors(self) -> None:
        registry = self.registry
        window = "of this replica's rolling window; NaN while unknown."
        self.length_corr = Gauge(
            "rm_reward_length_corr", f"Correlation of reward and log length {window}", ["scope"], registry=registry
        )
        self.length_corr_ci_low = Gauge(
            "rm_reward_length_corr_ci_low",
            f"The least |r| that the data allow at 95 percent, {window}",
            ["scope"],
            registry=registry,
        )
        self.style_r2 = Gauge(
            "rm_style_r2_within",
            f"Share of the rewards' variance within prompts that length and style explain, {window}",
            registry=registry,
        )
        self.group_centered = Gauge(
            "rm_group_centered_n", "Items of the rolling window that have siblings.", registry=registry
        )
        self.ood_reward_gap = Gauge(
            "rm_ood_reward_gap",
            f"Mean standardised reward of flagged items less that of the others, {window}",
            registry=registry,
        )
        self.tie_rate = Gauge(
            "rm_tie_rate", f"Share of sibling pairs with the same reward, {window}", registry=registry
        )
        self.cusum = Gauge(
            "rm_cusum",
            "How far a signal has run from its reference, in standard errors of a batch.",
            ["signal", "direction"],
            registry=registry,
        )
        self.cusum_threshold = Gauge("rm_cusum_threshold", "Where rm_cusum is an alarm.", registry=registry)
        self.alarm = Gauge("rm_alarm", "1 while a monitor is in alarm.", ["signal", "severity"], registry=registry)
        self.alarms = Counter("rm_alarms", "Alarms of rm_cusum that have begun.", ["signal"], registry=registry)
        # Without a calibration there is nothing to say of one: these two are registered when it is described.
        self.calibration = Info("rm_calibration", "What p-values are ranks in.", registry=None)
        self.calibration_created = Gauge(
            "rm_calibration_created_timestamp_seconds", "When the calibration was made.", registry=None
        )


def merge_expositions(texts_by_replica: Mapping[str, str | bytes], *, incomplete: bool) -> str:
    """Join the expositions of several replicas into one, each sample labelled with its replica.

    HELP and TYPE stand once for each family, and every value survives exactly. Replicas of different code may differ in
    their families; where they differ in type, the samples go under the type that was seen first.

    Args:
        texts_by_replica: text format 0.0.4, by the value of the label ``replica``.
        incomplete: whether some replica did not answer; said in ``rm_metrics_scrape_incomplete``.
    """
    families: dict[str, Metric] = {}
    for replica, text in texts_by_replica.items():
        for family in text_string_to_metric_families(text.decode() if isinstance(text, bytes) else text):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [_labelled(sample, replica) for sample in family.samples]
    gauge = GaugeMetricFamily(
        "rm_metrics_scrape_incomplete", "1 when some replica did not answer this scrape.", value=float(incomplete)
    )
    return generate_latest(_Collected([*families.values(), gauge])).decode()


def _labelled(sample: Sample, replica: str) -> Sample:
    return sample._replace(labels={**sample.labels, "replica": replica})


class _Collected(Collector):
    """Families that are already there, in the shape that the renderer asks for."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
