"""A calibration from items to a file: scores them, fits and writes the calibration, and tests it.

The printed figures are measured on prompts that nothing was fitted to.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from export.calibration.build import DataFacts, build
from export.calibration.data import CalibrationData, CleanItem
from export.calibration.hacks import SUITE
from export.calibration.printing import print_facts, print_probe, print_report
from export.calibration.probing import plan_of, probe_reward
from export.calibration.report import TestReport, report, test_items
from export.calibration.scored_parts import Sizes, count_items, score_parts
from service.assembly import OpenedModel, ServedModel, assemble, open_model, with_calibration
from service.checkpoints.demo import ADAPTER_FOLDER
from service.checkpoints.files import CALIBRATION_FILE
from service.console import progress_bar, stages
from service.data.rows import dataset_files
from service.diagnostics.calibration import Calibration, read_calibration, write_calibration
from service.diagnostics.calibration_facts import CalibrationFacts
from service.diagnostics.candidate_taps import candidate_taps
from service.errors import CalibrationError
from service.outputs import check_output_file, write_text
from service.settings import ModelSettings, Settings, read_settings

OUT_OF_TOLERANCE = 3
"""Exit status where a false-alarm rate is out of tolerance."""


def calibrate(options: argparse.Namespace, data: CalibrationData, console: Console) -> int:
    """Make a calibration, or test one, as the command's options say; return the exit status.

    Raises:
        StartupError: the model is refused, nothing can be fitted to the data, or a file cannot be written.
    """
    settings = _settings(options)
    opened = open_model(settings.model)
    # The demo model's folder is a copy in the cache; its calibration is stored in the clone, as its adapter is.
    destination = ADAPTER_FOLDER if settings.model.is_demo else opened.checkpoint.path
    out = Path(options.out) if options.out else destination / CALIBRATION_FILE
    made: Calibration | None = None
    measured: ServedModel | None = None
    if not options.test_only:
        check_output_file(out, overwrite=options.overwrite)
        measured, made = _make(options, data.items, settings, opened, out, console)
        print_facts(console, made.facts)
        if made.probe is not None:
            print_probe(console, made.probe)
    found = _test(data.test_items, lambda: _assemble_to_test(settings, opened, measured, out), console)
    if found is not None:
        print_report(console, found)
    if options.json:
        calibration = made or read_calibration(out)
        results = {
            "calibration": calibration.facts.as_json(),
            "probe": None if calibration.probe is None else calibration.probe.as_json(),
            "test": None if found is None else asdict(found),
        }
        write_text(Path(options.json), json.dumps(results, indent=1) + "\n")
    return _exit_status(None if made is None else made.facts, found, console)


def _make(
    options: argparse.Namespace,
    items: Sequence[CleanItem],
    settings: Settings,
    opened: OpenedModel,
    out: Path,
    console: Console,
) -> tuple[ServedModel, Calibration]:
    sets = [entry for entry in SUITE if entry.name not in options.drop_set]
    sizes = Sizes(options.items_per_set, max(1, options.items_per_set // 2), options.items_per_set)
    served = _assemble_to_measure(settings, opened)
    cache = Path(options.cache) if options.cache else None
    plan = plan_of(items, options.probe_completions, options.seed)
    with progress_bar(console, "Scoring", count_items(items, sizes, sets) + len(plan.exchanges)) as advance:
        scored = score_parts(served, items, sizes, advance, seed=options.seed, sets=sets, cache=cache)
        probe = probe_reward(served, plan, advance, cache)
    data = DataFacts(_hash(Path(options.data)), options.held_out, options.drop_set)
    try:
        with stages(console) as stage:
            calibration = replace(build(served, scored, seed=options.seed, data=data, show=stage), probe=probe)
    except np.linalg.LinAlgError as error:
        raise CalibrationError(
            f"Nothing was written: statistics of these completions cannot be fitted ({error}). They vary too little."
        ) from error
    if calibration.facts.weak and not options.force:
        raise CalibrationError(
            "Nothing was written: the mean AUROC over the built-in hacks is only "
            f"{calibration.facts.mean_auroc:.2f}. --force writes the calibration anyway."
        )
    id_ = write_calibration(calibration, out)
    console.print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {id_}", highlight=False)
    return served, calibration


def _test(rows: Sequence[CleanItem], assemble_model: Callable[[], ServedModel], console: Console) -> TestReport | None:
    if not rows:
        return None
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
    if options.weights:
        known["reward_weights"] = dict(options.weights)
    return read_settings({"model": ModelSettings(**known).model_dump()})


def _hash(path: Path) -> str:
    digests = (hashlib.sha256(file.read_bytes()).digest() for file in dataset_files(path))
    return hashlib.sha256(b"".join(digests)).hexdigest()
