"""The GPU day: its time budget, its sections and its report, and the whole command on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.metadata import distribution, distributions, packages_distributions
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from loadtest.gpu_day import day, invariance
from loadtest.gpu_day.child import run_child
from loadtest.gpu_day.command import main
from loadtest.gpu_day.day import run_section
from loadtest.gpu_day.machine import PACKAGES, names_of, too_old
from loadtest.gpu_day.marked_tests import marked_files, read_outcomes
from loadtest.gpu_day.plan import GPU_SIZES, KINDS, ROOT, TINY, Section, plan_day, time_limit
from loadtest.gpu_day.report import FILES, Record, failures_of, markdown
from loadtest.random_checkpoint import write_random_checkpoint
from service.version import DISTRIBUTION


def script(tmp_path: Path, code: str, **options: object) -> Section:
    """Return a section that runs a few lines of Python; ``RESULT`` is its file."""
    result = tmp_path / "result.json"
    code = f"RESULT = {str(result)!r}\n{code}"
    return Section(
        **{  # type: ignore[arg-type]
            "name": "part",
            "kind": "engines",
            "command": (sys.executable, "-c", code),
            "minutes": 1.0,
            "result": result,
            **options,
        }
    )


# --- Time ------------------------------------------------------------------------------------------------------------


def test_unused_time_is_distributed_among_later_sections() -> None:
    """By hand: of 100 s with weights 1, 3, 4 the first may take 12.5 s; if it takes none, the second gets 3 of 7."""
    assert time_limit(100.0, [1.0, 3.0, 4.0]) == pytest.approx(12.5)
    assert time_limit(100.0, [3.0, 4.0]) == pytest.approx(300 / 7)
    assert time_limit(-5.0, [4.0]) == 0.0


def test_a_section_over_its_time_is_stopped_with_all_of_its_processes(tmp_path: Path) -> None:
    """SIGINT lets it write what it has; a descendant in a session of its own, as servers have, is ended too."""
    code = """
import json, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
try:
    print("started", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    open(RESULT, "w").write(json.dumps({"child": child.pid}))
"""
    record = run_section(script(tmp_path, code), 2.0, tmp_path)

    assert (record.status, record.output) == ("out of time", ["started"])
    assert record.seconds < 12
    assert not psutil.pid_exists(record.result["child"])


def test_a_process_that_ignores_an_interrupt_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs in a kernel does not react to a signal."""
    monkeypatch.setattr("loadtest.gpu_day.child.GRACE_S", 0.2)
    code = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    )
    started = time.monotonic()

    end = run_child([sys.executable, "-c", code], os.environ, tmp_path / "log", limit_s=1.0)

    assert (end.status, end.timed_out) == (-9, True)
    assert time.monotonic() - started < 10


# --- Sections --------------------------------------------------------------------------------------------------------


def test_every_size_is_measured_with_every_option() -> None:
    """Graphs, cascade attention, fp8, compiled blocks and rewards with the same bits, at every size and group size."""
    for size in GPU_SIZES:
        options = {option for run in size.runs for option in run.options}
        assert {"--cuda-graphs", "--cascade", "--fp8", "--compile", "--batch-invariant", "--deterministic"} <= options
        assert all(run.workloads == ("independent", "groups of 8", "groups of 64") for run in size.runs)
    assert [size.shape for size in GPU_SIZES] == ["0.5B", "1.5B", "8B"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_model_is_written_before_it_is_needed(device: str, tmp_path: Path) -> None:
    """Also where the engines, which come first, are not among the chosen sections."""
    for kinds in (KINDS, ("load",), ("latency",), ("invariance",)):
        written: set[Path] = set()
        for section in plan_day(device, 25, tmp_path, kinds):
            if section.kind == "model":
                written.add(Path(section.command[section.command.index("--folder") + 1]))
            elif section.needs is not None and section.kind != "paths":
                assert section.needs in written


def test_the_load_of_a_full_day_takes_a_minute_and_fits_its_limit(tmp_path: Path) -> None:
    """In a shorter day it is shorter in proportion."""
    for minutes, seconds in ((25, 60.0), (50, 60.0), (5, 12.0)):
        sections = plan_day("cuda", minutes, tmp_path)
        load = sections[-1]
        assert float(load.command[load.command.index("--seconds") + 1]) == pytest.approx(seconds)
        assert time_limit(60 * minutes, [1.0]) * load.minutes / sum(one.minutes for one in sections) > seconds


def test_a_failure_is_recorded_with_its_traceback_and_the_next_section_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a failed section wrote before is in the report too; a section that lacks its model is skipped."""
    sections = [
        script(tmp_path, 'open(RESULT, \'w\').write(\'{"failures": {"fp8": "no such kernel"}}\'); 1 / 0', name="first"),
        script(tmp_path, "", name="second", needs=tmp_path / "random-8B"),
        script(tmp_path, "", name="third", kind="model", result=tmp_path / "none.json"),
    ]
    monkeypatch.setattr(day, "plan_day", lambda *_: sections)

    status = main(["--device", "cpu", "--minutes", "1", "--out", str(tmp_path / "out")])

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    page = (tmp_path / "out" / "report.md").read_text()
    assert status == 1
    assert [one["status"] for one in report["sections"]] == ["failed", "skipped", "passed"]
    assert "ZeroDivisionError: division by zero" in page
    assert "no such kernel" in page
    assert "there is no random-8B" in page
    assert "third: passed" in capsys.readouterr().out


def test_without_the_device_no_section_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The section that describes the machine ends the day; the others are skipped and say so."""
    sections = [script(tmp_path, "raise SystemExit(1)", ends_the_day=True), script(tmp_path, "", name="next")]
    monkeypatch.setattr(day, "plan_day", lambda *_: sections)

    assert main(["--device", "cuda", "--out", str(tmp_path / "out")]) == 1

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(one["status"], one["reason"]) for one in report["sections"]] == [
        ("failed", "exit status 1"),
        ("skipped", "part failed"),
    ]


def test_a_report_is_not_replaced_without_being_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command refuses before it runs anything."""
    (tmp_path / FILES[0]).touch()

    assert main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "has report.md already" in capsys.readouterr().err


# --- Results ---------------------------------------------------------------------------------------------------------


def test_parts_that_failed_have_names_and_tracebacks() -> None:
    """Of a path's row the problem counts where nothing was raised."""
    rows = [
        {"family": "llama", "dtype": "bfloat16", "path": "fp8", "problem": "another path serves", "traceback": ""},
        {"family": "bert", "dtype": "float32", "path": "auto", "problem": "", "traceback": ""},
    ]

    assert failures_of("paths", {"rows": rows}) == {"llama, bfloat16, fp8": "another path serves"}
    assert failures_of("engines", {"failures": {"fp8": "Traceback"}}) == {"fp8": "Traceback"}


def test_a_table_cell_cannot_break_the_table() -> None:
    """A reason with a vertical bar has the same number of cells."""
    page = markdown({}, [Record("a|b", "model", "failed", "x | y", 1.0, 2.0)])

    assert "| a/b | failed | 1 s | 2 s | x / y |" in page


def test_outcomes_of_tests_are_counted_and_tracebacks_read(tmp_path: Path) -> None:
    """A test that fails and a file that cannot be imported are failures; the reasons of skipped ones are listed."""
    (tmp_path / "report.xml").write_text(
        "<testsuites><testsuite>"
        "<testcase classname='a' name='passes'/>"
        "<testcase classname='a' name='fails'><failure message='m'>E assert 1 == 2</failure></testcase>"
        "<testcase classname='' name='b'><error message='m'>No module named onnx</error></testcase>"
        "<testcase classname='a' name='skips'><skipped message='needs a CUDA device'/></testcase>"
        "</testsuite></testsuites>"
    )

    found = read_outcomes(tmp_path / "report.xml")

    assert (found["passed"], found["failed"], found["skipped_tests"]) == (1, 2, 1)
    assert found["failures"] == {"a.fails": "E assert 1 == 2", ".b": "No module named onnx"}
    assert found["reasons"] == ["needs a CUDA device"]


def test_files_with_marked_tests_are_found() -> None:
    """They are among the engines' tests."""
    names = {file.name for file in marked_files(ROOT / "tests" / "engines")}

    assert {"test_layout.py", "test_cascade.py", "test_float8.py", "test_cuda_graphs.py"} <= names
    assert "test_plan.py" not in names


def test_old_versions_are_told() -> None:
    """A version is compared by numbers; a package that is missing is too old."""
    assert too_old({"versions": {"torch": "2.11.0+cu130", "transformers": "5.17.0"}}) == []
    assert too_old({"versions": {"torch": "2.9.1", "transformers": None}}) == ["torch", "transformers"]


@pytest.mark.slow
def test_rewards_are_compared_in_every_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tiny model on a CPU: no reward changes with the batch in an exact mode, and each mode has times."""
    model = write_random_checkpoint(tmp_path / "model", TINY, "float32")
    found = tmp_path / "found.json"
    options = ["--model", str(model), "--device", "cpu", "--items", "6", "--json", str(found)]
    monkeypatch.setattr("sys.argv", ["invariance", *options])

    assert invariance.main() == 0

    result = json.loads(found.read_text())
    assert result["failures"] == {}
    assert {row["way"] for row in result["rows"]} == {mode.name for mode in invariance.MODES}
    assert all(row["changed"] == 0 for row in result["rows"] if row["way"] != "default")
    assert all(row["alone_ms"] > 0 < row["tokens_per_s"] for row in result["rows"])
    assert "| batch-invariant |" in markdown({}, [Record("a", "invariance", "passed", "", 1.0, 2.0, result=result)])


def test_a_reward_that_changes_in_an_exact_mode_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is recorded like an engine that does not load; by default a change is a fact."""
    row = {"changed": 3, "items": 6}
    monkeypatch.setattr(invariance, "measure", lambda *_: dict(row))
    monkeypatch.setattr(invariance, "plan", lambda *_: [("float32", mode) for mode in invariance.MODES[:2]])
    model = write_random_checkpoint(tmp_path / "model", TINY, "float32")
    found = tmp_path / "found.json"
    options = ["--model", str(model), "--device", "cpu", "--items", "6", "--json", str(found)]
    monkeypatch.setattr("sys.argv", ["invariance", *options])

    invariance.main()

    failures = failures_of("invariance", json.loads(found.read_text()))
    assert failures == {"deterministic, float32": "3 of 6 rewards change with the batch"}


# --- The whole command -----------------------------------------------------------------------------------------------

HIDING = """
from functools import partial
from importlib.machinery import PathFinder
HIDDEN = frozenset({hidden})
find_spec = PathFinder.find_spec

def find_known(name, path=None, target=None):
    return None if name.partition(".")[0] in HIDDEN else find_spec(name, path, target)

PathFinder.find_spec = partial(find_known)  # pytest makes it an attribute of a class
"""


def with_dependencies(names: list[str]) -> set[str]:
    """Return distributions with all that they require, as far as it is installed here."""
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    installed = {canonicalize_name(name) for names in packages_distributions().values() for name in names}
    while waiting:
        name = waiting.pop()
        if name in found or name not in installed:
            continue
        found.add(name)
        needs = map(Requirement, distribution(name).requires or ())
        waiting += [canonicalize_name(n.name) for n in needs if not n.marker or n.marker.evaluate({"extra": ""})]
    return found


def packages_to_hide() -> set[str]:
    """Return what is installed here and is neither torch's nor transformers', nor among the packages of the list."""
    listed = {canonicalize_name(name) for name in names_of(PACKAGES.read_text())}
    plugins = [one.name for one in distributions() if one.entry_points.select(group="pytest11")]  # pytest loads them
    known = with_dependencies(["torch", "transformers", *plugins]) | listed | {DISTRIBUTION}
    return {
        package
        for package, owners in packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & known
    }


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(700)
def test_the_whole_day_runs_on_a_cpu_with_the_listed_packages_alone(tmp_path: Path) -> None:
    """Every section runs where only torch, transformers and the packages of the list can be imported."""
    hidden = packages_to_hide()
    assert {"ray", "onnxruntime", "pyarrow", "trl"} <= hidden
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding" / "sitecustomize.py").write_text(HIDING.format(hidden=sorted(hidden)))
    paths = [str(tmp_path / "hiding"), str(ROOT), str(ROOT / "client")]
    command = [sys.executable, "-m", "loadtest.gpu_day", "--device", "cpu", "--minutes", "10"]

    subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=ROOT,
        timeout=660,
        check=False,
    )

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    sections = {section["kind"]: section for section in report["sections"]}
    assert {
        kind: (one["status"], one["reason"]) for kind, one in sections.items() if one["kind"] != "tests"
    } == dict.fromkeys(("machine", "paths", "model", "engines", "invariance", "latency", "load"), ("passed", ""))
    assert sections["machine"]["result"]["missing"] in ([], ["torchao"])
    assert all(row["parity"] for row in sections["paths"]["result"]["rows"])
    assert {one["workload"] for one in sections["engines"]["result"]["findings"]} == {"independent", "groups of 8"}
    assert all(row["num_failed"] == 0 < row["items_per_s"] for row in sections["load"]["result"]["rows"])
    assert all(row["stages_ms"]["engine"] < row["p99_ms"] for row in sections["latency"]["result"]["rows"])
    assert all(row["tokens_per_s"] > 0 for row in sections["invariance"]["result"]["rows"])
    assert sections["tests"]["result"]["skipped_tests"] > 10
