"""Exports a model, and shows what came of it."""

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from conversion.errors import ConversionError
from conversion.gpt2_checkpoint import load_language_model
from conversion.onnx_export import REPORT, ExportReport, export_onnx
from evaluation.publication import VOCABULARY
from training.files import delete, written_whole

from .errors import CommandError
from .model_tokenizer import load_model_tokenizer
from .output_folder import holds_earlier_output, refuse_to_delete
from .tables import make_table


console = Console()


@dataclass(frozen=True)
class Job:
    """What the command was asked to do; the fields are its options."""

    source: str
    output: Path
    cached: bool = False
    tokenizer: str | None = None
    dry_run: bool = False
    overwrite: bool = False


def run(job: Job):
    """
    Exports a model, if the graph passes its check.

    Raises:
        `CommandError`: If the model or the output can't be used, or the graph computes something else.
    """
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells which packages it does without
    check_output(job)
    try:
        with console.status("loading the model"):
            model = load_language_model(job.source).float().eval()
            tokenizer = _load_tokenizer(job, model.config.vocab_size)
        with (
            _output_folder(job) as folder,
            console.status("writing the graph, and running it beside the model"),
        ):
            report = export_onnx(model, folder, job.cached, tokenizer)
    except ConversionError as error:
        raise CommandError(str(error)) from error
    _show(report)
    console.print("Nothing was kept." if job.dry_run else f"the graph: {job.output}", soft_wrap=True, highlight=False)


def check_output(job: Job):
    """
    Refuses to replace what is no earlier export, or one without being told to, and a place that can't be written.

    Raises:
        `CommandError`: If the output can't be used.
    """
    if holds_earlier_output(job.output, REPORT, "export", job.overwrite):
        exported = _list_exported(job.output)
        refuse_to_delete({path for path in job.output.iterdir() if path.name not in exported}, "export")


def _list_exported(output: Path) -> set[str]:
    """The files of an earlier export, by its own report."""
    try:
        return {REPORT, *json.loads((output / REPORT).read_text(encoding="utf-8"))["files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{output / REPORT} is damaged, so --overwrite can't tell what to delete.") from error


def _load_tokenizer(job: Job, vocab_size: int) -> PreTrainedTokenizerFast | None:
    place = Path(job.source)
    if job.tokenizer is None and place.exists() and not any((place / name).exists() for name in VOCABULARY):
        console.print(f"{place} has no tokenizer, so the export has none: --tokenizer can say where it is.")
        return None
    return load_model_tokenizer(job.tokenizer, job.source, vocab_size)


@contextmanager
def _output_folder(job: Job) -> Iterator[Path]:
    """An empty folder that takes the place of the output once the body is through, or is lost."""
    if job.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    with written_whole(job.output) as folder:
        folder.mkdir()
        yield folder
        delete(job.output)


def _show(report: ExportReport):
    operators = sorted(report.operators, key=lambda name: (-report.nonlinear.get(name, 0), name))
    rows = [(name, f"{report.operators[name]:,}", f"{report.nonlinear.get(name, 0):,}") for name in operators]
    console.print(make_table(("operator", "nodes", "not linear"), rows))
    console.print(make_table(("file", "MB"), [(name, f"{size / 1e6:,.3f}") for name, size in report.files.items()]))
    nonlinear = ", ".join(f"{count:,} {name}" for name, count in report.nonlinear.items())
    console.print(f"{report.notation}, folded: {report.folded_notation}, {report.parameters:,} parameters")
    console.print(f"not linear in the graph: {nonlinear}; nothing else")
    console.print(
        f"In onnxruntime {report.versions['onnxruntime']}, logits differ by {report.largest_difference:.0e} of the "
        "largest from the model's, at most."
    )
