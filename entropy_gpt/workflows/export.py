"""Exports a model, and shows what came of it."""

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
from huggingface_hub import snapshot_download
from rich.console import Console
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.conversion.onnx_export import REPORT, ExportReport, export_onnx
from entropy_gpt.conversion.tokenizer_files import VOCABULARY
from entropy_gpt.terminal.tables import make_table
from entropy_gpt.training.files import delete, written_whole
from entropy_gpt.training.model_tokenizer import load_model_tokenizer

from .output_folder import holds_earlier_output, refuse_to_delete


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
        `UserError`: If the model or the output can't be used, or the graph computes something else.
    """
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells which packages it does without
    onnxruntime.set_default_logger_severity(3)  # errors alone: it tells what it finds of the machine
    check_output(job)
    with console.status("loading the model"):
        model = load_language_model(job.source).float().eval()
        tokenizer = _load_tokenizer(job, model.config.vocab_size)
    with (
        _output_folder(job) as folder,
        console.status("writing the graph, and running it beside the model"),
    ):
        report = export_onnx(model, folder, job.cached, tokenizer)
    _show(report)
    _say("Nothing was kept." if job.dry_run else f"The graph: {job.output}")


def check_output(job: Job):
    """
    Refuses to replace what is no earlier export, or one without being told to, and a place that can't be written.

    Raises:
        `UserError`: If the output can't be used.
    """
    if holds_earlier_output(job.output, REPORT, "export", job.overwrite):
        exported = _list_exported(job.output)
        paths = job.output.iterdir()
        refuse_to_delete({path for path in paths if path.name not in exported or not path.is_file()}, "export")


def _list_exported(output: Path) -> set[str]:
    """The files of an earlier export, by its own report."""
    try:
        return {REPORT, *json.loads((output / REPORT).read_text(encoding="utf-8"))["files"].keys()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{output / REPORT} is damaged, so --overwrite can't tell what to delete.") from error


def _load_tokenizer(job: Job, vocab_size: int) -> PreTrainedTokenizerFast | None:
    if job.tokenizer is None and not _has_tokenizer(job.source):
        _say(f"{job.source} has no tokenizer, so the export has none: --tokenizer can say where it is.")
        return None
    return load_model_tokenizer(job.tokenizer, job.source, vocab_size)


def _has_tokenizer(source: str) -> bool:
    place = Path(source)
    if not place.exists():  # on the Hub, whose client complains if there is none of the files
        place = Path(snapshot_download(source, allow_patterns=["config.json", *VOCABULARY]))
    return any((place / name).exists() for name in VOCABULARY)


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
    """Prints it as it is, on one line wherever it goes."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
