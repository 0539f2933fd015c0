"""The report of two servers has the ratios and comparisons of hand calculations."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from loadtest.load_shapes import shapes_against_plain
from loadtest.reward_comparison import RewardComparison
from loadtest.server_report import ServerReport, compare_servers, ratios
from loadtest.server_rounds import Measurement


def measured(
    server: str, round_: int, items_per_s: float, rewards: list[float] | None = None, shape: str = "single"
) -> Measurement:
    return Measurement(server, shape, round_, items_per_s, 0.1, 0.2, 2.0, 0.0, 0.0, rewards or [])


def test_ratio_is_ours_over_the_peers_of_the_same_round() -> None:
    """Rounds are paired by number, whatever the order of the measurements."""
    found = [measured("plain", 0, 10), measured("ours", 1, 60), measured("plain", 1, 20), measured("ours", 0, 40)]

    assert ratios(found, "single", "plain") == [4.0, 3.0]


def test_rewards_are_compared_with_each_other_and_with_fp32() -> None:
    """The servers are compared over all rounds, and with fp32 on the items of the reference."""
    found = [
        measured("vllm", 0, 1, [0.0, 1.0]),
        measured("ours", 0, 1, [0.0, 1.5]),
        measured("ours", 1, 1, [3.5, 2.5]),
        measured("vllm", 1, 1, [2.0, 3.0]),
    ]

    comparisons = compare_servers(found, "vllm", reference={0: 0.25, 3: 3.0})

    assert {name: (one.num_items, one.max_difference) for name, one in comparisons.items()} == {
        "ours against vllm": (4, 1.5),
        "ours against transformers in fp32": (2, 0.5),
        "vllm against transformers in fp32": (2, 0.25),
    }


@pytest.mark.parametrize(("max_difference", "matches"), [(1e-3, True), (5.0, False)])
def test_one_difference_fails_the_report(max_difference: float, matches: bool) -> None:
    """Table and JSON have all figures, and one server with wrong rewards fails the whole report."""
    shapes = shapes_against_plain(1, 1)
    found = [
        measured(server, 0, speed, shape=shape.name)
        for shape in shapes
        for server, speed in (("plain", 10.0), ("ours", 25.0))
    ]
    comparisons = {
        "ours against plain": RewardComparison(8, 1e-3, spread=1.0, spearman=1.0),
        "plain against transformers in fp32": RewardComparison(8, max_difference, spread=1.0, spearman=1.0),
    }
    report = ServerReport("plain", ("bfloat16", "float32"), shapes, found, comparisons, {"torch": "2.13.0"})
    output = io.StringIO()
    console = Console(file=output, width=200)

    report.print(console)

    printed = output.getvalue()
    written = json.loads(json.dumps(report.as_json()))
    assert report.rewards_match is written["rewards_match"] is matches
    assert ("DIFFER" in printed) is not matches
    assert printed.count("2.50 (2.50)") == len(shapes)
    assert [shape["ratio"] for shape in written["shapes"]] == [2.5] * len(shapes)
    assert "plain in float32 with torch 2.13.0" in printed
    assert (written["dtype"], written["peer_dtype"]) == ("bfloat16", "float32")
    assert written["peer_versions"] == {"torch": "2.13.0"}
    assert not any("rewards" in one for one in written["measurements"])
