"""What happens soon, on a machine that has other work too."""

import time
from collections.abc import Callable


def eventually(holds: Callable[[], object], seconds: float = 10) -> bool:
    """Whether something holds within some seconds."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(holds())
