"""A job has the rewards and the diagnostics of the service, whether it has the model itself or asks the service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_client import RewardClient
from serving import serving
from tiny_models import SENTENCES, write_tiny_checkpoint

from scoring.command import main

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
"""Rounding of a forward pass in another batch, for rewards that spread by about one."""


def rows() -> list[dict[str, Any]]:
    return [
        {"prompt": SENTENCES[n % 5], "completion": f"{SENTENCES[(n * n) % 6]} {'So. ' * (n % 7)}", "n": n}
        for n in range(40)
    ]


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def is_close(one: object, other: object, tolerance: float) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, abs=tolerance)
    return one == other


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_ways_have_the_rewards_of_the_service(tmp_path: Path, dtype: str) -> None:
    """All columns agree with each other, and the rewards with those that the client gets for the same items.

    Among the rows are one that is malformed and one that is too long, whose errors agree too.
    """
    checkpoint = write_tiny_checkpoint(tmp_path / "model", dtype=getattr(torch, dtype))
    source = tmp_path / "in.jsonl"
    lines = [json.dumps(row) for row in rows()]
    long = json.dumps({"prompt": "Why?", "completion": "so " * 2000})
    source.write_text("\n".join([*lines[:20], "not json", long, *lines[20:]]) + "\n")
    given = ("--model", str(checkpoint), "--dtype", dtype, "--device", "cpu", "--threads", "1")

    with serving(tmp_path, *given[:4], "--device", "cpu", runtime="local") as server:
        assert main([str(source), str(tmp_path / "asked.jsonl"), "--url", server.url, "--block-rows", "16"]) == 0
        with RewardClient(server.url) as client:
            wanted = client.score([row["prompt"] for row in rows()], [row["completion"] for row in rows()])
            version = client.model().version
    assert main([str(source), str(tmp_path / "computed.jsonl"), *given, "--block-rows", "16"]) == 0

    asked, computed = read(tmp_path / "asked.jsonl"), read(tmp_path / "computed.jsonl")
    scored = [row for row in computed if row["error_code"] is None]
    assert [row["n"] for row in scored] == list(range(40))
    assert [row["reward"] for row in scored] == pytest.approx(wanted, abs=TOLERANCE[dtype])
    assert {row["model_version"] for row in computed} == {version}
    for one, other in zip(asked, computed, strict=True):
        assert one.keys() == other.keys()
        assert all(is_close(one[name], other[name], TOLERANCE[dtype]) for name in one), (one, other)
    assert [row["error_code"] for row in computed[20:22]] == ["malformed_row", "sequence_too_long"]


def test_a_service_that_does_not_answer_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is left behind that would have to be removed before the next try."""
    (tmp_path / "in.jsonl").write_text(json.dumps(rows()[0]) + "\n")

    assert main([str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--url", "http://127.0.0.1:9"]) == 1

    assert capsys.readouterr().err.startswith("reward-score: ")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
