"""The whole command, against servers of this environment and against a double of vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtest.compare import main
from loadtest.random_checkpoint import ModelShape, write_random_checkpoint

TINY = ModelShape(vocabulary=1024, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2, positions=4096)
ITEMS_WITH_FP32 = {"plain": 48, "vllm": 64, "onnxruntime": 64}
VLLM_DOUBLE = Path(__file__).parents[1] / "support" / "vllm_double.py"


def test_vllm_needs_an_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    """Without the interpreter of vLLM's environment the command ends before anything is started."""
    with pytest.raises(SystemExit) as ended:
        main(["--peer", "vllm"])

    assert ended.value.code == 2
    assert "--peer-python" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "peer", ["plain", *(pytest.param(name, marks=pytest.mark.soak) for name in ("vllm", "onnxruntime"))]
)
def test_the_command_measures_both_servers_and_ends_them(tmp_path: Path, peer: str) -> None:
    """End to end on a tiny model: rewards match, all figures are there, and both servers have ended afterwards."""
    model = write_random_checkpoint(tmp_path / "tiny", TINY, dtype="float32")

    done, report = compare(model, tmp_path, peer)

    assert done.returncode == 0, done.stdout + done.stderr
    assert report["rewards_match"]
    assert {name: comparison["num_items"] for name, comparison in report["comparisons"].items()} == {
        f"ours against {peer}": report["comparisons"][f"ours against {peer}"]["num_items"],
        "ours against transformers in fp32": ITEMS_WITH_FP32[peer],
        f"{peer} against transformers in fp32": ITEMS_WITH_FP32[peer],
    }
    assert report["peer_dtype"] == "float32"
    assert report["peer_versions"]["transformers"]
    assert all(shape["ratio"] > 0 for shape in report["shapes"])
    assert len(report["measurements"]) == 2 * len(report["shapes"])
    assert not [process for process in Path("/proc").glob("[0-9]*") if _mentions(process, str(model))]


@pytest.mark.slow
def test_wrong_rewards_fail_the_command(tmp_path: Path) -> None:
    """If the peer's rewards are wrong, the exit status is 1, however fast it is."""
    model = write_random_checkpoint(tmp_path / "tiny", TINY, dtype="float32")

    done, report = compare(model, tmp_path, "vllm", wrong_rewards=True)

    assert done.returncode == 1
    assert report["comparisons"]["ours against transformers in fp32"]["rewards_match"]
    assert not report["comparisons"]["vllm against transformers in fp32"]["rewards_match"]


def compare(
    model: Path, folder: Path, peer: str, *, wrong_rewards: bool = False
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    report = folder / "report.json"
    command = [sys.executable, "-m", "loadtest.compare", "--model", str(model), "--dtype", "float32", "--rounds", "1"]
    command += ["--single-groups", "2", "--bulk-groups", "2", "--json", str(report), "--peer", peer]
    if peer == "vllm":
        command += ["--peer-python", str(interpreter(folder, wrong_rewards=wrong_rewards))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    return done, json.loads(report.read_text()) if report.exists() else {}


def interpreter(folder: Path, *, wrong_rewards: bool) -> Path:
    """Write a stand-in for the interpreter of vLLM's environment, which runs the double."""
    script = folder / "python"
    flag = "--wrong-rewards" if wrong_rewards else ""
    script.write_text(
        "#!/bin/sh\n"
        """if [ "$1" = -c ]; then echo '{"vllm": "0", "transformers": "0"}'; exit; fi\n"""
        f'exec "{sys.executable}" "{VLLM_DOUBLE}" {flag} "$@"\n'
    )
    script.chmod(0o755)
    return script


def _mentions(process: Path, text: str) -> bool:
    try:
        return text in (process / "cmdline").read_text()
    except OSError:
        return False
