"""``reward-score``: scores data files in one job that can be resumed.

Arguments, the output and the first row of the input are checked before anything heavy is imported.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scoring.job_folder import FOLDER_MARKER, JobFolder, check_job_folder, may_replace
from scoring.parts import OUTPUT_SUFFIXES, Format, format_of
from scoring.selection import selection
from scoring.sources import SizedFile, check_first_rows, count_rows, divide, find_files
from service.arguments import CommandParser, device, named_weight, not_empty, number_between, whole_number
from service.checkpoints.hub import check_source, local_folder
from service.commands import run_command, tell_on_standard_error
from service.data.files import is_url
from service.errors import JobError, OutputError, SettingsError
from service.outputs import check_output_file, check_output_folder
from service.records import DEMO_MODEL, MAX_PESSIMISM

if TYPE_CHECKING:
    from scoring.encoding import OutputPlan
    from scoring.run import BlockRunner
    from scoring.statistics import Statistics
    from service.settings import Settings

BLOCK_ROWS = 1024
START_WAIT_S = 5.0
"""Seconds for which a service that does not answer is tried."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``reward-score``; returns the exit status: 0, or 1 after one sentence on standard error."""
    return run_command("reward-score", "serve", lambda: _run(arguments))


@dataclass(frozen=True, slots=True)
class _Job:
    """A checked command line."""

    options: argparse.Namespace
    out: Path
    files: list[SizedFile]

    settings: dict[str, Any]
    """What the output depends on, by the names that messages use; the version of the model is added once known."""


def _run(arguments: Sequence[str] | None) -> int:
    parser = command_parser()
    options = parser.parse(arguments)
    _check_combinations(parser, options)
    out = _check_output(options)
    files = find_files(options.input)
    job = _Job(options, out, files, _settings_of(options, files))

    check_job_folder(out, job.settings, resume=options.resume, overwrite=options.overwrite)
    check_first_rows(files)
    _check_model(options)
    return _score(job)


def _check_combinations(parser: CommandParser, options: argparse.Namespace) -> None:
    of_model = ("model", "device", "dtype", "threads", "engine", "calibration")
    if options.url is not None and (given := [name for name in of_model if getattr(options, name) is not None]):
        parser.error(f"--{given[0]} is a property of the service that --url names: leave one of the two out")
    if options.url is not None and _uses_ray(options):
        parser.error("--url needs no --ray: the service has replicas of its own")
    if options.pessimism is not None and options.diagnostics != "full":
        parser.error("--pessimism needs --diagnostics full")
    if options.resume and options.overwrite:
        parser.error("--resume continues an unfinished job and --overwrite starts again: give one of them")


def _uses_ray(options: argparse.Namespace) -> bool:
    return bool(options.ray or options.replicas is not None or options.ray_address is not None)


def _check_output(options: argparse.Namespace) -> Path:
    if is_url(options.output):
        raise OutputError(f"{options.output} is a URL: write to a local file or folder and copy it.")
    out = Path(options.output)
    kind = format_of(out.name)
    if kind is None and out.suffix and not out.is_dir():
        raise OutputError(
            f"{out}: the name of an output file ends in {', '.join(OUTPUT_SUFFIXES)}; that of a folder has no ending."
        )
    if kind is not None and options.format not in {None, kind}:
        raise OutputError(f"{out} is a file of another format than --format {options.format}: leave --format out.")
    overwrite = options.overwrite or (options.resume and may_replace(out))
    if kind is None:
        check_output_folder(out, overwrite=overwrite, marker=FOLDER_MARKER)
    else:
        check_output_file(out, overwrite=overwrite)
    return out


def _check_model(options: argparse.Namespace) -> None:
    if options.url is not None:
        from reward_client.addresses import service_url

        service_url(options.url)
    elif options.model not in {None, DEMO_MODEL} and options.engine != "oracle":
        check_source(options.model)
        if not _uses_ray(options):
            local_folder(options.model)


def _settings_of(options: argparse.Namespace, files: Sequence[SizedFile]) -> dict[str, Any]:
    return {
        "set of input files": [[str(sized.file), sized.num_bytes] for sized in files],
        "--diagnostics": options.diagnostics,
        "--truncation": options.truncation,
        "--calibration": options.calibration,
        "--weights": options.weights and [list(weight) for weight in options.weights],
        "--pessimism": options.pessimism,
        "--select": None if options.select is None else str(options.select),
        "--block-rows": options.block_rows,
        "output format": _format(options),
    }


def _format(options: argparse.Namespace) -> str:
    return format_of(Path(options.output).name) or options.format or "parquet"


# --- The job ---------------------------------------------------------------------------------------------------------


def _score(job: _Job) -> int:
    from rich.console import Console

    from scoring.progress import shown_progress
    from scoring.run import Input, run_job, total_of, write_output
    from scoring.statistics import summary_lines

    options, plan = job.options, _plan(job.options)
    data = Input(tuple(divide(job.files)), options.block_rows)
    console = Console(stderr=True, soft_wrap=True)
    with _runner(options, plan) as runner:
        settings = {**job.settings, "model version": runner.version}
        with JobFolder(job.out, settings, plan.kind, resume=options.resume, overwrite=options.overwrite) as folder:
            before = total_of(folder.finished.values())
            begin = time.monotonic()
            num_rows = count_rows(job.files) if console.is_terminal else None
            with shown_progress(console, num_rows, before.num_rows) as done:
                total = run_job(runner, data, plan, folder, max_errors=options.max_errors, done=done)
            seconds = time.monotonic() - begin
            as_json = write_output(folder, job.out, plan)
    for line in _closing_lines(job.out, total, before, seconds, as_json):
        tell_on_standard_error(line)
    if options.summary:
        unit = "characters" if plan.level == "none" else "tokens"
        print("\n".join(summary_lines(total, length_unit=unit)))
    if num_unreadable := total.errors["unreadable_file"]:
        what = "one file" if num_unreadable == 1 else f"{num_unreadable:,} files"
        tell_on_standard_error(f"reward-score: {what} could not be read to the end; see error_code unreadable_file.")
        return 1
    return 0


def _closing_lines(
    out: Path, total: Statistics, before: Statistics, seconds: float, as_json: Sequence[str]
) -> Iterator[str]:
    num_items = total.num_items - before.num_items
    resumed = f", {before.num_rows:,} of them by an earlier run" if before.num_rows else ""
    errors = f", {total.num_errors:,} with errors" if total.num_errors else ""
    rate = f"{num_items:,} items in {seconds:.1f} s, {num_items / max(seconds, 1e-9):,.1f} items/s"
    yield f"{out}: {total.num_rows:,} rows{resumed}{errors}; {rate}"
    if as_json:
        yield f"{out}: written as JSON text, because the values have no common type: {', '.join(as_json)}"


def _plan(options: argparse.Namespace) -> OutputPlan:
    from scoring.encoding import OutputPlan

    kind: Format = "jsonl" if _format(options) == "jsonl" else "parquet"
    return OutputPlan(kind, options.diagnostics, options.select, options.pessimism)


@contextmanager
def _runner(options: argparse.Namespace, plan: OutputPlan) -> Iterator[BlockRunner]:
    from scoring.run import InProcessRunner

    if options.url is not None:
        from reward_client import RewardClient

        from scoring.service_scorer import ServiceScorer

        with RewardClient(options.url, wait_for_start_s=START_WAIT_S) as client:
            yield InProcessRunner(
                ServiceScorer(client, plan.level, options.truncation, options.weights and dict(options.weights))
            )
    elif _uses_ray(options):
        try:
            from scoring.ray_data import RayRunner, model_version_on_cluster, plan_pool, started_ray
        except ImportError as error:
            raise JobError(f"Ray Data needs the package {error.name}: pip install '.[score]' in a clone.") from error

        with started_ray(options.ray_address):
            pool = plan_pool(options.replicas, on_gpu=(options.device or "").startswith("cuda"))
            threads = None if pool.gpus else options.threads or max(1, int(pool.cpus))
            settings = _model_settings(options, threads)
            yield RayRunner(settings, pool, model_version_on_cluster(settings, pool))
    else:
        from scoring.local_scorer import LocalScorer

        yield InProcessRunner(LocalScorer(_model_settings(options, options.threads)))


def _model_settings(options: argparse.Namespace, threads: int | None) -> Settings:
    from service.settings import read_settings

    given = {"path": options.model, "device": options.device, "dtype": options.dtype, "engine": options.engine}
    model: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if options.weights:
        model["reward_weights"] = dict(options.weights)
    tree = {
        "model": model | ({} if threads is None else {"num_threads": threads}),
        "diagnostics": {"level": options.diagnostics, "calibration": options.calibration},
        "tokenization": {} if options.truncation is None else {"truncation": options.truncation},
    }
    if options.engine == "oracle" and options.model is not None:
        raise SettingsError("The oracle has no checkpoint: leave --model out.")
    return read_settings(tree)


def command_parser() -> CommandParser:
    """Return the parser of ``reward-score``."""
    parser = CommandParser(
        prog="reward-score",
        usage="reward-score INPUT OUTPUT [--model DIR | --url URL] [options]",
        description="Score data files: rewards, diagnostics and errors as columns, in a job that can be resumed.",
    )
    add = parser.add_argument
    add("input", type=not_empty, metavar="INPUT", help="a data file, folder, quoted glob pattern, or URL of fsspec")
    add(
        "output",
        type=not_empty,
        metavar="OUTPUT",
        help=f"a file that ends in {', '.join(OUTPUT_SUFFIXES)}, or a folder of part files",
    )
    _add_job_options(parser.add_argument_group("the job"))
    _add_output_options(parser.add_argument_group("what is written"))
    _add_reward_options(parser.add_argument_group("the rewards"))
    _add_model_options(parser.add_argument_group("where the model runs"))
    return parser


def _add_job_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--resume", action="store_true", help="continue an unfinished job, if there is one")
    add("--overwrite", action="store_true", help="replace an earlier OUTPUT, or start an unfinished job again")
    add("--max-errors", type=whole_number(0), metavar="N", help="end the job at more rows with errors (default: never)")
    add(
        "--block-rows",
        type=whole_number(1),
        default=BLOCK_ROWS,
        metavar="N",
        help=f"rows that are written and resumed as a whole (default: {BLOCK_ROWS:,})",
    )


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--format", choices=("jsonl", "parquet"), help="of the files in a folder (default: parquet)")
    add("--diagnostics", choices=("none", "basic", "full"), default="basic", help="level (default: basic)")
    add(
        "--select",
        type=selection,
        metavar="best|worst|top-k:N",
        help="write only these completions of each prompt, with their rank",
    )
    add("--summary", action="store_true", help="print accuracy, length correlation, OOD rate and counts of errors")


def _add_reward_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--truncation",
        choices=("error", "prompt_left"),
        help="of items above the token limit: an error, or the prompt is cut on the left (default: error, or the "
        "service's setting)",
    )
    add(
        "--weights",
        nargs="+",
        type=named_weight,
        metavar="NAME=WEIGHT",
        help="of the outputs of a model with several, whose weighted sum is the reward (default: the model's own)",
    )
    add("--calibration", type=not_empty, metavar="FILE", help="calibration file (default: that of the checkpoint)")
    add(
        "--pessimism",
        type=number_between(0, MAX_PESSIMISM),
        metavar="K",
        help="add the column reward_lower: the reward less K times its disagreement (needs --diagnostics full)",
    )


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", type=not_empty, metavar="DIR", help=f"checkpoint, bundle, adapter or hub id (default: {DEMO_MODEL})")
    add("--url", type=not_empty, help="a running service instead of a model")
    add("--engine", choices=("auto", "torch", "onnx", "oracle"), help="as for reward-serve")
    add("--device", type=device, help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="arithmetic of the body (default: auto)")
    add("--threads", type=whole_number(1), metavar="N", help="CPU threads of the forward pass (default: all)")
    add("--ray", action="store_true", help="score with Ray Data")
    add(
        "--replicas", type=whole_number(1), metavar="N", help="replicas of the model with Ray Data (default: one a GPU)"
    )
    add("--ray-address", type=not_empty, metavar="ADDRESS", help="of a Ray cluster, or auto (default: started here)")


if __name__ == "__main__":
    sys.exit(main())
