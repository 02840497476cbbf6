# SPDX-License-Identifier: Apache-2.0
"""The releases of transformers that this code runs on. Imported first: older ones lack what the other files import."""

from transformers.utils import logging
from transformers.utils.versions import require_version


OLDEST = "5.4.0"
NEWEST_TESTED = "5.24.0"
TESTED = f"transformers>={OLDEST},<={NEWEST_TESTED}"
INSTALL = f"pip install '{TESTED}'"


def check_release():
    """
    Checks the installed release of transformers.

    Raises:
        `ImportError`: If it is older than the oldest that this code runs on. A release newer than the newest tested
            one is a warning.
    """
    require_version(f"transformers>={OLDEST}", f"EntropyGPT does not run on older releases: {INSTALL}")
    try:
        require_version(f"transformers<={NEWEST_TESTED}")
    except ImportError:
        logging.get_logger(__name__).warning_once(
            f"EntropyGPT was tested with transformers {OLDEST} to {NEWEST_TESTED}, and the one installed is newer. "
            "Compare what generate() gives with use_cache=True and use_cache=False before you rely on it, or install "
            f"a tested release: {INSTALL}"
        )


check_release()

__all__ = ["NEWEST_TESTED", "OLDEST", "TESTED"]
