"""Suppress the warnings and progress bars of transformers where they report what the caller does on purpose."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

_Element = TypeVar("_Element")


@contextmanager
def transformers_silenced() -> Iterator[None]:
    """Context in which transformers logs errors only and shows no progress bars.

    Loading a causal language model as a classifier, for example, warns of the missing head that the caller then sets,
    and PEFT reads deprecated attributes of transformers.

    Effects, undone at the end: the log level and the progress bars of transformers, and the warning filter for
    FutureWarning. All three belong to the process, so other threads are affected while the context is open.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def gguf_bar_hidden() -> Iterator[None]:
    """Context in which transformers reads GGUF files without a progress bar.

    It shows that one whatever its own switch for progress bars says, because it takes it from tqdm directly.
    """
    from transformers import modeling_gguf_pytorch_utils

    shown = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = _without_bar
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = shown


def _without_bar(elements: Iterable[_Element], **_: Any) -> Iterable[_Element]:
    return elements
