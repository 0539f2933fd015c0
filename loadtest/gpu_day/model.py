"""Writes a random model for the sections of a GPU day; its folder has its name only once it is complete."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from loadtest.gpu_day.plan import DAY_SHAPES
from loadtest.random_checkpoint import write_random_checkpoint
from loadtest.served_dtype import served_dtype
from service.engines.devices.device import resolve_device
from service.outputs import write_text


def main() -> int:
    """Write the model and say how long it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=DAY_SHAPES, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    started = time.monotonic()
    device = resolve_device(options.device)
    dtype = served_dtype("auto", None, device)
    unfinished = options.folder.with_name(f"{options.folder.name}.unfinished")
    write_random_checkpoint(unfinished, DAY_SHAPES[options.shape], dtype, device=str(device))
    num_bytes = sum(file.stat().st_size for file in unfinished.iterdir())
    unfinished.rename(options.folder)
    found = {"dtype": dtype, "gigabytes": round(num_bytes / 1e9, 2), "seconds": round(time.monotonic() - started, 1)}
    write_text(options.json, json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
