"""`entropy-gpt report`: one page about evaluated models."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS...",
            help="Results of models (results.json, or the folder it is in), and training runs (folders, or their "
            "training_log.jsonl), whose curves are shown too.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The page: .html, in one file, or .md, with a folder of pictures.")
    ] = Path("report.html"),
):
    """
    Make one page about evaluated models: tables, perplexity against cost, attention heads, and all conditions.

    Numbers that were measured under other conditions than most are marked, and not compared with them. Two records of
    one model, such as its perplexity and its costs, become one. The page loads nothing: it can be read offline.

    Example: entropy-gpt report evaluation_output runs/baseline runs/proposal -o report.html
    """
    from entropy_gpt.terminal.report import run

    run(results, output)
