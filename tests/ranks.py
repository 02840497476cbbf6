"""Processes that train together."""

import os
import socket
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from .entropy_gpt.forks import shared_forks


CONFIGURATIONS = Path(__file__).resolve().parents[1] / "training" / "accelerate"


def run_on_ranks(module: str, *arguments, ranks: int, configuration: str | None = None):
    """
    A module's `main` on some ranks, in forks of one process, with the variables that a launcher sets.

    Args:
        module (`str`): Its full name.
        arguments: The words of its command line.
        ranks (`int`): How many processes.
        configuration (`str`, *optional*): Name of a configuration of accelerate. Without one, torch's launcher is
            meant.

    Raises:
        `AssertionError`: If a rank fails; with the end of what it printed.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    of_all = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    of_all |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    if configuration is not None:
        words = [*launcher_words(configuration, ranks), "script.py"]
        of_all |= prepare_multi_gpu_env(_validate_launch_command(launch_command_parser().parse_args(words))[0])
    environments = [{**of_all, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    processes = shared_forks().run_together(module, arguments, environments)
    assert not any(process.returncode for process in processes), "\n".join(each.stderr[-3000:] for each in processes)


def launcher_words(configuration: str, ranks: int) -> list[str]:
    """The options with which accelerate's launcher starts as many ranks."""
    file = CONFIGURATIONS / f"{configuration}.yaml"
    return [f"--num_processes={ranks}", f"--config_file={file}", "--main_process_port=0"]
