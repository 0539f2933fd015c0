"""Runs commands as a newcomer types them, from cases in TOML files; records what they print, load and leave behind."""

from __future__ import annotations

import json
import math
import os
import resource
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving import free_port

ROOT = Path(__file__).parents[2]

HEAVY = ("torch", "transformers", "trl", "ray", "onnx", "onnxruntime", "sklearn", "matplotlib", "peft", "datasets")
"""Packages whose import takes seconds; a mistake that needs no model is answered without them."""

CLOSED_PORT = "http://127.0.0.1:9"

_RECORDED = """
import os, sys
try:
    {call}
finally:
    with open(os.environ["LOADED_MODULES"], "w") as file:
        used = os.times()
        print(used.user + used.system, *(name for name in {heavy!r} if name in sys.modules), file=file)
"""
"""Runs a command, and then writes down how much processor time it took and which heavy modules it imported."""


@dataclass(frozen=True, slots=True)
class Case:
    """A command line with a mistake, and the answer that it deserves."""

    name: str
    command: str
    """A command of ``[project.scripts]``, or ``python -m MODULE``."""

    arguments: list[str]
    """``{out}`` stands for a path that does not exist, in an empty folder of the case; ``{used port}`` and
    ``{free port}`` for ports of this machine."""

    says: list[str]
    """Parts of the sentence on standard error."""

    status: int = 1
    """2: the command line itself is wrong; 1: what it names is."""

    needs_model: bool = False
    """Whether the mistake shows only with the model loaded; such a case is slow and has no time limit."""

    max_file_bytes: int | None = None
    """Limit of the size of files that the command may write, as a full disk would have."""

    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command did."""

    status: int
    stdout: str
    stderr: str
    wall_s: float
    cpu_s: float
    """Processor time in user and kernel mode."""

    loaded: list[str]
    """Heavy packages that were imported."""

    left_behind: list[str]
    """Names in the folder of the case."""


def read_cases(folder: Path) -> list[Case]:
    """Return the cases of all TOML files of a folder; an unknown field is an error."""
    rows: list[dict[str, Any]] = [
        row for file in sorted(folder.glob("*.toml")) for row in tomllib.loads(file.read_text()).get("case", [])
    ]
    return [Case(**row) for row in rows]


def run_case(case: Case, world: Path, scratch: Path) -> Outcome:
    """Run a command in the folder ``world``; ``scratch`` is an empty folder for what it writes and for our notes."""
    outputs = scratch / "outputs"
    outputs.mkdir(parents=True)
    used = socket.create_server(("127.0.0.1", 0))
    places = {"{out}": outputs / "out", "{used port}": used.getsockname()[1], "{free port}": free_port()}
    arguments = [_filled(argument, places) for argument in case.arguments]
    loaded = scratch / "loaded"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("REWARD_", "HF_"))},
        "PYTHONPATH": os.pathsep.join(
            [*case.environment.get("PYTHONPATH", "").split(), str(ROOT / "client"), str(ROOT)]
        ),
        "LOADED_MODULES": str(loaded),
        "HF_ENDPOINT": CLOSED_PORT,
        "HF_HOME": str(scratch / "hub"),
        "OMP_NUM_THREADS": "1",
        **{name: value for name, value in case.environment.items() if name != "PYTHONPATH"},
    }
    started = time.monotonic()
    completed = subprocess.run(
        [*command_line(case.command), *arguments],
        cwd=world,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        preexec_fn=None if case.max_file_bytes is None else lambda: _limit_files(case.max_file_bytes or 0),
    )
    wall_s = time.monotonic() - started
    used.close()
    cpu_s, *heavy = loaded.read_text().split() if loaded.exists() else ["nan"]
    return Outcome(
        completed.returncode,
        completed.stdout,
        completed.stderr,
        wall_s,
        float(cpu_s),
        heavy,
        sorted(path.name for path in outputs.iterdir()),
    )


def command_line(command: str) -> list[str]:
    """Return how a command is started from the source tree; the environment's scripts may be of another one."""
    if command.startswith("python -m "):
        module = command.removeprefix("python -m ")
        call = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    else:  # as the script in bin/ does
        call = f"from service.commands import {command.replace('-', '_')} as main; sys.exit(main())"
    return [sys.executable, "-c", _RECORDED.format(call=call, heavy=HEAVY)]


def _filled(argument: str, places: Mapping[str, object]) -> str:
    for name, value in places.items():
        argument = argument.replace(name, str(value))
    return argument


def _limit_files(max_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))


_BASE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "vocab_size": 512,
}


def write_world(folder: Path) -> Path:
    """Write the files that cases name: good and bad data, folders that look like checkpoints, earlier outputs."""
    pair = {"prompt": "How do I boil an egg?", "chosen": "In water.", "rejected": "No."}
    files: dict[str, str] = {
        "pairs.jsonl": "".join(_line(pair | {"prompt": f"How do I boil {n} eggs?"}) for n in range(24)),
        "many.jsonl": "".join(
            _line(
                {"prompt": f"How do I boil {n} eggs?", "chosen": f"In {n} pots of water.", "rejected": f"No, not {n}."}
            )
            for n in range(600)
        ),
        "few.jsonl": _line(pair) * 3,
        "empty.jsonl": "",
        "not-json.jsonl": "prompt,chosen,rejected\n",
        "wrong-columns.jsonl": _line({"question": "Why?", "good": "So.", "bad": "No."}) * 24,
        "number.jsonl": _line(pair | {"chosen": 7}) * 24,
        "late.jsonl": _line(pair) * 23 + _line({"prompt": "Why?"}),
        "notes.txt": "not data",
        "damaged.parquet": "not parquet",
        "model/config.json": '{"model_type": "llama", "hidden_size": 64}',
        "base/config.json": json.dumps(_BASE),
        "base/model.safetensors": _weights({}),
        "two-labels/model.safetensors": _weights({"score.weight": [2, 1]}),
        "typo.yaml": "model:\n  devise: cpu\n",
        "broken.yaml": "model: {device: cpu\n",
        "two-labels/config.json": json.dumps(
            _BASE | {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "bad", "1": "good"}}
        ),
        "trained/training.json": "{}",
        "started/checkpoints/run.json": '{"--base": "another"}',
        "started/checkpoints/checkpoint-10/trainer_state.json": "{}",
        "adapter/adapter_config.json": json.dumps({"base_model_name_or_path": "model"}),
        "nameless-adapter/adapter_config.json": "[]",
        "qwen/config.json": '{"model_type": "qwen2", "hidden_size": 64}',
        "calibrated/config.json": "{}",
        "calibrated/calibration.safetensors": "",
        "empty-folder/notes.txt": "",
        "report/audit.html": "",
        "written/conversion.json": "{}",
        "mine/precious.txt": "",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def _weights(shapes: dict[str, list[int]]) -> str:
    """Return a safetensors file with tensors of zeros; all its bytes are ASCII."""
    offset, header = 0, {}
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header)
    text += " " * (-len(text) % 8)
    return chr(len(text)) + "\0" * 7 + text + "\0" * offset


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
