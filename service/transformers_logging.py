"""Suppresses messages of transformers about things that the service does on purpose."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def transformers_silenced() -> Iterator[None]:
    """Let transformers log errors only while the context is open: no warnings, deprecations or progress bars.

    Loading a causal language model as a classifier, for example, warns of the missing head that the caller loads next,
    and PEFT reads deprecated attributes of transformers. The change affects all threads of the process.
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
