"""How the outputs of a head become a reward: the weights of several outputs, and the aggregate of several steps.

Pure: numbers in, numbers out, in float64. The head's outputs are float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import pstdev
from typing import Any, Literal

import msgspec

from service.checkpoints.reward_description import (
    Combination,
    LogProbability,
    LowerBound,
    MeanOfOutputs,
    MinOfOutputs,
    Probability,
    RewardDescription,
    WeightedSum,
)
from service.errors import SettingsError
from service.records import StepAggregate

DEFAULT_STEP_AGGREGATE: StepAggregate = "last"
"""Of a model whose description names no steps: it was trained to reward whole texts, and the last step ends with one.
"""


@dataclass(frozen=True, slots=True)
class RewardRule:
    """What makes a reward of the outputs of a head."""

    outputs: tuple[str, ...] = ("reward",)
    """Names of the head's outputs at one token, in order."""

    combine: Combination | None = None
    """How the outputs at one token become one number. None: a single output is that number; several have none, unless
    weights are given."""

    step_aggregate: StepAggregate = DEFAULT_STEP_AGGREGATE
    """How the rewards of the steps of a text become its reward."""

    decided_by: Literal["checkpoint", "settings"] = "checkpoint"
    """Where ``combine`` is from."""

    @property
    def has_reward(self) -> bool:
        """Whether the outputs make a reward where a request has no weights."""
        return len(self.outputs) == 1 or self.combine is not None

    def weighted(self, weights: Mapping[str, float] | None) -> RewardRule:
        """Return the rule with the weights of the settings in place of the checkpoint's; None changes nothing.

        Raises:
            SettingsError: there is one output only, or a name is not that of an output.
        """
        if weights is None:
            return self
        if len(self.outputs) == 1:
            raise SettingsError("model.reward_weights is for models with several outputs, and this one has one.")
        unknown = sorted(set(weights) - set(self.outputs))
        if unknown:
            raise SettingsError(
                f"model.reward_weights names {unknown[0]}, but the outputs of the model are {', '.join(self.outputs)}."
            )
        return replace(self, combine=WeightedSum(dict(weights)), decided_by="settings")

    def description(self) -> dict[str, Any]:
        """Return the rule as JSON-ready values for ``/v1/model``; docs/models.md explains them."""
        kind = "output" if len(self.outputs) == 1 and self.combine is None else None
        combination: dict[str, Any] = {"kind": kind} if self.combine is None else msgspec.to_builtins(self.combine)
        return {
            "outputs": list(self.outputs),
            "combination": combination.pop("kind"),
            "weights": combination.pop("weights", None),
            **combination,
            "decided_by": None if self.combine is None else self.decided_by,
        }

    @classmethod
    def of(cls, description: RewardDescription | None, step_aggregate: StepAggregate | None = None) -> RewardRule:
        """Return the rule of a checkpoint.

        Args:
            description: the content of ``reward_model.json``; None without the file.
            step_aggregate: the setting, which takes precedence; None: that of the description.
        """
        if description is None:
            return cls(step_aggregate=step_aggregate or DEFAULT_STEP_AGGREGATE)
        described = None if description.steps is None else description.steps.aggregate
        return cls(description.outputs, description.combine, step_aggregate or described or DEFAULT_STEP_AGGREGATE)

    def reward_of(self, outputs: Sequence[float], weights: Mapping[str, float] | None = None) -> float | None:
        """Return the reward of the outputs at one token; it is not finite where an output that it needs is not.

        Args:
            outputs: in the order of the names.
            weights: factors by the name of the output, in place of ``combine``; an output without one counts zero.

        Returns:
            The reward; None where several outputs have no rule and no weights. A single output without a rule is
            returned unchanged.
        """
        combine = self.combine if weights is None else WeightedSum(dict(weights))
        match combine:
            case WeightedSum(factors):
                known = dict(zip(self.outputs, outputs, strict=True))
                return _sum([factor * known[name] for name, factor in factors.items()])
            case MeanOfOutputs():
                return _mean(outputs)
            case MinOfOutputs():
                return _min(outputs)
            case LowerBound(num_std):
                return _mean(outputs) - num_std * _std(outputs)
            case Probability(name):
                return probability(outputs, self.outputs.index(name))
            case LogProbability(name):
                return log_probability(outputs, self.outputs.index(name))
            case None:
                return outputs[0] if len(outputs) == 1 else None

    def std_of(self, outputs: Sequence[float]) -> float | None:
        """Return the standard deviation (with divisor n) of the members of an ensemble; None for other outputs."""
        if isinstance(self.combine, MeanOfOutputs | MinOfOutputs | LowerBound):
            return _std(outputs)
        return None

    def aggregate(self, step_rewards: Sequence[float]) -> float:
        """Return the reward of a text from the rewards of its steps, of which there is at least one."""
        match self.step_aggregate:
            case "last":
                return step_rewards[-1]
            case "min":
                return _min(step_rewards)
            case "mean":
                return _mean(step_rewards)
            case "product":
                return math.prod(step_rewards)


def probability(logits: Sequence[float], index: int) -> float:
    """Return the probability of one class: the softmax of several logits, the logistic function of a single one."""
    own = logits[index]
    others = [0.0] if len(logits) == 1 else [logit for number, logit in enumerate(logits) if number != index]
    if not all(map(math.isfinite, logits)):
        return math.nan
    largest = max(own, *others)
    return math.exp(own - largest) / (math.exp(own - largest) + math.fsum(math.exp(one - largest) for one in others))


def log_probability(logits: Sequence[float], index: int) -> float:
    """Return the natural logarithm of `probability`, also where that is too small for a float."""
    if not all(map(math.isfinite, logits)):
        return math.nan
    terms = [0.0, *logits] if len(logits) == 1 else logits
    largest = max(terms)
    return logits[index] - largest - math.log(math.fsum(math.exp(term - largest) for term in terms))


def _sum(terms: Sequence[float]) -> float:
    """Return the exactly rounded sum; NaN where a term is not finite or the sum is beyond float64.

    ``math.fsum`` raises there, but one bad output is an error of its item and not of the whole batch.
    """
    if not all(map(math.isfinite, terms)):
        return math.nan
    try:
        return math.fsum(terms)
    except OverflowError:
        return math.nan


def _mean(values: Sequence[float]) -> float:
    return _sum(values) / len(values)


def _std(values: Sequence[float]) -> float:
    """Return the standard deviation with divisor n; NaN where a value is not finite, for which ``pstdev`` raises."""
    return pstdev(values) if all(map(math.isfinite, values)) else math.nan


def _min(values: Sequence[float]) -> float:
    """Return the smallest value; NaN where one is NaN, which ``min`` would depend on the order for."""
    return math.nan if any(map(math.isnan, values)) else min(values)
