"""Runs a job: reads blocks, leaves out the finished ones, stores what was scored, and joins the parts in the end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from scoring.blocks import Block, BlockKey, read_blocks
from scoring.encoding import BlockRecord, EncodedBlock, OutputPlan, encode_block
from scoring.job_folder import FOLDER_MARKER, JobFolder
from scoring.parts import format_of, join_parts, write_folder
from scoring.progress import Done
from scoring.scorers import BlockScorer
from scoring.selection import select
from scoring.statistics import Statistics
from service.data.files import DataFile
from service.errors import DatasetError, JobError
from service.outputs import new_file, new_folder

MAX_ENCODING_BLOCKS = 4
"""Scored blocks that wait for the thread that completes and encodes them."""


@dataclass(frozen=True, slots=True)
class Input:
    """What a job reads."""

    units: tuple[tuple[DataFile, ...], ...]
    block_rows: int


class BlockRunner(Protocol):
    """Scores and encodes the blocks of an input that are not finished."""

    @property
    def version(self) -> str:
        """Version of the model."""
        ...

    def run(self, data: Input, plan: OutputPlan, finished: Mapping[BlockKey, str]) -> Iterator[EncodedBlock]:
        """Yield every block that is not finished, once, in any order.

        Args:
            data: the input.
            plan: of the output.
            finished: keys and digests of the blocks that are left out.

        Raises:
            DatasetError: a finished block has other rows than before.
        """
        ...


class InProcessRunner:
    """Runs a job with a scorer in this process; completing and encoding blocks has a thread of its own."""

    def __init__(self, scorer: BlockScorer) -> None:
        self._scorer = scorer

    @property
    def version(self) -> str:
        """Version of the model."""
        return self._scorer.version

    def run(self, data: Input, plan: OutputPlan, finished: Mapping[BlockKey, str]) -> Iterator[EncodedBlock]:
        """Yield every block that is not finished; see `BlockRunner.run`."""
        return encode_blocks(self._scorer, unfinished_blocks(data, finished), plan)


def unfinished_blocks(data: Input, finished: Mapping[BlockKey, str]) -> Iterator[Block]:
    """Yield the blocks of all units that are not finished.

    Raises:
        DatasetError: a finished block has other rows than before.
    """
    for unit in range(len(data.units)):
        yield from unfinished_blocks_of(unit, data, finished)


def unfinished_blocks_of(unit: int, data: Input, finished: Mapping[BlockKey, str]) -> Iterator[Block]:
    """Yield the blocks of one unit that are not finished; raises as `unfinished_blocks` does."""
    for block in read_blocks(unit, data.units[unit], data.block_rows):
        digest = finished.get(block.key)
        if digest is None:
            yield block
        elif digest != block.digest:
            first = block.rows[0]
            raise DatasetError(
                f"{first.source} has been changed since the job began, at row {first.number} or after it: start again "
                "with --overwrite."
            )


def encode_blocks(scorer: BlockScorer, blocks: Iterable[Block], plan: OutputPlan) -> Iterator[EncodedBlock]:
    """Score and encode blocks; encoding runs in a thread while the next ones are scored."""
    waiting: deque[Future[EncodedBlock]] = deque()
    scored_blocks = scorer.score_blocks(blocks)
    with ThreadPoolExecutor(1, thread_name_prefix="encode") as encoder, closing(scored_blocks):  # type: ignore[type-var]
        for scored in scored_blocks:
            waiting.append(encoder.submit(encode_block, scored, scorer.version, plan, scorer.outputs))
            while waiting and (len(waiting) > MAX_ENCODING_BLOCKS or waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def run_job(
    runner: BlockRunner, data: Input, plan: OutputPlan, folder: JobFolder, *, max_errors: int | None, done: Done
) -> Statistics:
    """Score what is not finished and store it in the job's folder; returns the sums of all blocks.

    Raises:
        JobError: there are more rows with errors than ``max_errors``. What is finished stays in the folder.
        DatasetError: the input was changed since the job began.
        OutputError: the disk is full.
    """
    total = total_of(folder.finished.values())
    _check_errors(total, max_errors)
    finished = {key: record.digest for key, record in folder.finished.items()}
    for encoded in runner.run(data, plan, finished):
        folder.add(encoded)
        statistics = encoded.record.statistics
        total = total.merged(statistics)
        done(statistics.num_rows, statistics.num_items)
        _check_errors(total, max_errors)
    return total


def total_of(records: Iterable[BlockRecord]) -> Statistics:
    """Return the sums of blocks."""
    total = Statistics()
    for record in records:
        total = total.merged(record.statistics)
    return total


def write_output(folder: JobFolder, out: Path, plan: OutputPlan) -> list[str]:
    """Join the part files under the output's name, by one rename, and delete the job's folder.

    Returns:
        The columns of the input that are JSON text because their values have no common type in Parquet.
    """
    keys = sorted(folder.finished)
    parts = [folder.part(key) for key in keys]
    ranks = _ranks(folder, keys, plan)
    if format_of(out.name) is None:
        with new_folder(out, overwrite=folder.overwrite, marker=FOLDER_MARKER) as unfinished_folder:
            (unfinished_folder / FOLDER_MARKER).write_text(folder.description(), encoding="utf-8")
            as_json = write_folder(parts, ranks, unfinished_folder, plan.kind)
    else:
        with new_file(out) as unfinished:
            as_json = join_parts(parts, ranks, unfinished, plan.kind, out.name)
    folder.remove()
    return as_json


def _ranks(folder: JobFolder, keys: Sequence[BlockKey], plan: OutputPlan) -> Sequence[Mapping[int, int] | None]:
    if plan.selection is None:
        return [None] * len(keys)
    selected = select({key: folder.finished[key].candidates for key in keys}, plan.selection)
    return [selected[key] for key in keys]


def _check_errors(total: Statistics, max_errors: int | None) -> None:
    if max_errors is not None and total.num_errors > max_errors:
        codes = ", ".join(f"{code}: {count:,}" for code, count in total.errors.most_common())
        raise JobError(
            f"{total.num_errors:,} of {total.num_rows:,} rows have errors ({codes}), more than --max-errors "
            f"{max_errors}; continue with --resume and a higher number."
        )
