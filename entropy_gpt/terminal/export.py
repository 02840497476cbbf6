"""Shows an export: the operators of the graph, its files, and how exact it is."""

from pathlib import Path

from rich.console import Console

from entropy_gpt.conversion.onnx_export import ExportReport
from entropy_gpt.conversion.tokenizer_files import VOCABULARY
from entropy_gpt.workflows.export import export

from .progress import progress_display
from .tables import make_table


console = Console()


def run(source: str, output: Path, dry_run: bool, **options):
    """
    Exports a model and shows the report.

    Args:
        source (`str`): The model.
        output (`Path`): The folder.
        dry_run (`bool`): Whether nothing is kept.
        options: The other arguments of [`~entropy_gpt.export`].

    Raises:
        `UserError`: If the model or the output can't be used, or the graph computes something else.
    """
    with progress_display(console) as progress:
        report = export(source, output=output, dry_run=dry_run, **options, progress=progress)
    _show(report)
    if not report.files.keys() & {*VOCABULARY}:
        _say(f"{source} has no tokenizer, so the export has none. Give one with --tokenizer.")
    _say("Nothing was kept." if dry_run else f"The graph: {output.resolve()}")


def _show(report: ExportReport):
    counts = (report.operators, report.nonlinear, report.products)
    names = sorted(report.operators, key=lambda name: (-report.nonlinear.get(name, 0), name))
    rows = [(name, *(f"{count.get(name, 0):,}" for count in counts)) for name in names]
    console.print(make_table(("operator", "nodes", "not linear", "products"), rows))
    console.print(make_table(("file", "MB"), [(name, f"{size / 1e6:,.3f}") for name, size in report.files.items()]))
    _say(f"{report.notation}, folded: {report.folded_notation}, {report.parameters:,} parameters")
    _say(f"Not linear in the graph: {_list(report.nonlinear)}; nothing else")
    _say(f"Products of two secret tensors: {_list(report.products)}")
    _say(
        f"In onnxruntime {report.versions['onnxruntime']}, logits differ from the model's by at most "
        f"{report.largest_difference:.0e} of the largest logit."
    )


def _list(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _say(line: str):
    """Prints a line as it is, without markup and without breaking it."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
