"""Staged hacks: what is drawn, what is noticed, and what a clean stream raises."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
import msgspec
import numpy as np
import pytest
from observed_streams import ood, reference, stream, style

from loadtest.staged_drift import (
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
def known() -> MonitorReference:
    return reference(1500)


@pytest.fixture(scope="module")
def clean() -> Pool:
    return Pool.of(stream(800, seed=50))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_batch_is_of_whole_prompts_and_the_share(clean: Pool, share: float) -> None:
    """A batch holds the share of hacked items, each a prompt of its own, and clean prompts whole."""
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


def test_shares_grow_to_everything() -> None:
    """The share begins at a quarter of a percent, grows by 19 percent a batch, and ends with everything."""
    found = list(shares())

    assert found[0] == 0.0025
    assert found[1] == pytest.approx(0.0025 * 1.19)
    assert found[-1] == 1.0
    assert found == sorted(found)


def test_hack_is_noticed_early_and_a_harmless_one_never(clean: Pool, known: MonitorReference) -> None:
    """A loud hack is noticed at a few percent; what cannot be told from clean items raises nothing."""
    rng = np.random.default_rng(1)

    loud = first_alarm(clean, Pool.of(stream(40, 1, seed=52, hacked=1.0)), known, THRESHOLD, rng)
    harmless = first_alarm(clean, Pool.of(stream(400, 1, seed=53)), known, THRESHOLD, rng)

    assert loud.share is not None
    assert loud.share < 0.05
    assert loud.signal in SIGNALS
    assert harmless.share is None


def test_false_alarms_are_as_rare_as_designed(clean: Pool, known: MonitorReference) -> None:
    """Clean batches raise no more alarms than the thresholds are designed for, with a loose design to count any."""
    found = false_alarms(clean, known, run_length=100, num_batches=400, rng=np.random.default_rng(2))

    assert found.designed == 4.0
    assert found.count <= 10


def test_result_of_the_wire_is_read_back() -> None:
    """What the service answers becomes the observation it was made of; what is absent stays unknown."""
    length = LengthReport(5, 7, 30, 12, truncated=True)
    score = Score(1.5, length=length, reward_z=0.2, ood=ood(0.02), style=style(bold=2))
    wire = json.loads(msgspec.json.encode(score))

    seen = observation_of(wire, 3)
    bare = observation_of({"index": 0, "reward": 1.5}, 4)

    assert (seen.score.reward, seen.score.ood, seen.score.style) == (1.5, ood(0.02), style(bold=2))
    assert (seen.prompt, seen.num_completion_tokens, seen.truncated) == (3, 7, True)
    assert bare.score == Score(1.5)
    assert bare.num_completion_tokens is None


def test_scoring_asks_a_service_and_keeps_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs are siblings, hacks stand alone, clean categories and item errors are left out, and no text is written."""
    clean, hacks, output = tmp_path / "clean.jsonl", tmp_path / "hacks", tmp_path / "items.jsonl"
    clean.write_text(json.dumps({"prompt": "secret", "chosen": "secret a", "rejected": "secret b"}) + "\n")
    hacks.mkdir()
    rows = [("zalgo", "secret c"), ("in_distribution", "secret d"), ("zalgo", "refused")]
    (hacks / "rows.jsonl").write_text(
        "".join(json.dumps({"category": kind, "prompt": "p", "response": text}) + "\n" for kind, text in rows)
    )

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked = json.loads(request.content)
        assert asked["diagnostics"] == "full"
        results = [
            {"index": n, "error": {}} if item["completion"] == "refused" else {"index": n, "reward": float(n)}
            for n, item in enumerate(asked["items"])
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


def test_report_of_scored_items(tmp_path: Path, known: MonitorReference) -> None:
    """From a file of scored items the report names every hack, its share and signal, and the false alarms."""
    path = tmp_path / "items.jsonl"
    with path.open("w") as out:
        for kind, seen in (
            (CLEAN, stream(300, seed=54)),
            ("loud", stream(30, 1, seed=55, hacked=1.0, first_prompt=900)),
        ):
            for item in seen:
                result = msgspec.to_builtins(item.score) | {
                    "length": {"completion_tokens": item.num_completion_tokens, "truncated": False}
                }
                out.write(json.dumps({"kind": kind, "prompt": item.prompt, "result": result}) + "\n")

    report = run(read_pools(path), known, runs=3, clean_batches=20, run_length=10_000)

    assert report["clean_prompts"] == 300
    assert report["hacks"]["loud"]["items"] == 30
    assert report["hacks"]["loud"]["share"] < 0.1
    assert report["early"] == 1
    assert report["false_alarms"]["batches"] == 20
    json.dumps(report, allow_nan=False)
