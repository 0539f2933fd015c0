"""The contents of the dashboard: rows of panels as plain data, with the queries, unit and description of each.

Independent of Grafana and matplotlib. ``$job`` and ``$__rate_interval`` are Grafana's variables. Series with a colon in
their names are recorded by ``recording_rules.yml``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["stat", "timeseries", "heatmap", "table"]

JOB = 'job=~"$job"'


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL query."""

    expr: str

    legend: str = ""
    """Names of its series in the legend, with labels in double braces."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel."""

    title: str
    description: str
    kind: Kind
    queries: tuple[Query, ...]

    unit: str = "short"
    """Grafana's name of the unit."""

    width: int = 8
    """Columns of the grid's 24."""

    height: int = 8

    thresholds: tuple[float, ...] = ()
    """Values at which the colour changes."""

    empty_when: str | None = None
    """The reason why the panel may be empty; without one it must always show data."""


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading, from left to right."""

    title: str
    panels: tuple[Panel, ...]


UNCALIBRATED = "the model has no calibration."
NO_GROUPS = "no request contains two completions of one prompt."


def _rate(metric: str, by: str = "job", matchers: str = JOB) -> str:
    return f"sum by ({by}) (rate({metric}{{{matchers}}}[$__rate_interval]))"


def _increase(metric: str, by: str = "job", matchers: str = JOB) -> str:
    return f"sum by ({by}) (increase({metric}{{{matchers}}}[1h]))"


def _quantiles(histogram: str, *shares: float, by: str = "le") -> tuple[Query, ...]:
    return tuple(
        Query(f"histogram_quantile({share}, {_rate(f'{histogram}_bucket', by)})", f"p{share * 100:g}")
        for share in shares
    )


_OVERVIEW = Row(
    "Overview",
    (
        Panel(
            "Replicas ready",
            "Replicas that accept requests.",
            "stat",
            (Query(f"sum(rm_ready{{{JOB}}})"),),
            width=4,
            height=4,
        ),
        Panel(
            "Items",
            "Items answered with a reward.",
            "stat",
            (Query(f'sum(rate(rm_items_total{{{JOB}, outcome=~"ok|truncated"}}[$__rate_interval]))'),),
            unit="cps",
            width=4,
            height=4,
        ),
        Panel(
            "p95 latency",
            "From the arrival of a scoring request to its answer.",
            "stat",
            (
                Query(
                    "histogram_quantile(0.95, sum by (le) (rate(rm_request_duration_seconds_bucket"
                    f'{{{JOB}, route=~"/v1/(score|compare)"}}[$__rate_interval])))'
                ),
            ),
            unit="s",
            width=4,
            height=4,
        ),
        Panel(
            "Faults",
            "Share of requests that failed in the service: neither intended refusals nor errors of the caller.",
            "stat",
            (Query(f"max(job:rm_faults:ratio_rate5m{{{JOB}}})"),),
            unit="percentunit",
            width=4,
            height=4,
            thresholds=(0.001,),
        ),
        Panel(
            "Requests shed",
            "Share of requests refused with 503 because the service was overloaded.",
            "stat",
            (
                Query(
                    f"sum(rate(rm_shed_total{{{JOB}}}[$__rate_interval]))"
                    f" / sum(rate(rm_requests_total{{{JOB}}}[$__rate_interval]))"
                ),
            ),
            unit="percentunit",
            width=4,
            height=4,
            thresholds=(0.05,),
        ),
        Panel(
            "Monitors in alarm",
            "Cumulative sums above their threshold, and length correlations above their limit, on any replica.",
            "stat",
            (Query(f"sum(max by (signal) (rm_alarm{{{JOB}}}))"),),
            width=4,
            height=4,
            thresholds=(1,),
        ),
    ),
)

_LENGTH = Row(
    "Length bias",
    (
        Panel(
            "Reward-length correlation, last hour",
            "Pearson correlation of reward and log length over all replicas, computed from counters. Within: about the "
            "means of the prompts, and the one to watch. Limits: |r| = 0.3, and r squared = 0.3 (|r| = 0.548).",
            "timeseries",
            (
                Query(f"job_scope:rm_reward_length_corr:1h{{{JOB}}}", "{{scope}}"),
                Query(f"job_scope:rm_reward_length_corr_low:1h{{{JOB}}}", "{{scope}}, lower bound"),
            ),
            thresholds=(0.3, 0.548),
        ),
        Panel(
            "Reward-length correlation, rolling window",
            "The same over each replica's last 4,096 items.",
            "timeseries",
            (Query(f"rm_reward_length_corr{{{JOB}}}", "{{scope}} {{replica}}"),),
            thresholds=(0.3, 0.548),
        ),
        Panel(
            "Completion length",
            "Tokens of the scored completions.",
            "timeseries",
            _quantiles("rm_completion_length_tokens", 0.5, 0.9, 0.99),
        ),
        Panel(
            "Truncated items",
            "Share of items whose prompt was truncated.",
            "timeseries",
            (
                Query(
                    f'sum by (job) (rate(rm_items_total{{{JOB}, outcome="truncated"}}[$__rate_interval]))'
                    f' / sum by (job) (rate(rm_items_total{{{JOB}, outcome=~"ok|truncated"}}[$__rate_interval]))',
                    "truncated",
                ),
            ),
            unit="percentunit",
            width=12,
        ),
        Panel(
            "Variance explained by length and style",
            "Share of the rewards' variance within prompts that length and style explain.",
            "timeseries",
            (Query(f"rm_style_r2_within{{{JOB}}}", "{{replica}}"),),
            unit="percentunit",
            width=12,
            empty_when=f"{NO_GROUPS[:-1]}, or no request had diagnostics.",
        ),
    ),
)

_REWARD = Row(
    "Rewards",
    (
        Panel(
            "Rewards",
            "Distribution of the raw rewards.",
            "heatmap",
            (Query(f"sum by (le) (increase(rm_reward_bucket{{{JOB}}}[$__rate_interval]))", "{{le}}"),),
        ),
        Panel(
            "Outputs of the model",
            "Median of each output of a model with several, by name, interpolated within a bucket.",
            "timeseries",
            (
                Query(
                    "histogram_quantile(0.5, sum by (output, le) "
                    f"(increase(rm_output_bucket{{{JOB}}}[$__rate_interval])))",
                    "{{output}}",
                ),
            ),
            empty_when="the model has one output.",
        ),
        Panel(
            "Rewards against the calibration",
            "Distribution of the standardised rewards: distance from the calibration's mean in standard deviations.",
            "heatmap",
            (Query(f"sum by (le) (increase(rm_reward_z_bucket{{{JOB}}}[$__rate_interval]))", "{{le}}"),),
            empty_when=UNCALIBRATED,
        ),
        Panel(
            "Ties",
            "Share of pairs of completions of one prompt with equal rewards. Equal texts have equal rewards: many ties "
            "indicate a collapsed policy.",
            "timeseries",
            (Query(f"{_increase('rm_tied_pairs_total')} / ({_increase('rm_pairs_total')} > 0)", "tied"),),
            unit="percentunit",
            thresholds=(0.2,),
            empty_when=NO_GROUPS,
        ),
    ),
)

_TRUST = Row(
    "Out-of-distribution items and drift",
    (
        Panel(
            "Flagged items, last hour",
            "Share of items flagged as out of distribution; expected: one percent.",
            "timeseries",
            (
                Query(f"job:rm_ood_rate:1h{{{JOB}}}", "flagged"),
                Query(f"job:rm_top1_ood_rate:1h{{{JOB}}}", "best completion flagged"),
            ),
            unit="percentunit",
            thresholds=(0.02,),
            empty_when=UNCALIBRATED,
        ),
        Panel(
            "Mean surprise, last hour",
            "Mean of the combined -ln p, each at most 12: the most sensitive general signal.",
            "timeseries",
            (Query(f"job:rm_mean_surprise:1h{{{JOB}}}", "mean -ln p"),),
            empty_when=UNCALIBRATED,
        ),
        Panel(
            "Flags by reason",
            "Flagged items by the component that decided.",
            "timeseries",
            (Query(f"{_rate('rm_ood_flag_total', 'reason')} > 0", "{{reason}}"),),
            unit="cps",
            empty_when="no item was flagged, or the model has no calibration.",
        ),
        Panel(
            "p-values",
            "Uniform, apart from the width of the bins, while the items are distributed like the calibration data.",
            "heatmap",
            (Query(f"sum by (le) (increase(rm_ood_pvalue_bucket{{{JOB}}}[$__rate_interval]))", "{{le}}"),),
            empty_when=UNCALIBRATED,
        ),
        Panel(
            "Reward of flagged items",
            "Mean standardised reward of flagged items less that of the others. Above zero the model prefers unusual "
            "completions.",
            "timeseries",
            (Query(f"rm_ood_reward_gap{{{JOB}}}", "{{replica}}"),),
            thresholds=(0.0,),
            empty_when="no item was flagged, or the model has no calibration.",
        ),
        Panel(
            "Style",
            "Style markers per 100 words.",
            "timeseries",
            (
                Query(
                    f"100 * sum by (kind) (rate(rm_style_total{{{JOB}}}[$__rate_interval]))"
                    f" / ignoring (kind) group_left () (sum (rate(rm_words_total{{{JOB}}}[$__rate_interval])) > 0)",
                    "{{kind}}",
                ),
            ),
            empty_when="no request had diagnostics.",
        ),
        Panel(
            "Cumulative sums",
            "Cumulative sum of each signal's deviations from the calibration, as a share of its threshold; the "
            "largest of both directions and all replicas.",
            "timeseries",
            (
                Query(
                    f"max by (signal) (rm_cusum{{{JOB}}}) / ignoring (signal) group_left () "
                    f"max (rm_cusum_threshold{{{JOB}}})",
                    "{{signal}}",
                ),
            ),
            unit="percentunit",
            width=12,
            thresholds=(1.0,),
        ),
        Panel(
            "Drift of the wording",
            "Evidence that completions are worded otherwise than at the start of the stream, or than the "
            "calibration's, as a share of the threshold; the largest of all replicas.",
            "timeseries",
            (
                Query(
                    f"max by (against) (rm_drift_evidence{{{JOB}}}) / ignoring (against) group_left () "
                    f"max (rm_drift_threshold{{{JOB}}})",
                    "{{against}}",
                ),
            ),
            unit="percentunit",
            width=12,
            thresholds=(1.0,),
        ),
        Panel(
            "What has changed since the start",
            "The statistics of the recent completions that differ most from those at the start of the stream, in "
            "standard errors; of all replicas the one with the largest difference.",
            "timeseries",
            (
                Query(f'topk(5, max by (statistic) (rm_drift_change{{{JOB}, against="start"}}))', "{{statistic}}"),
                Query(f'bottomk(5, min by (statistic) (rm_drift_change{{{JOB}, against="start"}}))', "{{statistic}}"),
            ),
            width=12,
            empty_when="no request had diagnostics.",
        ),
        Panel(
            "Alarms",
            "1 while the monitor is in alarm on any replica.",
            "timeseries",
            (Query(f"max by (signal, severity) (rm_alarm{{{JOB}}}) > 0", "{{signal}} ({{severity}})"),),
            width=12,
            empty_when="no monitor is in alarm.",
        ),
    ),
)

_SPEED = Row(
    "Latency and throughput",
    (
        Panel(
            "Requests",
            "Responses by HTTP status or problem code.",
            "timeseries",
            (Query(_rate("rm_requests_total", "code"), "{{code}}"),),
            unit="reqps",
        ),
        Panel(
            "Request latency",
            "From the arrival of a scoring request to its answer.",
            "timeseries",
            tuple(
                Query(
                    f"histogram_quantile({share}, sum by (le) (rate(rm_request_duration_seconds_bucket"
                    f'{{{JOB}, route=~"/v1/(score|compare)"}}[$__rate_interval])))',
                    f"p{share * 100:g}",
                )
                for share in (0.5, 0.95, 0.99)
            ),
            unit="s",
        ),
        Panel(
            "Stages, p95",
            "Parse, tokenize, queue and serialize per request; forward and diagnose per batch.",
            "timeseries",
            (
                Query(
                    f"histogram_quantile(0.95, {_rate('rm_stage_duration_seconds_bucket', 'le, stage')})", "{{stage}}"
                ),
            ),
            unit="s",
        ),
        Panel(
            "Tokens",
            "Tokens of batches by kind: real (of the sequences); padding (computed in addition); shared (part of real, "
            "not computed again); cached (part of shared, from an earlier pass).",
            "timeseries",
            (Query(_rate("rm_tokens_total", "kind"), "{{kind}}"),),
            unit="cps",
        ),
        Panel(
            "Batches",
            "Mean number of sequences in a batch.",
            "timeseries",
            (
                Query(
                    f"sum by (replica) (rate(rm_batch_items_sum{{{JOB}}}[$__rate_interval]))"
                    f" / sum by (replica) (rate(rm_batch_items_count{{{JOB}}}[$__rate_interval]))",
                    "{{replica}}",
                ),
            ),
        ),
        Panel(
            "Queue",
            "Tokens waiting for the engine.",
            "timeseries",
            (Query(f"rm_queue_tokens{{{JOB}}}", "{{replica}}"),),
        ),
        Panel(
            "Oldest waiting",
            "Waiting time of the oldest queued sequence.",
            "timeseries",
            (Query(f"rm_queue_oldest_seconds{{{JOB}}}", "{{replica}}"),),
            unit="s",
        ),
        Panel(
            "Items by outcome",
            "Items by outcome: scored, truncated, refused or failed.",
            "timeseries",
            (Query(_rate("rm_items_total", "outcome"), "{{outcome}}"),),
            unit="cps",
        ),
        Panel(
            "Out of memory",
            "Batches that ran out of device memory in the last hour.",
            "timeseries",
            (Query(f"sum by (replica) (increase(rm_oom_total{{{JOB}}}[1h]))", "{{replica}}"),),
        ),
    ),
)

_FACTS = Row(
    "Versions",
    (
        Panel(
            "Models",
            "The model that each replica serves.",
            "table",
            (Query(f"rm_model_info{{{JOB}}}"),),
            width=12,
            height=6,
        ),
        Panel(
            "Calibrations",
            "The calibration that p-values are computed with.",
            "table",
            (Query(f"rm_calibration_info{{{JOB}}}"),),
            width=12,
            height=6,
            empty_when=UNCALIBRATED,
        ),
    ),
)

ROWS = (_OVERVIEW, _LENGTH, _TRUST, _REWARD, _SPEED, _FACTS)
