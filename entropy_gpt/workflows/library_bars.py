"""The progress bars of libraries, which would appear between those of the caller."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging


@contextmanager
def library_bars_hidden() -> Iterator[None]:
    """Hides the bars of transformers, huggingface_hub and datasets in the body; afterwards they are as before."""
    with _transformers_bars_hidden(), _datasets_bars_hidden():
        yield


@contextmanager
def _transformers_bars_hidden() -> Iterator[None]:
    shown, hub_shown = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()  # those of huggingface_hub too
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if not hub_shown:
            disable_progress_bars()


@contextmanager
def _datasets_bars_hidden() -> Iterator[None]:
    datasets = sys.modules.get("datasets")  # an export does without it
    if datasets is None or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
