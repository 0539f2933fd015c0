"""Parity and batch invariance of every forward path on a tiny model of each family; part of ``loadtest.gpu_day``.

``python tests/path_check.py --device cuda --json FILE`` loads each model on each path as the service does, compares it
with plain transformers, and scores texts alone and in shuffled batches. A path that was asked for and does not serve
counts as a problem. The file is written after each row; the exit status is 1 where there was a problem.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "client"))
sys.path.insert(0, str(Path(__file__).parent / "support"))

from tiny_models import DECODER_FAMILIES, ENCODER_FAMILIES, write_tiny_checkpoint

from loadtest.batch_effect import measure_batch_effect
from loadtest.engine_work import Work, tokenize
from loadtest.workload import PANDALM_COMPLETIONS, PANDALM_PROMPTS, draw_groups
from service.checkpoints.checkpoint import Checkpoint, open_checkpoint
from service.engines.base import EngineInfo
from service.engines.torch import load_torch_engine
from service.outputs import write_text
from service.settings import BatchingSettings, ModelSettings

SEED = 1
BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class CheckedPath:
    """A forward path with its options, and how to tell that it serves."""

    name: str
    serves: Callable[[EngineInfo], bool]
    model: Mapping[str, Any] = field(default_factory=dict)
    batching: Mapping[str, Any] = field(default_factory=dict)

    families: tuple[str, ...] = DECODER_FAMILIES
    """Of which it is checked."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    is_invariant: bool = False
    """Whether a reward that the batch composition changes is a problem, and not only a fact."""


PACKED = {"forward": "packed"}
NOT_SHARED = {"share_prefixes": False}
NOT_CACHED = {"prefix_cache_mib": 0}

PATHS = (
    CheckedPath("padded", lambda info: info.forward == "padded", {"forward": "padded"}, {}, DECODER_FAMILIES[:2]),
    CheckedPath("auto", lambda info: bool(info.forward), {}, NOT_CACHED, ENCODER_FAMILIES),
    CheckedPath("packed", lambda info: info.min_shared_prefix_tokens is None, PACKED, NOT_SHARED),
    CheckedPath("packed, shared prefixes", lambda info: info.min_shared_prefix_tokens is not None, PACKED, NOT_CACHED),
    CheckedPath("packed, prefix cache", lambda info: info.prefix_cache_mib > 0, PACKED, {"prefix_cache_mib": 16}),
    CheckedPath(
        "deterministic", lambda info: info.forward == "packed", PACKED, {"deterministic": True}, is_invariant=True
    ),
)
"""On every device."""

CUDA_PATHS = (
    CheckedPath("cascade", lambda info: info.cascade_attention, PACKED | {"cascade_attention": True}, NOT_CACHED),
    CheckedPath(
        "graphs",
        lambda info: info.cuda_graph_max_tokens > 0 and not info.cuda_graph_failure,
        PACKED | {"cuda_graphs": True},
        NOT_CACHED,
        ("llama", "qwen2", "gemma2"),
    ),
    CheckedPath(
        "fp8",
        lambda info: info.quantization == "fp8",
        PACKED | {"quantization": "fp8"},
        NOT_CACHED,
        ("llama", "qwen2"),
        ("bfloat16",),
    ),
    CheckedPath(
        "compiled", lambda info: info.compiled, PACKED | {"compile": True}, NOT_CACHED, ("llama",), ("bfloat16",)
    ),
)

INVARIANT = {"batch_invariant": True}

INVARIANT_PATHS = (
    CheckedPath(
        "batch-invariant", lambda info: bool(info.batch_invariance), PACKED, INVARIANT | NOT_CACHED, is_invariant=True
    ),
    CheckedPath(
        "batch-invariant, padded",
        lambda info: bool(info.batch_invariance) and info.forward == "padded",
        {"forward": "padded"},
        INVARIANT,
        ("bert", "modernbert", "llama", "qwen2"),
        is_invariant=True,
    ),
)
"""On every device, after all others: they change settings of the process."""

INVARIANT_CUDA_PATHS = (
    CheckedPath(
        "batch-invariant, graphs",
        lambda info: info.cuda_graph_max_tokens > 0 and not info.cuda_graph_failure,
        PACKED | {"cuda_graphs": True},
        INVARIANT | NOT_CACHED,
        ("llama", "qwen2"),
        ("bfloat16",),
        is_invariant=True,
    ),
    CheckedPath(
        "batch-invariant, prefix cache",
        lambda info: info.prefix_cache_mib > 0,
        PACKED,
        INVARIANT | {"prefix_cache_mib": 16},
        ("llama", "qwen2"),
        ("bfloat16",),
        is_invariant=True,
    ),
)

CPU_FAMILIES = ("llama", "bert")
"""On a CPU."""


@dataclass(slots=True)
class Row:
    """What was found on one path of one model."""

    family: str
    dtype: str
    path: str

    served: str = ""
    """What the engine says that it runs on."""

    parity: dict[str, Any] = field(default_factory=dict)
    """As ``EngineInfo.parity``."""

    num_items: int = 0
    num_changed: int | None = None
    """Items whose reward depends on the batch composition; None: not measured."""

    max_change: float | None = None
    problem: str = ""
    traceback: str = ""


def main() -> int:
    """Check; returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--items", type=int, default=8, help="completions of each of the prompts")
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="reward-paths-") as folder:
        for path, family, dtype in plan(options.device):
            rows.append(check(Path(folder), path, family, dtype, options.device, options.items))
            write_text(options.json, json.dumps({"rows": [asdict(row) for row in rows]}))
            print(f"{family}, {dtype}, {path.name}: {rows[-1].problem or 'no problem'}", flush=True)
    return int(any(row.problem for row in rows))


def plan(device: str) -> Iterator[tuple[CheckedPath, str, str]]:
    """Yield path, family and dtype of each row; on a CPU a few of them, since the tests have all."""
    on_cpu = device == "cpu"
    paths = (*PATHS, *INVARIANT_PATHS) if on_cpu else (*PATHS, *CUDA_PATHS, *INVARIANT_PATHS, *INVARIANT_CUDA_PATHS)
    for path in paths:
        for family in [family for family in path.families if not on_cpu or family in CPU_FAMILIES]:
            for dtype in path.dtypes[:1] if on_cpu else path.dtypes:
                yield path, family, dtype


def check(folder: Path, path: CheckedPath, family: str, dtype: str, device: str, num_completions: int) -> Row:
    """Check one row; whatever is raised becomes its problem."""
    row = Row(family, dtype, path.name)
    try:
        checkpoint = _checkpoint(folder / family, family)
        _measure(row, checkpoint, path, device, _work(checkpoint, num_completions))
    except Exception as error:  # noqa: BLE001 - the other rows are checked all the same
        row.problem = f"{type(error).__name__}: {error}".splitlines()[0]
        row.traceback = traceback.format_exc()
    return row


def _checkpoint(folder: Path, family: str) -> Checkpoint:
    if not folder.exists():
        write_tiny_checkpoint(folder, family)
    return open_checkpoint(folder, ModelSettings())


def _work(checkpoint: Checkpoint, num_completions: int) -> Work:
    return tokenize(draw_groups(3, num_completions, SEED, PANDALM_PROMPTS, PANDALM_COMPLETIONS), checkpoint)


def _measure(row: Row, checkpoint: Checkpoint, path: CheckedPath, device: str, work: Work) -> None:
    model = {"device": device, "dtype": row.dtype, "cuda_graphs": False, **path.model}
    engine = load_torch_engine(
        checkpoint.path,
        ModelSettings.model_validate(model),
        BatchingSettings.model_validate({"max_batch_tokens": BATCH_TOKENS, **path.batching}),
        pad_token_id=checkpoint.pad_token_id,
        max_input_tokens=checkpoint.max_input_tokens,
    )
    try:
        row.served = f"{engine.info.forward}, {engine.info.arithmetic} on {engine.info.device}"
        row.parity = engine.info.parity
        effect = measure_batch_effect(engine, work, SEED)
    finally:
        engine.close()
    row.num_items, row.num_changed, row.max_change = effect.num_items, effect.num_changed, effect.max_difference
    if not path.serves(engine.info):
        row.problem = ", ".join(filter(None, [f"another path serves: {row.served}", engine.info.cuda_graph_failure]))
    elif path.is_invariant and effect.num_changed:
        row.problem = "rewards depend on the batch composition"


if __name__ == "__main__":
    sys.exit(main())
