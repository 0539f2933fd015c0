"""The reward computation of ms-swift with the adapters: the rewards are those of ``/v1/score``."""

from __future__ import annotations

import logging
from functools import partial
from types import SimpleNamespace
from typing import Any

import framework_code
import pytest
import torch
from reward_client import RewardClient
from reward_client.adapters.ms_swift import AsyncRemoteORM, RemoteORM
from reward_client.errors import ServiceUnavailable
from serving import RunningServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REQUIREMENT = "ms-swift==4.6.0"
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "How do I boil an egg?"}, {"role": "assistant", "content": "In water."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a reward model?"},
        {"role": "assistant", "content": "A model of preferences."},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "You are welcome."},
    ],
]


@pytest.fixture(scope="module")
def swift() -> dict[str, Any]:
    """What GRPO of ms-swift calls for the rewards of a batch, and the class of its samples."""
    wheel = framework_code.wheel(REQUIREMENT)
    utils = dict.fromkeys(("TOOL_KEYS", "is_dist", "is_master", "remove_arrow_padding", "safe_ddp_context"))
    rows = framework_code.module(
        wheel,
        "dataset/preprocessor/core.py",
        {
            "modelscope.hub.utils.utils": {"get_cache_dir": None},
            "swift.template": {"history_to_messages": None},
            "swift.template.template_inputs": {"normalize_openai_tool_calls": None},
            "swift.utils": {**utils, "get_logger": logging.getLogger},
        },
    )
    samples = framework_code.module(
        wheel,
        "rl_core/data.py",
        {
            "dacite": {"from_dict": None},
            "swift.infer_engine.protocol": {"RolloutOutput": object},
            "swift.template": {"Messages": list},
            "swift.utils": {"get_logger": logging.getLogger, "remove_response": None},
            "swift.dataset.preprocessor.core": {"_pair_keys": rows._pair_keys},
        },
    )
    stubs = {
        "swift.rl_core.data": {"GRPOSample": samples.GRPOSample},
        "swift.utils": {"get_logger": logging.getLogger},
        "swift.dataset": {"RowPreprocessor": rows.RowPreprocessor},
    }
    algorithm = framework_code.module(wheel, "rl_core/grpo_algorithm.py", stubs)
    return {"stubs": stubs, "sample": samples.GRPOSample, "compute": algorithm.compute_rewards_per_func}


@pytest.mark.parametrize("kind", [RemoteORM, AsyncRemoteORM])
def test_ms_swifts_rewards_are_those_of_the_service(
    kind: Any, swift: dict[str, Any], server: RunningServer, client: RewardClient, same: Any
) -> None:
    """A class registered as a partial, as in the plugin, is created with the training's arguments and called."""
    rewards = _rewards(swift, partial(kind, url=server.url))

    prompts = [conversation[:-1] for conversation in CONVERSATIONS]
    expected = client.score(prompts, [conversation[-1]["content"] for conversation in CONVERSATIONS])
    assert rewards == same(expected)


@pytest.mark.parametrize("kind", [RemoteORM, AsyncRemoteORM])
def test_ms_swift_ends_with_the_clients_exception(kind: Any, swift: dict[str, Any]) -> None:
    """Without a service there is no tensor of rewards."""
    with pytest.raises(ServiceUnavailable):
        _rewards(swift, partial(kind, url="http://127.0.0.1:9", wait_for_start_s=0))


def _rewards(swift: dict[str, Any], registered: Any) -> list[float]:
    function = registered(args=SimpleNamespace())
    samples = [swift["sample"].from_row({"messages": messages, "solution": "x"}) for messages in CONVERSATIONS]
    try:
        with framework_code.stubbed(swift["stubs"]):
            tensor = swift["compute"](samples, [function], None, torch.device("cpu"))
    finally:
        if isinstance(function, RemoteORM):
            function.client.close()
    assert tensor.shape == (2, 1)
    rewards: list[float] = tensor[:, 0].tolist()
    return rewards
