"""The exceptions of service and client survive the way to another process."""

from __future__ import annotations

import pickle

import pytest
from reward_client.errors import ItemFailure, ItemsFailed, RequestRejected, RewardServiceError

from service.errors import EngineFailed, InvalidRequest, Overloaded, Violation


@pytest.mark.parametrize(
    "error",
    [
        RequestRejected(422, {"code": "invalid_request", "detail": "no items"}),
        ItemsFailed([ItemFailure(1, "sequence_too_long", "too long")], [0.5, None]),
        InvalidRequest("unknown field", [Violation("/items/0/x", "unknown")]),
        Overloaded("full", 2.5),
        EngineFailed("raised"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_can_be_pickled(error: RewardServiceError) -> None:
    """A worker process that meets an error reports this error and not a failure to pickle it."""
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes

    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
