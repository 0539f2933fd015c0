"""The speed of `reward-score` against that of the pipeline alone, on the same rows in alternating rounds.

The pipeline gets token sequences that were made before the clock starts. The job reads the file, tokenizes, scores,
diagnoses, encodes and stores rows, and joins them to the output. Run it with ``python -m loadtest.batch_cost FILE``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import Progress

from loadtest.console import report_console
from scoring.blocks import read_blocks
from scoring.command import BLOCK_ROWS
from scoring.encoding import OutputPlan
from scoring.job_folder import JobFolder
from scoring.local_scorer import LOOK_AHEAD_BATCHES, LocalScorer
from scoring.run import InProcessRunner, Input, run_job, write_output
from scoring.sources import divide, find_files
from service.assembly import ServedModel, assemble
from service.data.files import DataFile
from service.errors import DatasetError, HttpError, StartupError
from service.offline import encode_items, score_offline
from service.records import Encoding, TokenSequence
from service.settings import read_settings

WARM_UP_ITEMS = 2_000
"""Scored before the first round: enough for the caches and the allocator, and short beside a round of many rows."""


@dataclass(frozen=True, slots=True)
class Round:
    """One pass of each over all rows."""

    pipeline_s: float
    """Seconds of the pipeline alone."""

    job_s: float
    """Seconds of the job, up to the finished output."""

    @property
    def share(self) -> float:
        """The job's items/s as a share of the pipeline's."""
        return self.pipeline_s / self.job_s


class BatchWork:
    """A data file, and a model to score it with.

    Args:
        source: as the input of `reward-score`.
        served: the model.
    """

    def __init__(self, source: str, served: ServedModel) -> None:
        self._served = served
        self._units: tuple[tuple[DataFile, ...], ...] = tuple(divide(find_files(source)))
        items = [
            item
            for unit, files in enumerate(self._units)
            for block in read_blocks(unit, files, BLOCK_ROWS)
            for item in block.items()
        ]
        encoding = Encoding(truncation=served.settings.tokenization.truncation)
        self._encoded: list[TokenSequence | HttpError] = list(encode_items(served.tokenization, items, encoding))

    @property
    def num_refused(self) -> int:
        """Items that are answered by an error, without a forward pass."""
        return sum(isinstance(one, HttpError) for one in self._encoded)

    @property
    def num_items(self) -> int:
        """Items of all rows; a pair has two."""
        return len(self._encoded)

    def time_pipeline(self, max_items: int | None = None) -> float:
        """Score the token sequences, the first ``max_items`` or all; returns seconds."""
        sequences = self._encoded[:max_items]
        pipeline = self._served.scorer.pipeline
        begin = time.perf_counter()
        num_scored = sum(
            1
            for _ in score_offline(
                pipeline,
                sequences,
                level=self._served.settings.diagnostics.level,
                max_batch_sequences=self._served.settings.batching.max_batch_sequences,
                look_ahead_tokens=LOOK_AHEAD_BATCHES * pipeline.engine.info.max_batch_tokens,
            )
        )
        seconds = time.perf_counter() - begin
        if num_scored != len(sequences):
            raise RuntimeError(f"The pipeline answered {num_scored} of {len(sequences)} items")
        return seconds

    def time_job(self, out: Path) -> float:
        """Run a job from the file to the output ``out``; returns seconds."""
        scorer = LocalScorer(self._served.settings, served=self._served)
        plan = OutputPlan("parquet", self._served.settings.diagnostics.level, None)
        begin = time.perf_counter()
        with JobFolder(out, {"round": out.name}, plan.kind, resume=False, overwrite=False) as folder:
            data = Input(self._units, BLOCK_ROWS)
            total = run_job(
                InProcessRunner(scorer), data, plan, folder, max_errors=None, done=lambda _rows, _items: None
            )
            write_output(folder, out, plan)
        seconds = time.perf_counter() - begin
        if total.num_items != self.num_items:
            raise RuntimeError(f"The job answered {total.num_items} of {self.num_items} items")
        return seconds


def measure(work: BatchWork, num_rounds: int, folder: Path, tell: Callable[[str], None]) -> list[Round]:
    """Return rounds; which of the two is first alternates. The pipeline has scored some items before the first."""
    tell("Warming up")
    work.time_pipeline(WARM_UP_ITEMS)
    rounds = []
    for number in range(num_rounds):
        seconds: dict[str, float] = {}
        for kind in ("pipeline", "job") if number % 2 == 0 else ("job", "pipeline"):
            tell(f"Round {number + 1}: {kind}")
            seconds[kind] = work.time_pipeline() if kind == "pipeline" else work.time_job(folder / f"{number}.parquet")
        rounds.append(Round(seconds["pipeline"], seconds["job"]))
    return rounds


def run(options: argparse.Namespace) -> int:
    """Measure as the command's options say; return the exit status."""
    console = report_console()
    tree = {
        "model": {"path": options.model, "dtype": options.dtype, "num_threads": options.threads},
        "diagnostics": {"level": options.diagnostics},
    }
    try:
        with tempfile.TemporaryDirectory(prefix="reward-batch-") as folder, Progress(console=console) as progress:
            task = progress.add_task("Loading", total=None)
            work = BatchWork(options.file, assemble(read_settings(tree)))
            rounds = measure(work, options.rounds, Path(folder), lambda doing: progress.update(task, description=doing))
    except (StartupError, DatasetError, OSError) as error:
        console.print(f"loadtest.batch_cost: {type(error).__name__}: {error}", markup=False, style="red")
        return 1
    _print(rounds, work, console)
    return 0


def _print(rounds: Sequence[Round], work: BatchWork, console: Console) -> None:
    for number, one in enumerate(rounds, 1):
        console.print(
            f"round {number}: pipeline {work.num_items / one.pipeline_s:,.1f} items/s, reward-score "
            f"{work.num_items / one.job_s:,.1f} items/s, {one.share:.1%}",
            highlight=False,
        )
    share = median(one.share for one in rounds)
    console.print(
        f"{work.num_items:,} items ({work.num_refused:,} refused): reward-score has {share:.1%} of the pipeline's "
        "items/s (median)",
        highlight=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a job against the pipeline, and print the shares."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.batch_cost", description=__doc__)
    parser.add_argument("file", help="data file of items or pairs, as for reward-score")
    parser.add_argument("--model", required=True, help="checkpoint, bundle or adapter")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads of the forward pass (default: all)")
    parser.add_argument("--diagnostics", choices=("none", "basic", "full"), default="basic")
    parser.add_argument("--rounds", type=int, default=3)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
