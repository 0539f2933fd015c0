"""Whether a data set on the hub can be loaded, found out by one request instead of many retries."""

from __future__ import annotations

import os
from pathlib import Path

from service.errors import DatasetError

TIMEOUT_S = 10.0


def check_hub_dataset(source: str) -> None:
    """Check that a data set exists on a hub that can be reached, or that it is in the cache.

    The library that loads it retries for half a minute where there is no network.

    Args:
        source: ``owner/name`` or ``owner/name:split``.

    Raises:
        DatasetError: neither; names the remedy.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    name = source.partition(":")[0]
    if is_cached(name):
        return
    try:
        HfApi().dataset_info(name, timeout=TIMEOUT_S)
    except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError) as error:
        raise DatasetError(
            f"{source} is not a local file, and there is no such data set on a hub that can be reached "
            f"({type(error).__name__}): check the name and the network (HF_TOKEN for a gated one), or download it and "
            "pass its files."
        ) from error


def is_cached(name: str) -> bool:
    """Whether the library `datasets` has prepared a data set before; it then needs no network."""
    from huggingface_hub.constants import HF_HOME

    root = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets")
    return (root / name.replace("/", "___")).is_dir()
