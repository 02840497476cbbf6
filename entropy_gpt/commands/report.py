"""`entropy-gpt report`: makes a page about evaluated models."""

from pathlib import Path
from typing import Annotated

import typer

from entropy_gpt.conversion.early_checks import check_path
from entropy_gpt.workflows.output_folder import check_page

from .paths import read_path, read_paths


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS...",
            callback=read_paths,
            help="Results of models (results.json or its folder), and training runs (a folder or its "
            "training_log.jsonl), whose curves are added.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            callback=read_path,
            help="The page: an .html file, or an .md file with a folder of pictures.",
        ),
    ] = Path("report.html"),
):
    """
    Make a page about evaluated models: tables, perplexity against cost, attention heads, and all conditions.

    Numbers that were measured under different conditions from most others are marked and not compared with them. Two
    records of one model, such as its perplexity and its costs, are merged. The page loads nothing, so it can be read
    offline.

    Example: entropy-gpt report evaluation_output runs/baseline runs/proposal -o report.html
    """
    check_page(output)
    for path in results:
        check_path(path, "Give files of results, as entropy-gpt evaluate writes them, or training runs.")
    from entropy_gpt.terminal.report import run

    run(results, output)
