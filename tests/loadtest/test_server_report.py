"""The report of two servers: ratios and agreements by hand."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from loadtest.agreement import Agreement
from loadtest.load_shapes import shapes_against_plain
from loadtest.server_report import ServerReport, compare_rewards, ratios
from loadtest.server_rounds import Measurement


def measured(
    server: str, round_: int, items_per_s: float, rewards: list[float] | None = None, shape: str = "single"
) -> Measurement:
    return Measurement(server, shape, round_, items_per_s, 0.1, 0.2, 2.0, 0.0, 0.0, rewards or [])


def test_ratio_is_ours_over_the_peers_of_the_same_round() -> None:
    """Rounds are paired by number, whatever the order in which they were measured."""
    found = [measured("plain", 0, 10), measured("ours", 1, 60), measured("plain", 1, 20), measured("ours", 0, 40)]

    assert ratios(found, "single", "plain") == [4.0, 3.0]


def test_rewards_are_held_against_each_other_and_against_fp32() -> None:
    """Over all rounds between the servers; with fp32 on the places that were asked for."""
    found = [
        measured("vllm", 0, 1, [0.0, 1.0]),
        measured("ours", 0, 1, [0.0, 1.5]),
        measured("ours", 1, 1, [3.5, 2.5]),
        measured("vllm", 1, 1, [2.0, 3.0]),
    ]

    agreements = compare_rewards(found, "vllm", reference={0: 0.25, 3: 3.0})

    assert {between: (one.num_items, one.max_difference) for between, one in agreements.items()} == {
        "ours against vllm": (4, 1.5),
        "ours against transformers in fp32": (2, 0.5),
        "vllm against transformers in fp32": (2, 0.25),
    }


@pytest.mark.parametrize(("max_difference", "agrees"), [(1e-3, True), (5.0, False)])
def test_one_disagreement_spoils_the_report(max_difference: float, agrees: bool) -> None:
    """Numbers for people and for machines stand beside the verdict, and one wrong server makes it."""
    shapes = shapes_against_plain(1, 1)
    found = [
        measured(server, 0, speed, shape=shape.name)
        for shape in shapes
        for server, speed in (("plain", 10.0), ("ours", 25.0))
    ]
    agreements = {
        "ours against plain": Agreement(8, 1e-3, spread=1.0, spearman=1.0),
        "plain against transformers in fp32": Agreement(8, max_difference, spread=1.0, spearman=1.0),
    }
    report = ServerReport("plain", "bfloat16", shapes, found, agreements)
    output = io.StringIO()
    console = Console(file=output, width=200)

    report.print(console)

    printed = output.getvalue()
    said = json.loads(json.dumps(report.as_json()))
    assert report.agrees is said["agrees"] is agrees
    assert ("DISAGREE" in printed) is not agrees
    assert printed.count("2.50 (2.50)") == len(shapes)
    assert [shape["ratio"] for shape in said["shapes"]] == [2.5] * len(shapes)
    assert not any("rewards" in one for one in said["measurements"])
