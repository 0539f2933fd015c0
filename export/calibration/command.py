"""Makes the calibration of a reward model from completions that are to count as normal (``reward-calibrate``).

The result lies beside the checkpoint and is bound to it. What is printed was measured on prompts that nothing was
fitted to; the command fails when its p-values do not keep their promise there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from export.calibration.build import Sizes, build, count_items, score_all
from export.calibration.data import CleanItem, read_items
from export.calibration.hacks import SUITE
from export.calibration.report import TestReport, print_facts, print_report, report, test_items
from export.calibration.scoring import candidate_taps
from service.assembly import ServedModel, assemble, judge
from service.checkpoints.demo import ADAPTER_FOLDER
from service.diagnostics.calibration import CALIBRATION_FILE, read_calibration, write_calibration
from service.errors import CalibrationError, StartupError
from service.settings import DEMO_MODEL, ModelSettings, Settings, read_settings
from service.version import add_version_option

OUT_OF_TOLERANCE = 3
LOG_WIDTH = 140


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns 0 when all is well, 1 when nothing was written, 3 when a false-alarm rate is out of tolerance.
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
    folder = judge(settings.model).path
    # The demo model's folder is a copy in the cache; its calibration belongs to the clone, as its adapter does.
    home = ADAPTER_FOLDER if settings.model.is_demo else folder
    out = Path(options.out) if options.out else home / CALIBRATION_FILE
    facts: dict[str, Any] = {}
    if not options.test_only:
        facts = _make(options, settings, out, console)
        print_facts(console, facts)
    found = _test(options, settings, out, console)
    if found is not None:
        print_report(console, found)
    if options.json:
        told = {"calibration": facts or read_calibration(out).facts, "test": None if found is None else asdict(found)}
        Path(options.json).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return _verdict(facts, found, console)


def _make(options: argparse.Namespace, settings: Settings, out: Path, console: Console) -> dict[str, Any]:
    items = list(read_items(Path(options.data), held_out_only=options.held_out))
    if options.max_items and len(items) > options.max_items:
        items = _some_prompts(items, options.max_items, options.seed)
    sets = [entry for entry in SUITE if entry.name not in options.drop_set]
    sizes = Sizes(options.items_per_set, max(1, options.items_per_set // 2), options.items_per_set)
    served = _assemble_to_measure(settings)
    cache = Path(options.cache) if options.cache else None
    with _progress(console, "Scoring", count_items(items, sizes, sets)) as advance:
        scored = score_all(served, items, sizes, advance, seed=options.seed, sets=sets, cache=cache)
    notes = {"data_sha256": _hash(Path(options.data)), "held_out_only": options.held_out, "dropped": options.drop_set}
    with console.status("Fitting") as status:
        calibration = build(served, scored, seed=options.seed, notes=notes, tell=status.update)
    if calibration.facts["weak"] and not options.force:
        raise CalibrationError(
            "Nothing was written: the built-in hacks are told from clean completions with a mean AUROC of "
            f"{calibration.facts['mean_auroc']:.2f} only. --force writes it all the same."
        )
    id_ = write_calibration(calibration, out)
    console.print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {id_}", highlight=False)
    return calibration.facts


def _test(options: argparse.Namespace, settings: Settings, out: Path, console: Console) -> TestReport | None:
    paths = [Path(path) for path in (*options.test, *options.ood)]
    if not paths:
        return None
    rows = [row for path in paths for row in read_items(path)]
    named = settings.model_copy(
        update={"diagnostics": settings.diagnostics.model_copy(update={"calibration": str(out)})}
    )
    served = assemble(named)
    if served.lookup.calibration is None:
        raise CalibrationError(str(served.lookup.reason))
    with _progress(console, "Testing", len(rows)) as advance:
        tested, num_left_out = test_items(served, rows, advance)
    return report(served, tested, num_left_out)


def _verdict(facts: dict[str, Any], found: TestReport | None, console: Console) -> int:
    wrong = [rate["nominal"] for rate in facts.get("self_test", {}).get("rates", ()) if not rate["is_tolerable"]]
    wrong += [rate.nominal for rate in (found.rates if found else ()) if not rate.is_tolerable]
    if wrong:
        console.print(f"The realised false-alarm rate is out of tolerance at {', '.join(map(str, wrong))}.")
        return OUT_OF_TOLERANCE
    return 0


def _assemble_to_measure(settings: Settings) -> ServedModel:
    checkpoint = judge(settings.model)
    num_layers = int(checkpoint.config.get_text_config().num_hidden_layers)
    return assemble(settings, taps=candidate_taps(num_layers))


def _settings(options: argparse.Namespace) -> Settings:
    model = {"path": options.model, "dtype": options.dtype, "device": options.device}
    known = {name: value for name, value in model.items() if value is not None}
    if options.max_input_tokens:
        known["max_input_tokens"] = options.max_input_tokens
    return read_settings({"model": ModelSettings(**known).model_dump()})


def _some_prompts(items: Sequence[CleanItem], max_items: int, seed: int) -> list[CleanItem]:
    """Return about that many items, of prompts drawn at random; completions of one prompt stay together."""
    openings = list(dict.fromkeys(item.opening for item in items))
    random.Random(seed).shuffle(openings)  # noqa: S311 - a choice of items, not a secret
    kept = set(openings[: max(1, round(len(openings) * max_items / len(items)))])
    return [item for item in items if item.opening in kept]


@contextmanager
def _progress(console: Console, what: str, total: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda num_items: progress.advance(task, num_items)


def _hash(path: Path) -> str:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="reward-calibrate", description=__doc__.splitlines()[0])
    add_version_option(parser)
    parser.add_argument("model", metavar="DIR", help=f"checkpoint folder or hub id; {DEMO_MODEL}: the demo model")
    parser.add_argument("data", metavar="DATA", help="items (prompt, completion) or pairs (prompt, chosen, rejected)")
    parser.add_argument(
        "--out", metavar="FILE", help=f"default: {CALIBRATION_FILE} in the checkpoint folder (demo: in the clone)"
    )
    parser.add_argument(
        "--max-items", type=int, metavar="N", help="take about N items of DATA, whole prompts at random"
    )
    parser.add_argument("--items-per-set", type=int, default=40, metavar="N", help="of each built-in hack; default 40")
    parser.add_argument(
        "--drop-set", action="append", default=[], choices=[entry.name for entry in SUITE], metavar="NAME",
        help="a built-in set that is normal in your traffic (code_dump, chinese, ...); repeatable",
    )  # fmt: skip
    parser.add_argument("--held-out", action="store_true", help="only prompts that the demo model was not trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", metavar="FOLDER", help="keep scores there, so that fitting again is quick")
    parser.add_argument("--force", action="store_true", help="write the calibration even if it sees hardly anything")
    parser.add_argument("--test", action="append", default=[], metavar="DATA", help="measure on this; repeatable")
    parser.add_argument(
        "--ood", action="append", default=[], metavar="FOLDER",
        help="measure on rows with prompt, response, category and is_ood; repeatable",
    )  # fmt: skip
    parser.add_argument("--test-only", action="store_true", help="test the calibration that is there; DATA is not read")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured there")
    parser.add_argument("--dtype", help="arithmetic of the body; default: as reward-serve")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--max-input-tokens", type=int, metavar="N", help="token limit that will be served with")
    return parser


if __name__ == "__main__":
    sys.exit(main())
