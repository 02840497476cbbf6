"""
What a command costs before it does anything: CPU seconds to show its help or to refuse what it is given, in processes
of their own, compared with a process that imports torch and with one that imports this project's model.

    python -m entropy_gpt.evaluation.benchmarks.start_up  prints all (two minutes on two cores) and writes nothing
"""

import resource
import statistics
import subprocess
import sys
from operator import truediv
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ._turns import format_ratio


COMMAND = str(Path(sys.executable).with_name("entropy-gpt"))
RECIPE = ("train", "python-stdlib-small")
TORCH, MODEL = "import torch", "import modeling_entropy_gpt"
RUNS = 7
VARIANTS = {
    TORCH: [sys.executable, "-c", TORCH],
    MODEL: [sys.executable, "-c", MODEL],
    "help": [COMMAND, "--help"],
    "an option out of range": [COMMAND, "quickstart", "--steps", "0"],
    "a recipe that is not there": [COMMAND, "train", "no-such-recipe"],
    "an unknown setting": [COMMAND, *RECIPE, "lerning_rate=1"],
    "a setting that the Trainer refuses": [COMMAND, *RECIPE, "learning_rate=-1"],
}


def cpu_seconds(command: list[str]) -> float:
    """CPU seconds of a process and of those that it starts, in user and system mode."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return used() - before


def main():
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(RUNS + 1):
        for name, command in VARIANTS.items():
            found = cpu_seconds(command)
            if turn:  # the first one warms up the disk's cache
                seconds[name].append(found)
    table = Table("", "CPU seconds", f"of {TORCH}", f"of {MODEL}", box=None)
    for name, found in seconds.items():
        ratios = (statistics.quantiles(map(truediv, found, seconds[other]), n=4) for other in (TORCH, MODEL))
        table.add_row(name, format_ratio(statistics.quantiles(found, n=4)), *map(format_ratio, ratios))
    Console().print(table)


if __name__ == "__main__":
    main()
