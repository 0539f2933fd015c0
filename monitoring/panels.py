"""What the dashboard shows: rows of panels as plain data, with the query, unit and meaning of each.

It knows neither Grafana nor matplotlib. ``$job`` and ``$__rate_interval`` are Grafana's variables. Series that hold a
colon come from ``recording_rules.yml``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["stat", "timeseries", "heatmap", "table"]

JOB = 'job=~"$job"'


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL query; ``legend`` names its series, with labels in double braces."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. ``unit``: Grafana's name of it. ``width``: of 24. ``thresholds``: values at which the colour changes.

    ``empty_when``: the reason for which the panel may show nothing; without one it must always show something.
    """

    title: str
    description: str
    kind: Kind
    queries: tuple[Query, ...]
    unit: str = "short"
    width: int = 8
    height: int = 8
    thresholds: tuple[float, ...] = ()
    empty_when: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading, from left to right."""

    title: str
    panels: tuple[Panel, ...]


UNCALIBRATED = "the model has no calibration."
NO_GROUPS = "no request holds two completions of one prompt."


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
    "At a glance",
    (
        Panel(
            "Replicas ready",
            "Replicas that take requests.",
            "stat",
            (Query(f"sum(rm_ready{{{JOB}}})"),),
            width=4,
            height=4,
        ),
        Panel(
            "Items",
            "Items that left with a reward.",
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
            "Share of requests that failed though nobody meant them to: no refusals, no mistakes of callers.",
            "stat",
            (Query(f"max(job:rm_faults:ratio_rate5m{{{JOB}}})"),),
            unit="percentunit",
            width=4,
            height=4,
            thresholds=(0.001,),
        ),
        Panel(
            "Shed",
            "Share of requests refused with 503 because more came than could be done.",
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
            "Cumulative sums past their threshold, and readings of the 0.3 rule, on any replica.",
            "stat",
            (Query(f"sum(max by (signal) (rm_alarm{{{JOB}}}))"),),
            width=4,
            height=4,
            thresholds=(1,),
        ),
    ),
)

_LENGTH = Row(
    "Is length rewarded?",
    (
        Panel(
            "Reward-length correlation, last hour",
            "Pearson correlation of reward and log length over all replicas, computed from counters. Within: about the "
            "means of the prompts, which is the one to read. 'r > 0.3' warns; 'r squared > 0.3' is |r| > 0.548.",
            "timeseries",
            (
                Query(f"job_scope:rm_reward_length_corr:1h{{{JOB}}}", "{{scope}}"),
                Query(f"job_scope:rm_reward_length_corr_low:1h{{{JOB}}}", "{{scope}}, at least"),
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
            "Share of items of which the model read only a part of the prompt.",
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
            "Length and style together",
            "Share of the rewards' variance within prompts that length and style explain.",
            "timeseries",
            (Query(f"rm_style_r2_within{{{JOB}}}", "{{replica}}"),),
            unit="percentunit",
            width=12,
            empty_when=f"{NO_GROUPS[:-1]}, or no style was asked for.",
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
            "Rewards against the calibration",
            "Distribution in deviations from the calibration's mean.",
            "heatmap",
            (Query(f"sum by (le) (increase(rm_reward_z_bucket{{{JOB}}}[$__rate_interval]))", "{{le}}"),),
            empty_when=UNCALIBRATED,
        ),
        Panel(
            "Ties",
            "Share of pairs of completions of one prompt with the same reward. Equal texts tie: many ties are a "
            "policy that has collapsed.",
            "timeseries",
            (Query(f"{_increase('rm_tied_pairs_total')} / ({_increase('rm_pairs_total')} > 0)", "tied"),),
            unit="percentunit",
            thresholds=(0.2,),
            empty_when=NO_GROUPS,
        ),
    ),
)

_TRUST = Row(
    "Can the rewards be trusted?",
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
            "Mean of the combined -ln p, capped at 12: the most sensitive general signal.",
            "timeseries",
            (Query(f"job:rm_mean_surprise:1h{{{JOB}}}", "mean -ln p"),),
            empty_when=UNCALIBRATED,
        ),
        Panel(
            "Flags by reason",
            "What decided that an item is unusual.",
            "timeseries",
            (Query(f"{_rate('rm_ood_flag_total', 'reason')} > 0", "{{reason}}"),),
            unit="cps",
            empty_when="nothing was flagged, or the model has no calibration.",
        ),
        Panel(
            "p-values",
            "Uniform, apart from the width of the bins, while the policy writes what the calibration knows.",
            "heatmap",
            (Query(f"sum by (le) (increase(rm_ood_pvalue_bucket{{{JOB}}}[$__rate_interval]))", "{{le}}"),),
            empty_when=UNCALIBRATED,
        ),
        Panel(
            "Reward of flagged items",
            "Mean standardised reward of flagged items less that of the others: above zero "
            "the model rewards what it has not seen.",
            "timeseries",
            (Query(f"rm_ood_reward_gap{{{JOB}}}", "{{replica}}"),),
            thresholds=(0.0,),
            empty_when="nothing was flagged, or the model has no calibration.",
        ),
        Panel(
            "Style",
            "Tells per 100 words.",
            "timeseries",
            (
                Query(
                    f"100 * sum by (kind) (rate(rm_style_total{{{JOB}}}[$__rate_interval]))"
                    f" / ignoring (kind) group_left () (sum (rate(rm_words_total{{{JOB}}}[$__rate_interval])) > 0)",
                    "{{kind}}",
                ),
            ),
            empty_when="no request asked for style.",
        ),
        Panel(
            "Cumulative sums",
            "How far each signal has run from the calibration's, as a share of its threshold; the "
            "farther direction of the farthest replica.",
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
            "Alarms",
            "1 while a monitor of any replica is in alarm.",
            "timeseries",
            (Query(f"max by (signal, severity) (rm_alarm{{{JOB}}}) > 0", "{{signal}} ({{severity}})"),),
            width=12,
            empty_when="nothing is in alarm.",
        ),
    ),
)

_SPEED = Row(
    "Speed",
    (
        Panel(
            "Requests",
            "Answers by HTTP status or problem code.",
            "timeseries",
            (Query(_rate("rm_requests_total", "code"), "{{code}}"),),
            unit="reqps",
        ),
        Panel(
            "Request latency",
            "From arrival to answer, of scoring requests.",
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
            "Parse, tokenize, queue and serialize once a request; forward and diagnose once a batch.",
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
            "Tokens of batches: real; computed beside them (padding); not computed again (shared).",
            "timeseries",
            (Query(_rate("rm_tokens_total", "kind"), "{{kind}}"),),
            unit="cps",
        ),
        Panel(
            "Batches",
            "Mean sequences of a batch.",
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
            "Tokens that wait for the engine.",
            "timeseries",
            (Query(f"rm_queue_tokens{{{JOB}}}", "{{replica}}"),),
        ),
        Panel(
            "Oldest waiting",
            "How long the oldest waiting sequence has waited.",
            "timeseries",
            (Query(f"rm_queue_oldest_seconds{{{JOB}}}", "{{replica}}"),),
            unit="s",
        ),
        Panel(
            "Items by outcome",
            "What became of the items.",
            "timeseries",
            (Query(_rate("rm_items_total", "outcome"), "{{outcome}}"),),
            unit="cps",
        ),
        Panel(
            "Out of memory",
            "Batches that ran out of the device's memory, in the last hour.",
            "timeseries",
            (Query(f"sum by (replica) (increase(rm_oom_total{{{JOB}}}[1h]))", "{{replica}}"),),
        ),
    ),
)

_FACTS = Row(
    "What runs",
    (
        Panel("Models", "What each replica serves.", "table", (Query(f"rm_model_info{{{JOB}}}"),), width=12, height=6),
        Panel(
            "Calibrations",
            "What p-values are ranks in.",
            "table",
            (Query(f"rm_calibration_info{{{JOB}}}"),),
            width=12,
            height=6,
            empty_when=UNCALIBRATED,
        ),
    ),
)

ROWS = (_OVERVIEW, _LENGTH, _TRUST, _REWARD, _SPEED, _FACTS)
