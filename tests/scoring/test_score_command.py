"""``reward-score`` from its command line to its output, with the oracle engine."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from scoring.command import main
from scoring.job_folder import job_folder_of

ORACLE = ("--engine", "oracle")


def items(count: int = 30) -> list[dict[str, Any]]:
    return [{"prompt": f"Question {n // 3}?", "completion": f"Answer {n * n}.", "n": n} for n in range(count)]


def pairs(count: int = 12) -> list[dict[str, Any]]:
    return [{"prompt": f"Question {n}?", "chosen": f"Yes {n}.", "rejected": f"No {n}."} for n in range(count)]


def lines(rows: list[Any]) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def score(*arguments: object, status: int = 0) -> None:
    assert main([*map(str, arguments), *ORACLE]) == status


def read(out: Path) -> list[dict[str, Any]]:
    if out.suffix == ".parquet":
        return list(parquet.read_table(out).to_pylist())
    content = out.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(content) if out.suffix == ".gz" else content).splitlines()]


def rewards_of(out: Path) -> list[float]:
    return [row["reward"] for row in read(out)]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
def test_every_row_has_one_output_row_in_order(tmp_path: Path, name: str) -> None:
    """Input columns are unchanged, rewards and locations are added, and nothing else is left in the folder."""
    (tmp_path / "in.jsonl").write_bytes(lines(items()))

    score(tmp_path / "in.jsonl", tmp_path / name, "--block-rows", 7)

    rows = read(tmp_path / name)
    assert [{key: row[key] for key in ("prompt", "completion", "n")} for row in rows] == items()
    assert [row["source_row"] for row in rows] == list(range(1, 31))
    assert all(row["model_version"] == "oracle" and row["error_code"] is None for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", name}


def test_rewards_do_not_depend_on_blocks_or_formats(tmp_path: Path) -> None:
    """Lines, compressed lines and Parquet have the same rewards, whatever the blocks."""
    (tmp_path / "a.jsonl").write_bytes(lines(items()))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(items())))
    parquet.write_table(pa.Table.from_pylist(items()), tmp_path / "c.parquet")

    outputs = []
    for block_rows, name in ((1000, "a.jsonl"), (2, "b.jsonl.gz"), (5, "c.parquet")):
        outputs.append(tmp_path / "out" / f"{name}.jsonl")
        score(tmp_path / name, outputs[-1], "--block-rows", block_rows)

    assert rewards_of(outputs[0]) == rewards_of(outputs[1]) == rewards_of(outputs[2])


def test_folders_patterns_and_urls_are_read(tmp_path: Path) -> None:
    """A folder, a pattern, a file URL and a URL of another storage give the same rewards."""
    folder = tmp_path / "data"
    folder.mkdir()
    storage = fsspec.filesystem("memory")
    for name, part in (("a.jsonl", items()[:10]), ("b.jsonl.gz", items()[10:])):
        content = gzip.compress(lines(part)) if name.endswith(".gz") else lines(part)
        (folder / name).write_bytes(content)
        storage.pipe(f"/reward-score/{name}", content)
    sources = [
        folder,
        folder / "*.jsonl*",
        f"file://{folder}",
        "memory://reward-score",
        "memory://reward-score/*.jsonl*",
    ]

    try:
        outputs = [tmp_path / f"{index}.jsonl" for index in range(len(sources))]
        for source, out in zip(sources, outputs, strict=True):
            score(source, out)
    finally:
        storage.rm("/reward-score", recursive=True)

    assert all(rewards_of(out) == rewards_of(outputs[0]) for out in outputs)
    assert len(rewards_of(outputs[0])) == 30
    source_file = read(outputs[3])[0]["source_file"]
    assert source_file.startswith("memory://")
    assert source_file.endswith("/reward-score/a.jsonl")


def test_bad_rows_are_rows_with_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They have file and line, the others have rewards, and the status is 0."""
    rows: list[Any] = [*items(3), "not json", {"prompt": "a", "completion": None}, *items(3)]
    (tmp_path / "in.jsonl").write_bytes(lines(rows))

    score(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--summary")

    found = read(tmp_path / "out.jsonl")
    assert [row["error_code"] for row in found] == [None] * 3 + ["malformed_row", "unusable_row"] + [None] * 3
    assert "line 4" in found[3]["error_detail"]
    assert [row["reward"] is None for row in found] == [row["error_code"] is not None for row in found]
    output = capsys.readouterr()
    assert "rows: 8; with errors: 2" in output.out
    assert "2 with errors" in output.err


def test_an_item_error_is_in_its_row_and_spares_the_others(tmp_path: Path) -> None:
    """An item over the token limit has the service's code; the other completion of its pair has its reward."""
    (tmp_path / "in.jsonl").write_bytes(lines([pairs(1)[0] | {"rejected": "x" * 5000}, *pairs(2)]))

    score(tmp_path / "in.jsonl", tmp_path / "out.jsonl")

    first, second, _ = read(tmp_path / "out.jsonl")
    assert (first["error_code"], first["rejected_reward"], first["margin"]) == ("sequence_too_long", None, None)
    assert first["error_detail"].startswith("rejected: ")
    assert first["chosen_reward"] is not None
    assert second["margin"] == second["chosen_reward"] - second["rejected_reward"]


def test_too_many_errors_end_the_job_which_can_be_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One error more than allowed ends it with a sentence; with a higher limit it is continued."""
    (tmp_path / "in.jsonl").write_bytes(lines([*items(20), "not json", "not json", *items(9)]))
    out = tmp_path / "out.jsonl"

    score(tmp_path / "in.jsonl", out, "--block-rows", 5, "--max-errors", 1, status=1)
    assert "2 of" in (message := capsys.readouterr().err)
    assert "--max-errors 1" in message
    assert not out.exists()

    score(tmp_path / "in.jsonl", out, "--block-rows", 5, "--max-errors", 2, "--resume")
    assert [row["source_row"] for row in read(out)] == list(range(1, 32))
    assert "by an earlier run" in capsys.readouterr().err


def test_an_unfinished_job_is_neither_replaced_nor_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --resume it is refused, with other settings or another input as well; --overwrite starts again."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines([*items(20), "not json", *items(9)]))
    score(source, out, "--block-rows", 5, "--max-errors", 0, status=1)
    capsys.readouterr()

    score(source, out, "--block-rows", 5, status=1)
    assert "--resume" in capsys.readouterr().err
    score(source, out, "--block-rows", 5, "--diagnostics", "none", "--resume", status=1)
    assert "--diagnostics basic, and now it is --diagnostics none" in capsys.readouterr().err
    content = source.read_bytes()
    source.write_bytes(content.replace(b"Answer", b"Reply!"))
    score(source, out, "--block-rows", 5, "--resume", status=1)
    assert "has been changed since the job began" in capsys.readouterr().err
    source.write_bytes(content + lines(items(1)))
    score(source, out, "--block-rows", 5, "--resume", status=1)
    assert "another set of input files" in capsys.readouterr().err

    score(source, out, "--overwrite")
    assert len(read(out)) == 31
    assert not job_folder_of(out).exists()


def test_another_model_version_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A job that was started with one version is not continued with another."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines([*items(20), "not json"]))
    score(source, out, "--block-rows", 5, "--max-errors", 0, status=1)
    job = job_folder_of(out) / "job.json"
    job.write_text(job.read_text().replace('"model version": "oracle"', '"model version": "earlier"'))

    score(source, out, "--block-rows", 5, "--resume", status=1)

    assert "model version earlier, and now it is model version oracle" in capsys.readouterr().err


def test_a_line_that_a_crash_cut_off_is_not_a_finished_block(tmp_path: Path) -> None:
    """Its block is scored again; so is a block whose part file is missing. Every row is there once."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines([*items(29), "not json"]))
    score(source, out, "--block-rows", 5, "--max-errors", 0, status=1)
    log = job_folder_of(out) / "blocks.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    next(job_folder_of(out).glob("part-*")).unlink()

    score(source, out, "--block-rows", 5, "--resume")

    assert [row["source_row"] for row in read(out)] == list(range(1, 31))


def test_an_earlier_output_is_replaced_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file, and a folder of part files; a folder that holds something else is never replaced."""
    (tmp_path / "in.jsonl").write_bytes(lines(items()))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    for out in (tmp_path / "out.jsonl", tmp_path / "folder"):
        score(tmp_path / "in.jsonl", out)
        score(tmp_path / "in.jsonl", out, status=1)
        score(tmp_path / "in.jsonl", out, "--overwrite")

    score(tmp_path / "in.jsonl", tmp_path / "mine", "--overwrite", status=1)

    assert "is not replaced" in capsys.readouterr().err
    assert (tmp_path / "mine" / "notes.txt").exists()


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_folder_of_parts_can_be_scored_again(tmp_path: Path, kind: str) -> None:
    """Part files are in the order of the input, and as an input they give the same rewards."""
    (tmp_path / "in.jsonl").write_bytes(lines(items()))
    score(tmp_path / "in.jsonl", tmp_path / "parts", "--format", kind, "--block-rows", 6)

    score(tmp_path / "parts", tmp_path / "again.jsonl")

    again = read(tmp_path / "again.jsonl")
    assert [row["n"] for row in again] == list(range(30))
    assert [row["input_reward"] for row in again] == [row["reward"] for row in again]


def test_the_best_completions_of_each_prompt_are_selected(tmp_path: Path) -> None:
    """Also where those of one prompt are in several blocks; a prompt without a reward has no row."""
    rows = [*items(30), {"prompt": "long", "completion": "x" * 5000}]
    (tmp_path / "in.jsonl").write_bytes(lines(rows[::2] + rows[1::2]))
    score(tmp_path / "in.jsonl", tmp_path / "all.jsonl")
    by_prompt: dict[str, list[float]] = {}
    for row in read(tmp_path / "all.jsonl"):
        if row["reward"] is not None:
            by_prompt.setdefault(row["prompt"], []).append(row["reward"])

    for name, option in (("best.parquet", "best"), ("worst.jsonl", "worst"), ("top.jsonl", "top-k:2")):
        score(tmp_path / "in.jsonl", tmp_path / name, "--select", option, "--block-rows", 4)
    best, worst, top = (read(tmp_path / name) for name in ("best.parquet", "worst.jsonl", "top.jsonl"))

    assert {row["prompt"]: row["reward"] for row in best} == {key: max(found) for key, found in by_prompt.items()}
    assert {row["prompt"]: row["reward"] for row in worst} == {key: min(found) for key, found in by_prompt.items()}
    assert sorted((row["prompt"], row["rank"], row["reward"]) for row in top) == sorted(
        (key, rank, reward)
        for key, found in by_prompt.items()
        for rank, reward in enumerate(sorted(found, reverse=True)[:2], start=1)
    )


def test_pairs_cannot_be_selected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said with file and row."""
    (tmp_path / "in.jsonl").write_bytes(lines(pairs()))

    score(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--select", "best", status=1)

    assert "row 1 is a pair" in capsys.readouterr().err


def test_the_summary_is_that_of_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Accuracy and number of pairs are those of the margins that were written."""
    (tmp_path / "in.jsonl").write_bytes(lines(pairs(40)))

    score(tmp_path / "in.jsonl", tmp_path / "out.parquet", "--summary", "--block-rows", 9)

    margins = [row["margin"] for row in read(tmp_path / "out.parquet")]
    share = sum(margin > 0 for margin in margins) / len(margins)
    assert f"accuracy: {share:.1%} (" in (summary := capsys.readouterr().out)
    assert "of 40 pairs, 0 ties" in summary


def test_a_damaged_file_is_scored_as_far_as_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output has all rows that could be read, and the status is 1."""
    content = gzip.compress(lines(items(3000)))
    (tmp_path / "in.jsonl.gz").write_bytes(content[: len(content) // 2])

    score(tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl", status=1)

    rows = read(tmp_path / "out.jsonl")
    assert len(rows) > 100
    assert [row["error_code"] for row in rows][-2:] == [None, "unreadable_file"]
    assert "could not be read to the end" in capsys.readouterr().err
