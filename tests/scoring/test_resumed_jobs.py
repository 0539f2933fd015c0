"""Jobs that are killed, and jobs on Ray Data: every row has one output row."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from serving import eventually

from scoring.command import main
from scoring.job_folder import job_folder_of

COMMAND = (sys.executable, "-m", "scoring.command")


def write_rows(path: Path, count: int) -> Path:
    rows = (
        {"prompt": f"Question {n // 4}?", "completion": f"Answer {n}. " * (1 + n % 9), "n": n} for n in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def num_finished(out: Path) -> int:
    log = job_folder_of(out) / "blocks.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def read(out: Path) -> list[dict[str, Any]]:
    return list(parquet.read_table(out).to_pylist())


@pytest.mark.slow
@pytest.mark.parametrize("ray", [(), ("--ray",)], ids=["in-process", "ray"])
def test_a_killed_job_is_resumed_without_scoring_again(tmp_path: Path, ray: tuple[str, ...]) -> None:
    """Killed with signal 9 and resumed, it has one row for each input row, and scores only what was not finished."""
    source, out = write_rows(tmp_path / "in.jsonl", 20_000), tmp_path / "out.parquet"
    arguments = [str(source), str(out), "--engine", "oracle", "--block-rows", "100", *ray]
    killed = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert eventually(lambda: num_finished(out) >= 20 or killed.poll() is not None, 180)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    log = (job_folder_of(out) / "blocks.jsonl").read_bytes()
    finished = [json.loads(line) for line in log[: log.rfind(b"\n") + 1].splitlines()]
    assert not out.exists()

    resumed = subprocess.run(
        [*COMMAND, *arguments, "--resume"], capture_output=True, text=True, check=True, timeout=240
    )

    assert [row["n"] for row in read(out)] == list(range(20_000))
    before = sum(record["statistics"]["rows"] for record in finished)
    assert 0 < before < 20_000
    assert f"20,000 rows, {before:,} of them by an earlier run; {20_000 - before:,} items" in resumed.stderr
    assert not job_folder_of(out).exists()


@pytest.mark.slow
def test_ray_data_gives_the_rewards_of_one_process(tmp_path: Path) -> None:
    """Two replicas write the same rows in the same order, errors included; the last line on standard error is ours."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(3):
        write_rows(folder / f"{index}.jsonl", 500 + index)
    with (folder / "1.jsonl").open("a") as file:
        file.write("not json\n")
    assert main([str(folder), str(tmp_path / "one.parquet"), "--engine", "oracle"]) == 0

    arguments = [
        str(folder),
        str(tmp_path / "two.parquet"),
        "--engine",
        "oracle",
        "--replicas",
        "2",
        "--block-rows",
        "64",
    ]
    completed = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=240, check=False)

    assert completed.returncode == 0, completed.stderr
    one, two = read(tmp_path / "one.parquet"), read(tmp_path / "two.parquet")
    same = ("n", "source_file", "source_row", "reward", "error_code", "length_scored_tokens")
    assert [[row[name] for name in same] for row in two] == [[row[name] for name in same] for row in one]
    last = completed.stderr.splitlines()[-1]  # before it are messages of Ray's own
    assert re.fullmatch(r".*two\.parquet: 1,504 rows, 1 with errors; .*items/s", last)


@pytest.mark.slow
def test_an_error_on_a_replica_is_our_sentence(tmp_path: Path) -> None:
    """What ends a job in one process ends it on Ray with the same sentence."""
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "Why?", "chosen": "So.", "rejected": "No."}) + "\n")
    arguments = [
        str(tmp_path / "in.jsonl"),
        str(tmp_path / "out.jsonl"),
        "--engine",
        "oracle",
        "--ray",
        "--select",
        "best",
    ]

    completed = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=240, check=False)

    assert completed.returncode == 1
    last = completed.stderr.splitlines()[-1]
    assert last.startswith("reward-score: ")
    assert last.endswith("row 1 is a pair: --select needs rows of one completion each.")
