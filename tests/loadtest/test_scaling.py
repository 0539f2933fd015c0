"""The simulation of many replicas measures what it says; the servers themselves are started by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reward_client.errors import RewardServiceError

from loadtest.generator import LoadRun, Reply
from loadtest.scaling import GROUP_SIZE, ITEM_BYTES, SHAPES, Measurement, check, items_of, table
from loadtest.scaling_plot import draw
from loadtest.simulated_server import Simulation, serve_config
from loadtest.wire import NATIVE
from service.engines.oracle import oracle_reward_of_text
from service.launch.serve_config import ServeConfig


def measurement(shape: str, replicas: int) -> Measurement:
    cores = {"replicas": 0.5, "proxy": 0.1, "ray": 0.1, "client": 0.2}
    return Measurement(shape, replicas, 150.0 * replicas, 156.0 * replicas, 0.1, 0.3, cores, cores, 1.5)


def test_items_have_one_size_and_no_text_twice() -> None:
    """Every item of every request has the stated tokens and a text of its own; groups have a prompt in common."""
    items = [item for number in range(3) for item in items_of(number, 2 * GROUP_SIZE)]

    assert {len(item["prompt"] + item["completion"]) for item in items} == {ITEM_BYTES}
    assert len({item["prompt"] + item["completion"] for item in items}) == len(items)
    assert len({item["prompt"] for item in items}) == 6


def test_a_wrong_reward_ends_the_measurement() -> None:
    """Rewards are compared one by one: two that are swapped are found."""
    requests = [items_of(0, 2)]
    rewards = [oracle_reward_of_text(item["prompt"], item["completion"]) for item in requests[0]]

    def run(values: list[float]) -> LoadRun:
        content = json.dumps({"results": [{"reward": value} for value in values]}).encode()
        return LoadRun((Reply(200, content, 0.1),), NATIVE, 0.1, 0.0)

    check(run(rewards), requests)
    with pytest.raises(RewardServiceError, match="not those of their items"):
        check(run(rewards[::-1]), requests)


def test_the_configuration_has_no_unknown_key() -> None:
    """What the simulation deploys passes the strict schema."""
    config = ServeConfig.model_validate(serve_config(8123, Simulation(16, 5e-5, 1024)))

    assert config.applications[0].deployments[0].num_replicas == 16


def test_the_plot_is_small(tmp_path: Path) -> None:
    """The picture is a PNG below 150 kB, and the table has a row for each measurement."""
    measurements = [measurement(shape.name, replicas) for shape in SHAPES for replicas in (1, 2, 4, 8, 16)]

    draw(measurements, tmp_path / "plot.png")

    content = (tmp_path / "plot.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 150_000
    assert table(measurements).row_count == 15
