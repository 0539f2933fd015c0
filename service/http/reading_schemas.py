"""Schemas of the answers of ``/v1/model`` and ``/v1/monitor``, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from service.protocols.native import MAX_NAME_CHARS

MODEL_IDENTITY: dict[str, Any] = {
    "type": "object",
    "required": ["name", "version"],
    "properties": {"name": {"type": "string"}, "version": {"type": "string"}},
}

MODEL: dict[str, Any] = {
    "type": "object",
    "properties": {
        "reward_rule": {
            "type": "object",
            "description": "How the numbers that the model gives become one reward; docs/models.md explains it.",
            "properties": {
                "outputs": {"type": "array", "items": {"type": "string"}},
                "combination": {
                    "type": ["string", "null"],
                    "description": "output: there is one; weights: their weighted sum; else the name of another rule. "
                    "Null: no weights are known, so there is no reward.",
                },
                "weights": {"type": ["object", "null"], "additionalProperties": {"type": "number"}},
                "decided_by": {"enum": ["checkpoint", "settings", None]},
            },
        },
        "steps": {
            "type": "object",
            "description": "How the model is read at the steps of an item.",
            "properties": {
                "readable": {"type": "boolean", "description": "Whether an item may have steps."},
                "marker": {"type": ["string", "null"], "description": "What training put after each step."},
                "marker_token_id": {"type": ["integer", "null"]},
                "separate": {"type": "boolean", "description": "Whether each step is tokenized alone."},
                "aggregate": {"enum": ["last", "min", "mean", "product"]},
            },
        },
        "text_rule": {
            "type": "object",
            "description": "How the text of an item becomes token ids by default; docs/text.md explains it.",
            "properties": {
                "name": {"type": "string"},
                "template": {"enum": ["chat", "concat", "pair"]},
                "decided_by": {"enum": ["settings", "tokenizer"]},
                **{name: {"type": "array", "items": {"type": "integer"}} for name in ("before", "between", "after")},
                "token_types": {"type": "boolean"},
                "adds_end": {"type": "boolean"},
                "special_tokens": {"enum": ["tokenizer", "leading"]},
                "content": {"enum": ["text", "parts"]},
                "completion_special_tokens": {"enum": ["read", "escape"]},
            },
        },
        "stored_quantization": {
            "type": ["string", "null"],
            "description": "How quantized weights are stored, which are widened when they are loaded; null: they are "
            "not quantized.",
        },
        "audit_url": {"type": ["string", "null"], "description": "Address of a report of reward-audit on the model."},
        "initialised_from": {
            "type": ["object", "null"],
            "description": "The checkpoint at which the model's training started; null without a manifest.",
            "properties": {"name": {"type": "string"}, "base_hash": {"type": ["string", "null"]}},
        },
        "reference": {
            "type": "object",
            "description": "Only where the request names a reference.",
            "required": ["asked", "same", "detail"],
            "properties": {
                "asked": {"type": "string"},
                "same": {"type": ["boolean", "null"], "description": "Null if unknown."},
                "detail": {"type": "string"},
            },
        },
    },
}
REFERENCE_PARAMETER: dict[str, Any] = {
    "parameters": [
        {
            "name": "reference",
            "in": "query",
            "required": False,
            "description": "Name of the reference model of a KL penalty, or a hash of its weights, to compare with "
            "the checkpoint at which the model's training started.",
            "schema": {"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS},
        }
    ]
}

_NUMBER_OR_NULL = {"type": ["number", "null"]}
_INTERVAL = {"type": ["array", "null"], "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_HISTOGRAM: dict[str, Any] = {
    "type": "object",
    "description": "Items in bins. The first and the last bin also count what lies beyond them.",
    "properties": {
        "edges": {"type": "array", "items": {"type": "number"}},
        "counts": {"type": "array", "items": {"type": "integer"}},
        "reference": {
            "type": ["array", "null"],
            "description": "The share of the calibration's items in each bin; null without a calibration.",
            "items": {"type": "number"},
        },
    },
}
_CHANGE: dict[str, Any] = {
    "type": "object",
    "description": "A statistic of the recent completions that differs; that with the most evidence is first.",
    "required": ["statistic", "unit", "reference", "recent", "z", "gain"],
    "properties": {
        **{name: {"type": "string"} for name in ("statistic", "unit")},
        **{name: {"type": "number"} for name in ("reference", "recent")},
        "z": {"type": "number", "description": "The difference in standard errors."},
        "gain": {"type": "number", "description": "ln of what bets on it have gained."},
    },
}
MONITORS: dict[str, Any] = {
    "type": "object",
    "description": "Rolling monitors of all replicas together; docs/monitoring.md explains them.",
    "properties": {
        "model": MODEL_IDENTITY,
        "run": _TEXT_OR_NULL,
        "runs": {"type": "array", "items": {"type": "string"}},
        "incomplete": {"type": "boolean", "description": "Whether some replica did not answer, or has another model."},
        "calibrated": {
            "type": "boolean",
            "description": "Whether the model has a calibration; drift is unknown without one.",
        },
        "window": {"type": "object"},
        "alarms": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "scope", "severity", "since"],
                "properties": {
                    "name": {"type": "string"},
                    "scope": {"enum": ["pooled", "within", None]},
                    "severity": {"enum": ["warn", "critical"]},
                    "since": {
                        "type": ["string", "null"],
                        "format": "date-time",
                        "description": "End of the batch with which it began; null: since the last full batch, or of "
                        "an alarm whose start is not recorded.",
                    },
                    "pays": {
                        "type": ["boolean", "null"],
                        "description": "Whether an edit that moves the signal so raises the reward, by the "
                        "calibration's probe; null where that is unknown. Alarms that pay are first.",
                    },
                },
            },
        },
        "monitors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "metric", "definition", "value", "n", "state"],
                "properties": {
                    **{name: {"type": "string"} for name in ("name", "metric", "definition")},
                    "state": {"enum": ["ok", "warn", "critical", "unknown", "shown"]},
                    "n": {"type": "integer"},
                    "scope": {"enum": ["pooled", "within", None]},
                    "feature": _TEXT_OR_NULL,
                    "interval": _INTERVAL,
                    **dict.fromkeys(("value", "ess", "reference", "threshold"), _NUMBER_OR_NULL),
                },
            },
        },
        "cusum": {"type": "object"},
        "drift": {
            "type": "object",
            "description": "Whether completions are worded otherwise than at the start of the stream, or than the "
            "calibration's.",
            "properties": {
                "threshold": {"type": "number", "description": "Evidence above which a comparison is in alarm."},
                "comparisons": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["against", "evidence", "alarm", "num_alarms", "recent_items", "changes"],
                        "properties": {
                            "against": {"enum": ["start", "calibration"]},
                            "evidence": {"type": "number"},
                            "alarm": {"type": "boolean"},
                            **{key: {"type": "integer"} for key in ("num_alarms", "recent_items")},
                            "changes": {"type": "array", "items": _CHANGE},
                        },
                    },
                },
            },
        },
        "distributions": {
            "type": "object",
            "description": "Of the window, for drawing.",
            "properties": {
                "alpha": {"type": "number", "description": "p-value up to which an item is flagged."},
                "reward": _HISTOGRAM,
                "p_value": _HISTOGRAM,
                "points": {
                    "type": "object",
                    "description": "Items of the window, one in every so many of them.",
                    "properties": {
                        "every": {"type": "integer"},
                        "reward": {"type": "array", "items": {"type": "number"}},
                        "completion_tokens": {"type": "array", "items": {"type": "integer"}},
                        "p_value": {"type": "array", "items": _NUMBER_OR_NULL},
                    },
                },
            },
        },
    },
}
