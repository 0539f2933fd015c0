"""Keeps transformers quiet where its warnings and progress bars would only repeat what we do on purpose."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def transformers_silenced() -> Iterator[None]:
    """Within this context transformers shows errors only, no progress bars and no announcements of later versions.

    Loading a causal language model as a classifier, for example, reports the missing head that we are about to fill in,
    and PEFT reads attributes of transformers that are deprecated. Not for use beside other threads that warn.
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
