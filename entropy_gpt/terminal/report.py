"""Writes the page about evaluated models, and prints where it is."""

from pathlib import Path

from rich.console import Console

from entropy_gpt.workflows.output_folder import check_page
from entropy_gpt.workflows.report import read_inputs, write_page

from .progress import progress_display


console = Console()


def run(paths: list[Path], output: Path):
    """
    Reads results and runs, and writes the page.

    Args:
        paths (`list[Path]`): Results of models, and training runs.
        output (`Path`): The page.

    Raises:
        `UserError`: If a path can't be read or the results can't be shown together, or the page can't be written.
    """
    check_page(output)
    results, runs = read_inputs(paths)
    with progress_display(console, transient=True) as progress, progress.stage("drawing"):
        write_page(results, runs, output)
    models = f"{len(results)} model" + "s" * (len(results) > 1)
    trained = f" and {len(runs)} training run" + "s" * (len(runs) > 1) if runs else ""
    console.print(f"page about {models}{trained}: {output}", markup=False, soft_wrap=True)
