"""What memory a party may use: of this machine, of a model, and of its engine's process."""

import contextlib
import ctypes
import math
import os
from collections.abc import Iterable
from pathlib import Path

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, SERVER


# Bytes of a party's engine for each weight while it is given them, and in addition for each weight of the largest
# tensor: they come one after the other. Measured on 1 to 52 million weights. Of these bytes a server's engine keeps 8,
# as does a client's, which makes placeholders.
PEAK_BYTES = {SERVER: (12, 32), CLIENT: (8, 16)}
GIGA = 1e9
# Address space that the engine's threads reserve for each processor and never use.
RESERVED_BYTES = 2**30
PR_SET_DUMPABLE = 4
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_memory() -> int:
    """Bytes that this machine has, or that its container may use."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):
            found = min(found, int(Path(path).read_text(encoding="ascii")))
    return found


def check_memory(shapes: Iterable[tuple[int, ...]], rank: int, engines: int = 1):
    """
    Args:
        shapes (`Iterable[tuple]`): Those of the weights.
        rank (`int`): The party's.
        engines (`int`): That are given them at once.

    Raises:
        `PrivateInferenceError`: If a party's engines on this machine can't hold weights of such shapes.
    """
    sizes, (for_all, for_largest) = [*map(math.prod, shapes)], PEAK_BYTES[rank]
    needed, there = engines * (for_all * sum(sizes) + for_largest * max(sizes)), machine_memory()
    if needed > there:
        raise PrivateInferenceError(
            f"the model's weights need {needed / GIGA:,.0f} GB of memory as secret numbers, and this machine has "
            f"{there / GIGA:,.0f} GB."
        )


def forbid_core_dumps():
    """
    An engine that a peer makes abort leaves no image of its memory, weights or prompt and all. The limit says nothing
    to a handler to which the system pipes such images, so the process is made one of which none are taken (prctl(2)).
    """
    with contextlib.suppress(OSError, AttributeError):  # not everywhere
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    with contextlib.suppress(ImportError, OSError, ValueError):  # not everywhere
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_address_space():
    """
    Lets this process take no more memory than the machine has, so that what a peer makes it do ends this process and
    no other. Address space that is reserved and not used counts too, so the limit is a little above.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):  # not everywhere
        import resource

        most = machine_memory() + RESERVED_BYTES * (os.cpu_count() or 1)
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
