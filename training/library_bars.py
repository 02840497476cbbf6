"""The progress bars of libraries, which would appear between those of the caller."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging


@contextmanager
def library_bars_hidden() -> Iterator[None]:
    """Hides the bars of transformers, huggingface_hub and datasets in the body; afterwards they are as before."""
    with ExitStack() as stack:
        # The Hub's go back to what they were last: transformers shows or hides these with its own.
        stack.enter_context(_hidden(not are_progress_bars_disabled(), disable_progress_bars, enable_progress_bars))
        shown = logging.is_progress_bar_enabled()
        stack.enter_context(_hidden(shown, logging.disable_progress_bar, logging.enable_progress_bar))
        if (datasets := sys.modules.get("datasets")) is not None:  # an export does without it
            shown = not datasets.are_progress_bars_disabled()
            stack.enter_context(_hidden(shown, datasets.disable_progress_bars, datasets.enable_progress_bars))
        yield


@contextmanager
def _hidden(shown: bool, hide: Callable[[], None], show: Callable[[], None]) -> Iterator[None]:
    hide()
    try:
        yield
    finally:
        (show if shown else hide)()
