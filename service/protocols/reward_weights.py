"""Weights of a model's outputs in a request: how several outputs become the one reward of an item.

Pure. A model with one output has nothing to weigh: its output is the reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from service.errors import InvalidRequest, Violation, WeightsMissing
from service.protocols.violations import invalid

MAX_SHOWN_NAMES = 8
"""Names of outputs in a message; a model may have more."""


def read_weights(given: Mapping[str, float] | None, outputs: Sequence[str]) -> Mapping[str, float] | None:
    """Return the weights of a request by the name of the output; None where it has none.

    Args:
        given: the member ``weights`` of the body; decoded from JSON, so its numbers are finite.
        outputs: names of the model's outputs.

    Raises:
        InvalidRequest: the model has one output only; there is no weight; or a name is not that of an output. Has
            the pointer to it, and repeats no unknown name.
    """
    if given is None:
        return None
    if len(outputs) == 1:
        raise invalid("/weights", "unsupported", "The model has one output, which is the reward: leave weights out")
    if not given:
        raise invalid("/weights", "too_few", f"Weights name at least one of the outputs {_shown(outputs)}")
    unknown = sorted(given.keys() - set(outputs))
    if unknown:
        raise InvalidRequest(
            f"Names in weights that are no output of this model: {len(unknown)}; its outputs are {_shown(outputs)}",
            [Violation("/weights", "out_of_range")],
        )
    return dict(given)


def weights_missing(outputs: Sequence[str], remedy: str) -> WeightsMissing:
    """Return the error of a route that answers with one reward, where no weights are known.

    Args:
        outputs: names of the model's outputs.
        remedy: the member of the request that would hold weights; empty if the route takes none.
    """
    request = f"send {remedy}, or " if remedy else ""
    return WeightsMissing(
        f"The model has the outputs {_shown(outputs)}, and no weights that make one reward of them: {request}set "
        "model.reward_weights of the service"
    )


def _shown(outputs: Sequence[str]) -> str:
    more = len(outputs) - MAX_SHOWN_NAMES
    return ", ".join(outputs[:MAX_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
