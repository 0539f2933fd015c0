"""Makes the calibration of a reward model from completions that count as normal (``reward-calibrate``).

The calibration is written to the checkpoint folder and is bound to the checkpoint. The printed figures are measured on
prompts that nothing was fitted to; the command fails when the false-alarm rate is out of tolerance there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console

from export.calibration.build import DataFacts, build
from export.calibration.data import CleanItem, read_items
from export.calibration.hacks import SUITE
from export.calibration.printing import print_facts, print_report
from export.calibration.report import TestReport, report, test_items
from export.calibration.scored_parts import Sizes, count_items, score_parts
from service.assembly import OpenedModel, ServedModel, assemble, open_model, with_calibration
from service.checkpoints.demo import ADAPTER_FOLDER
from service.checkpoints.files import CALIBRATION_FILE
from service.console import progress_bar, stages
from service.data.rows import dataset_files
from service.diagnostics.calibration import read_calibration, write_calibration
from service.diagnostics.calibration_facts import CalibrationFacts
from service.diagnostics.candidate_taps import candidate_taps
from service.errors import CalibrationError, StartupError
from service.settings import DEMO_MODEL, ModelSettings, Settings, read_settings
from service.version import add_version_option

OUT_OF_TOLERANCE = 3
LOG_WIDTH = 140


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0 for success, 1 when nothing was written, 3 when a false-alarm rate is out of tolerance.
    """
    options = _parser().parse_args(arguments)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else LOG_WIDTH)
    try:
        return _calibrate(options, console)
    except StartupError as error:
        console.print(str(error), markup=False, highlight=False)
        return 1


def _calibrate(options: argparse.Namespace, console: Console) -> int:
    settings = _settings(options)
    opened = open_model(settings.model)
    # The demo model's folder is a copy in the cache; its calibration is stored in the clone, as its adapter is.
    destination = ADAPTER_FOLDER if settings.model.is_demo else opened.checkpoint.path
    out = Path(options.out) if options.out else destination / CALIBRATION_FILE
    made: CalibrationFacts | None = None
    measured: ServedModel | None = None
    if not options.test_only:
        measured, made = _make(options, settings, opened, out, console)
        print_facts(console, made)
    found = _test(options, lambda: _assemble_to_test(settings, opened, measured, out), console)
    if found is not None:
        print_report(console, found)
    if options.json:
        facts = made or read_calibration(out).facts
        results = {"calibration": facts.as_json(), "test": None if found is None else asdict(found)}
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return _exit_status(made, found, console)


def _make(
    options: argparse.Namespace, settings: Settings, opened: OpenedModel, out: Path, console: Console
) -> tuple[ServedModel, CalibrationFacts]:
    tell = partial(console.print, markup=False, highlight=False)
    items = list(read_items(Path(options.data), held_out_only=options.held_out, tell=tell))
    if options.max_items and len(items) > options.max_items:
        items = _some_prompts(items, options.max_items, options.seed)
    sets = [entry for entry in SUITE if entry.name not in options.drop_set]
    sizes = Sizes(options.items_per_set, max(1, options.items_per_set // 2), options.items_per_set)
    served = _assemble_to_measure(settings, opened)
    cache = Path(options.cache) if options.cache else None
    with progress_bar(console, "Scoring", count_items(items, sizes, sets)) as advance:
        scored = score_parts(served, items, sizes, advance, seed=options.seed, sets=sets, cache=cache)
    data = DataFacts(_hash(Path(options.data)), options.held_out, options.drop_set)
    with stages(console) as stage:
        calibration = build(served, scored, seed=options.seed, data=data, show=stage)
    if calibration.facts.weak and not options.force:
        raise CalibrationError(
            "Nothing was written: the mean AUROC over the built-in hacks is only "
            f"{calibration.facts.mean_auroc:.2f}. --force writes the calibration anyway."
        )
    id_ = write_calibration(calibration, out)
    console.print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {id_}", highlight=False)
    return served, calibration.facts


def _test(
    options: argparse.Namespace, assemble_model: Callable[[], ServedModel], console: Console
) -> TestReport | None:
    paths = [Path(path) for path in (*options.test, *options.ood)]
    if not paths:
        return None
    tell = partial(console.print, markup=False, highlight=False)
    rows = [row for path in paths for row in read_items(path, tell=tell)]
    served = assemble_model()
    if served.lookup.calibration is None:
        raise CalibrationError(str(served.lookup.reason))
    with progress_bar(console, "Testing", len(rows)) as advance:
        tested, num_left_out = test_items(served, rows, advance)
    return report(served, tested, num_left_out)


def _exit_status(made: CalibrationFacts | None, found: TestReport | None, console: Console) -> int:
    rates = [*(made.self_test.rates if made else ()), *(found.rates if found else ())]
    wrong = [rate.nominal for rate in rates if not rate.is_tolerable]
    if wrong:
        console.print(f"The realised false-alarm rate is out of tolerance at {', '.join(map(str, wrong))}.")
        return OUT_OF_TOLERANCE
    return 0


def _assemble_to_measure(settings: Settings, opened: OpenedModel) -> ServedModel:
    num_layers = int(opened.checkpoint.config.get_text_config().num_hidden_layers)
    return assemble(settings, taps=candidate_taps(num_layers), opened=opened)


def _assemble_to_test(settings: Settings, opened: OpenedModel, measured: ServedModel | None, out: Path) -> ServedModel:
    """Return the model with the calibration in ``out``, on the engine that was loaded to make it, if any."""
    if measured is not None:
        return with_calibration(measured, out)
    diagnostics = settings.diagnostics.model_copy(update={"calibration": str(out)})
    return assemble(settings.model_copy(update={"diagnostics": diagnostics}), opened=opened)


def _settings(options: argparse.Namespace) -> Settings:
    model = {"path": options.model, "dtype": options.dtype, "device": options.device}
    known = {name: value for name, value in model.items() if value is not None}
    if options.max_input_tokens:
        known["max_input_tokens"] = options.max_input_tokens
    return read_settings({"model": ModelSettings(**known).model_dump()})


def _some_prompts(items: Sequence[CleanItem], max_items: int, seed: int) -> list[CleanItem]:
    """Return about that many items, of prompts sampled at random; completions of one prompt stay together."""
    openings = list(dict.fromkeys(item.opening for item in items))
    random.Random(seed).shuffle(openings)  # noqa: S311 - a choice of items, not a secret
    sampled = set(openings[: max(1, round(len(openings) * max_items / len(items)))])
    return [item for item in items if item.opening in sampled]


def _hash(path: Path) -> str:
    digests = (hashlib.sha256(file.read_bytes()).digest() for file in dataset_files(path))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="reward-calibrate", description=__doc__.splitlines()[0])
    add_version_option(parser)
    parser.add_argument("model", metavar="DIR", help=f"checkpoint folder or hub id; {DEMO_MODEL}: the demo model")
    parser.add_argument("data", metavar="DATA", help="items (prompt, completion) or pairs (prompt, chosen, rejected)")
    parser.add_argument(
        "--out", metavar="FILE", help=f"default: {CALIBRATION_FILE} in the checkpoint folder (demo: in the clone)"
    )
    parser.add_argument(
        "--max-items", type=int, metavar="N", help="use about N items of DATA; prompts are sampled at random"
    )
    parser.add_argument(
        "--items-per-set", type=int, default=40, metavar="N", help="items of each set of hacks; default 40"
    )
    parser.add_argument(
        "--drop-set", action="append", default=[], choices=[entry.name for entry in SUITE], metavar="NAME",
        help="a built-in set that is normal in your traffic (code_dump, chinese, ...); repeatable",
    )  # fmt: skip
    parser.add_argument("--held-out", action="store_true", help="only prompts that the demo model was not trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", metavar="FOLDER", help="store scores there for later fits")
    parser.add_argument("--force", action="store_true", help="write the calibration even if it detects hardly anything")
    parser.add_argument("--test", action="append", default=[], metavar="DATA", help="test on these items; repeatable")
    parser.add_argument(
        "--ood", action="append", default=[], metavar="FOLDER",
        help="test on rows with prompt, response, category and is_ood; repeatable",
    )  # fmt: skip
    parser.add_argument("--test-only", action="store_true", help="test the existing calibration; DATA is not read")
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file")
    parser.add_argument("--dtype", help="arithmetic of the body; default: as reward-serve")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--max-input-tokens", type=int, metavar="N", help="token limit of the service")
    return parser


if __name__ == "__main__":
    sys.exit(main())
