"""The reward-function file of OpenRLHF: the path of this file is given as ``--reward.remote_url``.

OpenRLHF loads the file by its path in each of its workers and calls ``reward_func``; the options are those of the
environment (``REMOTE_REWARD_URL`` and so on). Its worker logs an exception at INFO and goes on with the reward None,
which ends the training later, without the reason; the reason is a record of the logger ``reward_client``.

``python -m reward_client.adapters.openrlhf`` prints the path.
"""

from collections.abc import Sequence
from typing import Any


def reward_func(queries: Sequence[str], prompts: Sequence[Any] | None, labels: Any = None) -> dict[str, Any]:
    """Return rewards and diagnostics in OpenRLHF's form; see ``query_rewards.score_queries``.

    Args:
        queries: whole texts in the actor's template, special tokens included.
        prompts: the templated prompts.
        labels: ignored.

    Raises:
        ClientError: see ``AsyncRewardClient.score_items``.
    """
    # OpenRLHF 0.9 pickles this function by value, because the file was loaded by its path: so it uses no global name.
    from reward_client.adapters.query_rewards import score_queries

    return score_queries(queries, prompts, labels)


if __name__ == "__main__":
    print(__file__)
