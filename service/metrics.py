"""Every metric of a replica, declared once with its unit and buckets, and the merging of all replicas' expositions.

Each replica has a registry of its own. Label values come from closed sets in this code, never from a request, so the
number of series is bounded.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from service.errors import Draining, EngineUnavailable, Forbidden, NotReady, Overloaded, QuotaExceeded, Unauthenticated
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
"""-4 to 4 standard deviations of the calibration's rewards, in steps of 0.5."""

P_VALUES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
"""The thresholds at which rates of false alarms are read."""

MOMENTS = ("n", "groups", "zr_pos", "zr_neg", "zl_pos", "zl_neg", "zr2", "zl2", "sum2", "diff2")
"""Sums from which PromQL computes the correlation of reward and length; none can decrease. See docs/monitoring.md."""

OUTCOMES = ("ok", "truncated", "invalid", "non_finite", "shed", "expired", "cancelled", "error")
STYLES = ("headers", "list_items", "bold", "emoji", "hedges", "flattery")


class Metrics:
    """The metrics of one replica. Attributes are the metrics; their help texts describe them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        # In this order the metrics are exposed.
        self._declare_traffic()
        self._declare_scores()
        self._declare_time()
        self._declare_queue()
        self._declare_batches()
        self._declare_health()
        self._declare_ood()
        self._declare_bias()
        self._declare_groups()
        self._declare_window()
        self._declare_alarms()
        self._declare_calibration()
        self._refresh: Callable[[], None] = lambda: None

    def refresh_with(self, refresh: Callable[[], None]) -> None:
        """Call this function before every rendering; it updates metrics that are aggregated elsewhere."""
        self._refresh = refresh

    def render(self) -> bytes:
        """Return the exposition of this replica in Prometheus text format 0.0.4."""
        self._refresh()
        return generate_latest(self.registry)

    def describe_calibration(self, calibration_id: str, n_cal: int, n_prompts: int, created_s: float) -> None:
        """Publish the calibration in use; called at most once.

        Args:
            calibration_id: its hash.
            n_cal: items that p-values are ranks among.
            n_prompts: prompts of these items.
            created_s: seconds since 1970.
        """
        for metric in (self.calibration, self.calibration_created):
            self.registry.register(metric)
        self.calibration.info({"id": calibration_id, "n_cal": str(n_cal), "n_prompts": str(n_prompts)})
        self.calibration_created.set(created_s)

    def describe_model(self, identity: ModelIdentity, sha256: str, dtype: str, device: str) -> None:
        """Publish the served model."""
        self.model.info(
            {"model": identity.name, "version": identity.version, "sha256": sha256, "dtype": dtype, "device": device}
        )

    def describe_build(self, version: str, revision: str) -> None:
        """Publish the version of the service's code."""
        self.build.info({"version": version, "revision": revision, "python": platform.python_version()})

    def observe_request(self, route: str, code: str, seconds: float) -> None:
        """Count one answered request.

        Args:
            route: the template of the route, never a path that a client sent.
            code: the HTTP status, or the code of the problem in the response.
            seconds: from arrival to answer.
        """
        self.requests.labels(route=route, code=code).inc()
        self.request_duration.labels(route=route).observe(seconds)

    def _declare_traffic(self) -> None:
        registry = self.registry
        self.requests = Counter(
            "rm_requests",
            "Answered requests, by route and by HTTP status or problem code.",
            ["route", "code"],
            registry=registry,
        )
        self.items = Counter(
            "rm_items",
            "Items by outcome: ok, truncated (scored after its prompt was cut), invalid (refused, while other items of "
            "the request were scored), non_finite (NaN or infinite reward), shed (request refused), expired (deadline "
            "passed), cancelled (client disconnected), error.",
            ["outcome"],
            registry=registry,
        )
        for outcome in OUTCOMES:  # PromQL's increase() ignores the first value of a series: start at 0
            self.items.labels(outcome=outcome)
        self.slime_prompts = Counter(
            "rm_slime_prompts",
            "Prompts of /rm that are texts: chat (rendered as the model's default), concat (taken for templated).",
            ["rendering"],
            registry=registry,
        )
        for rendering in ("chat", "concat"):
            self.slime_prompts.labels(rendering=rendering)
        self.tokens = Counter(
            "rm_tokens",
            "Tokens of batches: real (of the sequences), padding (computed in addition), shared (the part of real that "
            "was not computed again), cached (the part of shared that an earlier pass had computed).",
            ["kind"],
            registry=registry,
        )
        self.shed = Counter("rm_shed", "Requests refused before any work, by reason.", ["reason"], registry=registry)
        for refusal in (Overloaded, QuotaExceeded, NotReady, Draining, EngineUnavailable):
            self.shed.labels(reason=refusal.code)
        self.authentication_failures = Counter(
            "rm_authentication_failures", "Requests without a valid API key, by reason.", ["reason"], registry=registry
        )
        for failure in (Unauthenticated, Forbidden):
            self.authentication_failures.labels(reason=failure.code)

    def _declare_scores(self) -> None:
        registry = self.registry
        self.reward = Histogram(
            "rm_reward",
            "Raw rewards by the service's own weights. The sum can decrease.",
            buckets=REWARDS,
            registry=registry,
        )
        self.special_token_items = Counter(
            "rm_special_token_items_total",
            "Scored items whose completion has special tokens of the tokenizer written in its text, escaped or not.",
            registry=registry,
        )
        self.completion_length = Histogram(
            "rm_completion_length_tokens",
            "Completion tokens of scored items for which it is known where the prompt ends.",
            buckets=TOKENS,
            registry=registry,
        )

        self.output = Histogram(
            "rm_output",
            "Raw outputs of a model with several, by name; at most the first 32. The sum can decrease.",
            ["output"],
            buckets=REWARDS,
            registry=registry,
        )

    def _declare_time(self) -> None:
        self.request_duration = Histogram(
            "rm_request_duration_seconds",
            "Time from the arrival of a request to its answer.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.stage_duration = Histogram(
            "rm_stage_duration_seconds",
            "Time in a stage: parse, tokenize, queue and serialize per request; forward and diagnose per batch.",
            ["stage"],
            buckets=SECONDS,
            registry=self.registry,
        )

    def _declare_queue(self) -> None:
        registry = self.registry
        self.queue_items = Gauge("rm_queue_items", "Sequences that wait for the engine.", registry=registry)
        self.queue_tokens = Gauge(
            "rm_queue_tokens", "Tokens that wait; estimated for requests that are being tokenized.", registry=registry
        )
        self.queue_oldest = Gauge(
            "rm_queue_oldest_seconds", "Waiting time of the oldest waiting sequence.", registry=registry
        )
        self.inflight_items = Gauge("rm_inflight_items", "Items accepted and not yet answered.", registry=registry)

    def _declare_batches(self) -> None:
        registry = self.registry
        self.budget_tokens = Gauge("rm_budget_tokens", "Maximal tokens of one forward pass.", registry=registry)
        self.batch_items = Histogram("rm_batch_items", "Sequences in a batch.", buckets=COUNTS, registry=registry)
        self.batch_tokens = Histogram("rm_batch_tokens", "Real tokens in a batch.", buckets=TOKENS, registry=registry)
        self.forwards = Counter(
            "rm_forward_passes",
            "Forward passes; more than batches where a failing batch was halved.",
            registry=registry,
        )

        self.shards = Counter(
            "rm_request_shards",
            "Shards of large requests that this replica received: here (computed by its own engine), sibling (by "
            "another replica), retried (a replica refused it, failed or died).",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("here", "sibling", "retried"):
            self.shards.labels(outcome=outcome)

    def _declare_health(self) -> None:
        registry = self.registry
        self.model = Info("rm_model", "The served model.", registry=registry)
        self.build = Info("rm_build", "The version of the service's code.", registry=registry)
        self.ready = Gauge("rm_ready", "1 while this replica accepts requests.", registry=registry)
        self.oom = Counter("rm_oom", "Batches that ran out of device memory.", registry=registry)
        self.replica_starts = Counter("rm_replica_starts", "Starts of this replica.", registry=registry)
        self.replica_starts.inc()

    def _declare_ood(self) -> None:
        registry = self.registry
        self.ood_flag = Counter(
            "rm_ood_flag", "Items flagged as out of distribution, by reason.", ["reason"], registry=registry
        )
        self.ood_pvalue = Histogram(
            "rm_ood_pvalue",
            "Conformal p-values; uniform for items like the calibration's. The count is the number of checked items.",
            buckets=P_VALUES,
            registry=registry,
        )
        self.ood_neglogp = Counter(
            "rm_ood_neglogp", "Sum of the combined -ln p of the checked items, each capped at 12.", registry=registry
        )

    def _declare_bias(self) -> None:
        registry = self.registry
        self.reward_z = Histogram(
            "rm_reward_z",
            "Rewards in standard deviations from the calibration's mean. The sum can decrease.",
            buckets=REWARDS_Z,
            registry=registry,
        )
        self.moment = Counter(
            "rm_moment",
            "Sums over items of the standardised reward (zr) and log length (zl), pooled or relative to the means of "
            "their prompts; groups counts prompts.",
            ["stat", "scope"],
            registry=registry,
        )
        self.style = Counter("rm_style", "Style markers in completions, by kind.", ["kind"], registry=registry)
        self.words = Counter(
            "rm_words", "Words of the completions in which style markers were counted.", registry=registry
        )
        for stat in MOMENTS:
            for scope in SCOPES:
                self.moment.labels(stat=stat, scope=scope)
        for kind in STYLES:
            self.style.labels(kind=kind)

    def _declare_groups(self) -> None:
        registry = self.registry
        self.groups = Counter(
            "rm_groups", "Prompts with two or more checked completions in one request.", registry=registry
        )
        self.top1_ood = Counter(
            "rm_top1_ood", "Prompts counted in rm_groups whose best completion is flagged.", registry=registry
        )
        self.pairs = Counter("rm_pairs", "Pairs of completions of one prompt.", registry=registry)
        self.tied_pairs = Counter("rm_tied_pairs", "Pairs counted in rm_pairs with equal rewards.", registry=registry)

    def _declare_window(self) -> None:
        registry = self.registry
        window = "in this replica's rolling window; NaN while unknown."
        self.length_corr = Gauge(
            "rm_reward_length_corr", f"Correlation of reward and log length {window}", ["scope"], registry=registry
        )
        self.length_corr_ci_low = Gauge(
            "rm_reward_length_corr_ci_low",
            f"Lower end of the 95 percent confidence interval of |r|, {window}",
            ["scope"],
            registry=registry,
        )
        self.style_r2 = Gauge(
            "rm_style_r2_within",
            f"Share of the rewards' variance within prompts that length and style explain, {window}",
            registry=registry,
        )
        self.group_centered = Gauge(
            "rm_group_centered_n",
            "Items of the rolling window whose prompt has several completions.",
            registry=registry,
        )
        self.ood_reward_gap = Gauge(
            "rm_ood_reward_gap",
            f"Mean standardised reward of flagged items minus that of the other items, {window}",
            registry=registry,
        )
        self.tie_rate = Gauge(
            "rm_tie_rate",
            f"Share of pairs of completions of one prompt with equal rewards, {window}",
            registry=registry,
        )

    def _declare_alarms(self) -> None:
        registry = self.registry
        self.cusum = Gauge(
            "rm_cusum",
            "Cumulative deviation of a signal from its reference, in standard errors of a batch.",
            ["signal", "direction"],
            registry=registry,
        )
        self.cusum_threshold = Gauge("rm_cusum_threshold", "Value of rm_cusum that raises an alarm.", registry=registry)
        self.alarm = Gauge(
            "rm_alarm", "1 while the alarm of a signal is on.", ["signal", "severity"], registry=registry
        )
        self.alarms = Counter(
            "rm_alarms", "Alarms raised by rm_cusum and rm_drift_evidence.", ["signal"], registry=registry
        )
        self.drift_evidence = Gauge(
            "rm_drift_evidence",
            "Evidence that the completions differ from those at the start, or from the calibration's: ln of the mean "
            "gain of bets on the next batch.",
            ["against"],
            registry=registry,
        )
        self.drift_threshold = Gauge(
            "rm_drift_threshold", "Value of rm_drift_evidence that raises an alarm.", registry=registry
        )
        self.drift_change = Gauge(
            "rm_drift_change",
            "Difference of a statistic of the recent completions from those at the start, or from the calibration's, "
            "in standard errors.",
            ["against", "statistic"],
            registry=registry,
        )

    def _declare_calibration(self) -> None:
        # Registered by describe_calibration, so that a replica without a calibration does not export them.
        self.calibration = Info("rm_calibration", "The calibration that p-values are computed with.", registry=None)
        self.calibration_created = Gauge(
            "rm_calibration_created_timestamp_seconds", "When the calibration was made.", registry=None
        )


def merge_expositions(texts_by_replica: Mapping[str, str | bytes], *, incomplete: bool) -> str:
    """Merge the expositions of several replicas into one, each sample labelled with its replica.

    HELP and TYPE are written once for each family, and every value is preserved exactly. Replicas of different versions
    may have different families; where they differ in the type of one, the type of the first replica is used.

    Args:
        texts_by_replica: text format 0.0.4, by the value of the label ``replica``.
        incomplete: whether some replica did not answer; published as ``rm_metrics_scrape_incomplete``.
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
    """Existing families as the Collector that the renderer requires."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
