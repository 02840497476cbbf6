"""Writes the page about evaluated models."""

import re
from pathlib import Path
from urllib.parse import quote

from rich.console import Console

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.showing.page import Page, page_html, page_markdown
from entropy_gpt.evaluation.showing.report import build_report
from entropy_gpt.training.files import written_whole
from entropy_gpt.workflows.report_inputs import read_inputs


HTML, MARKDOWN = ".html", ".md"
# A picture that an earlier page had.
PICTURE = re.compile(r"[a-z0-9-]+-[0-9a-f]{8}\.png")

console = Console()


def run(paths: list[Path], output: Path):
    """
    Reads results and runs, and writes the page.

    Args:
        paths (`list[Path]`): Results of models, and training runs.
        output (`Path`): The page.

    Raises:
        `UserError`: If something can't be read or shown together, or the page can't be written there.
    """
    _check_output(output)
    results, runs = read_inputs(paths)
    with console.status("drawing"):
        page = build_report(results, runs)
    if output.suffix == HTML:
        with written_whole(output) as path:
            path.write_text(page_html(page), encoding="utf-8")
    else:
        _write_markdown(page, output)
    models = f"{len(results)} model" + "s" * (len(results) > 1)
    trained = f" and {len(runs)} training run" + "s" * (len(runs) > 1) if runs else ""
    console.print(f"page about {models}{trained}: {output}", markup=False, soft_wrap=True)


def _check_output(output: Path):
    if output.suffix not in (HTML, MARKDOWN):
        raise UserError(f"--output {output}: pages end in {HTML} or {MARKDOWN}. Give such a name.")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}. Make it, or give another.")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder. Give the name of a file.")


def _write_markdown(page: Page, output: Path):
    """
    The pictures first, under names that none before had, then the page: until it takes its place, an earlier page and
    its pictures are as they were. At last the pictures that only the earlier page showed are deleted.
    """
    folder = output.with_name(f"{output.stem}_pictures")
    for picture in page.pictures:
        with written_whole(folder / picture.file_name) as path:
            path.write_bytes(picture.png)
    with written_whole(output) as path:
        path.write_text(page_markdown(page, quote(folder.name)), encoding="utf-8")
    shown = {picture.file_name for picture in page.pictures}
    for path in folder.glob("*.png"):
        if PICTURE.fullmatch(path.name) and path.name not in shown:
            path.unlink()
