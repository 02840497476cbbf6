"""`entropy-gpt private benchmark`: measures the paper's table on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from entropy_gpt.conversion.early_checks import check_notation
from entropy_gpt.training.claims import refuse_claimed
from entropy_gpt.workflows.output_folder import BENCHMARK

from .paths import read_path
from .private_connection import Timeout
from .private_options import Heads, Length


def benchmark(
    notations: Annotated[
        list[str] | None, typer.Argument(metavar="NOTATION...", help="Architectures. Default: the paper's four.")
    ] = None,
    n_layer: Annotated[int, typer.Option(min=1, help="Blocks.")] = 12,
    n_embd: Annotated[int, typer.Option(min=1, help="Width.")] = 768,
    n_head: Heads = None,
    context: Length = 128,
    vocab_size: Annotated[int, typer.Option(min=2, help="Tokens of the vocabulary.")] = 50257,
    networks: Annotated[
        list[str],
        typer.Option(
            "--network",
            help="Another network besides LAN and WAN: loopback, or bandwidth and round trip, such as 300Mbps,20ms. "
            "Operations take the forms that are fastest on the first one named, or on a WAN.",
        ),
    ] = (),
    whole: Annotated[
        bool,
        typer.Option("--full", help="Also run the cheapest architecture as a whole, to verify the sum of its parts."),
    ] = False,
    prepared: Annotated[
        bool,
        typer.Option("--prepared", help="Also measure each in two phases: before the prompt, and after it."),
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", callback=read_path, help="Folder for measurements, table and picture.")
    ] = Path("private_benchmark_output"),
    timeout: Timeout = 1200,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be measured, with predicted MB, and measure nothing.")
    ] = False,
):
    """
    Measure the paper's table on this machine: the cost of each architecture between two processes.

    The first and the last block, one block of each kind in between, the embedding and the head are measured and added
    up. The baseline is SM+LN+G as it is run today. If interrupted, run the same command again to continue.

    Example: entropy-gpt private benchmark --full --network 300Mbps,20ms -o runs/private
    """
    options = dict(locals())
    for notation in notations or ():
        check_notation(notation, n_layer)
    BENCHMARK.is_in(output)  # before the imports, which take seconds
    if not dry_run:
        refuse_claimed(output)
    from entropy_gpt.terminal.private_table import run

    run(**options)
