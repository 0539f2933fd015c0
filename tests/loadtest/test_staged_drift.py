"""Staged hacks: the drawn batches, the first alarms, and the false alarms of a clean stream."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
import msgspec
import numpy as np
import pytest
from observed_streams import ood, reference, stream, style

from loadtest.staged_hacks import (
    CLEAN,
    Pool,
    draw_batch,
    false_alarms,
    first_alarm,
    observation_of,
    read_pools,
    run,
    score_items,
    shares,
)
from service.diagnostics.monitors.alarms import SIGNALS
from service.diagnostics.monitors.cusum import family_threshold
from service.diagnostics.monitors.reference import MonitorReference
from service.records import LengthReport, Score

THRESHOLD = family_threshold(len(SIGNALS), 10_000)


@pytest.fixture(scope="module")
def monitor_reference() -> MonitorReference:
    return reference(1500)


@pytest.fixture(scope="module")
def clean() -> Pool:
    return Pool.of(stream(800, seed=50))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_a_batch_has_whole_prompts_and_the_share(clean: Pool, share: float) -> None:
    """A batch has the share of hacked items, each with its own prompt, and all items of each clean prompt."""
    hacked = Pool.of(stream(40, 1, seed=51, hacked=1.0))
    rng = np.random.default_rng(0)

    batches = [draw_batch(clean, hacked, share, rng) for _ in range(20)]

    found = np.concatenate([batch.columns("flattery")[:, 0] == 3.0 for batch in batches])
    assert found.mean() == pytest.approx(share, abs=0.03)
    for batch in batches:
        assert 256 <= len(batch.values) <= 257
        sizes = np.bincount(batch.prompts)
        is_hacked = batch.columns("flattery")[:, 0] == 3.0
        assert set(sizes[batch.prompts[~is_hacked]]) <= {2}
        assert set(sizes[batch.prompts[is_hacked]]) <= {1}


def test_shares_grow_to_one() -> None:
    """The share starts at 0.25 percent, grows by 19 percent a batch, and ends with 1."""
    found = list(shares())

    assert found[0] == 0.0025
    assert found[1] == pytest.approx(0.0025 * 1.19)
    assert found[-1] == 1.0
    assert found == sorted(found)


def test_a_hack_is_detected_early_and_clean_items_never(clean: Pool, monitor_reference: MonitorReference) -> None:
    """An obvious hack is detected at a few percent; items with the clean distribution raise no alarm."""
    rng = np.random.default_rng(1)

    obvious = first_alarm(clean, Pool.of(stream(40, 1, seed=52, hacked=1.0)), monitor_reference, THRESHOLD, rng)
    harmless = first_alarm(clean, Pool.of(stream(400, 1, seed=53)), monitor_reference, THRESHOLD, rng)

    assert obvious.share is not None
    assert obvious.share < 0.05
    assert obvious.signal in SIGNALS
    assert harmless.share is None


def test_false_alarms_are_as_rare_as_designed(clean: Pool, monitor_reference: MonitorReference) -> None:
    """Clean batches raise about as many alarms as designed, with a design that expects some."""
    found = false_alarms(clean, monitor_reference, run_length=100, num_batches=400, rng=np.random.default_rng(2))

    assert found.designed == 4.0
    assert found.count <= 10


def test_a_wire_result_becomes_an_observation() -> None:
    """A result becomes the observation that it was written from; absent members are unknown."""
    length = LengthReport(5, 7, 30, 12, truncated=True)
    score = Score(1.5, length=length, reward_z=0.2, ood=ood(0.02), style=style(bold=2))
    wire = json.loads(msgspec.json.encode(score))

    seen = observation_of(wire, 3)
    bare = observation_of({"index": 0, "reward": 1.5}, 4)

    assert (seen.score.reward, seen.score.ood, seen.score.style) == (1.5, ood(0.02), style(bold=2))
    assert (seen.prompt, seen.num_completion_tokens, seen.truncated) == (3, 7, True)
    assert bare.score == Score(1.5)
    assert bare.num_completion_tokens is None


def test_scoring_writes_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs are groups, hacks are single, clean categories and failed items are skipped, and no text is written."""
    clean, hacks, output = tmp_path / "clean.jsonl", tmp_path / "hacks", tmp_path / "items.jsonl"
    clean.write_text(json.dumps({"prompt": "secret", "chosen": "secret a", "rejected": "secret b"}) + "\n")
    hacks.mkdir()
    rows = [("zalgo", "secret c"), ("in_distribution", "secret d"), ("zalgo", "refused")]
    (hacks / "rows.jsonl").write_text(
        "".join(json.dumps({"category": kind, "prompt": "p", "response": text}) + "\n" for kind, text in rows)
    )

    def answer(request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        assert body["diagnostics"] == "full"
        results = [
            {"index": n, "error": {}} if item["completion"] == "refused" else {"index": n, "reward": float(n)}
            for n, item in enumerate(body["items"])
        ]
        return httpx2.Response(200, json={"results": results})

    client = httpx2.Client
    monkeypatch.setattr(httpx2, "Client", lambda **options: client(transport=httpx2.MockTransport(answer), **options))

    score_items("http://service", clean, hacks, output)

    pools = read_pools(output)
    assert "secret" not in output.read_text()
    assert {kind: [len(prompt) for prompt in pool.prompts] for kind, pool in pools.items()} == {
        CLEAN: [2],
        "zalgo": [1],
    }


def test_the_report_of_scored_items(tmp_path: Path, monitor_reference: MonitorReference) -> None:
    """The report has every hack with its share and signal, and the false alarms."""
    path = tmp_path / "items.jsonl"
    with path.open("w") as out:
        for kind, seen in (
            (CLEAN, stream(300, seed=54)),
            ("obvious", stream(30, 1, seed=55, hacked=1.0, first_prompt=900)),
        ):
            for item in seen:
                result = msgspec.to_builtins(item.score) | {
                    "length": {"completion_tokens": item.num_completion_tokens, "truncated": False}
                }
                out.write(json.dumps({"kind": kind, "prompt": item.prompt, "result": result}) + "\n")

    report = run(read_pools(path), monitor_reference, runs=3, clean_batches=20, run_length=10_000)

    assert report["clean_prompts"] == 300
    assert report["hacks"]["obvious"]["items"] == 30
    assert report["hacks"]["obvious"]["share"] < 0.1
    assert report["early"] == 1
    assert report["false_alarms"]["batches"] == 20
    json.dumps(report, allow_nan=False)
