"""Export of a model for other runtimes, into a folder that is replaced as a whole."""

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import onnxruntime
from transformers import PreTrainedTokenizerFast

from entropy_gpt.conversion.early_checks import expanded
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.conversion.onnx_export import ExportReport, export_onnx
from entropy_gpt.training.claims import claimed
from entropy_gpt.training.files import begun_move, delete, is_finished, put_in_place, written_whole
from entropy_gpt.training.library_bars import library_bars_hidden
from entropy_gpt.training.model_tokenizer import has_tokenizer, load_model_tokenizer
from entropy_gpt.training.progress import SILENT, Progress

from .options import with_argument_names
from .output_folder import EXPORT, refuse_to_delete


@library_bars_hidden()
@with_argument_names
def export(
    source: str | Path,
    *,
    output: str | Path = "exported_model",
    cached: bool = False,
    tokenizer: str | Path | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> ExportReport:
    """
    Exports a model as an ONNX graph, folded for inference, and checks it in onnxruntime, as `entropy-gpt export` does.

    The graph is in float32 and takes any number of sequences of any length, padded on the left. It is kept only if its
    logits match those of the model in torch.

    Args:
        source (`str` or `Path`): A GPT-2 or EntropyGPT: a folder, a repository on the Hub, or a nanoGPT checkpoint.
        output (`str` or `Path`): The folder for graph, configuration, tokenizer and report.
        cached (`bool`): Whether keys and values are inputs and outputs of the graph, to generate token by token.
        tokenizer (`str` or `Path`, *optional*):
            The tokenizer's folder or repository. Default: the source; without a tokenizer there, none is exported.
        dry_run (`bool`): Whether to export and check, but keep nothing.
        overwrite (`bool`): Whether to replace an earlier export in `output`.
        progress (`Progress`): Follows the stages of the work; by default nobody does.

    Returns:
        [`ExportReport`]: The operators of the graph, which of them are not linear, and how exact it is; also saved as
        `export_report.json` in `output`.

    Raises:
        `UserError`: If the model, the tokenizer or the output can't be used, or the graph computes something else.

    Example:

    ```python
    import entropy_gpt

    report = entropy_gpt.export("runs/python-stdlib-small/model", output="my_onnx_model", cached=True)
    print(report.nonlinear, report.largest_difference)
    ```
    """
    source, output = expanded(source), Path(expanded(output)).resolve()
    check_output(output, overwrite)
    with nullcontext() if dry_run else claimed(EXPORT.work(output), output=output):
        check_output(output, overwrite)  # another command may have written there meanwhile
        with progress.stage("loading the model") as line:
            model = load_language_model(source).float().eval()
            line.say(f"{model.config.notation}, {model.num_parameters():,} parameters")
            exported_tokenizer = _load_tokenizer(tokenizer and expanded(tokenizer), source, model.config.vocab_size)
        with (
            _output_folder(output, dry_run) as folder,
            progress.stage("exporting and checking the graph"),
            _exporters_quiet(),
        ):
            return export_onnx(model, folder, cached, exported_tokenizer)


def check_output(output: Path, overwrite: bool):
    """
    Refuses an output that can't be written, holds something else, or holds an export that is not to be replaced.

    Raises:
        `UserError`: If the output folder can't be used.
    """
    if EXPORT.is_replaced_in(output, overwrite):
        exported = _list_exported(output)
        paths = filter(is_finished, output.iterdir())
        refuse_to_delete({path for path in paths if path.name not in exported or not path.is_file()}, EXPORT)


def _list_exported(output: Path) -> set[str]:
    """The names of an earlier export's files, from its own report, which is not in its place if it was interrupted."""
    report = next(
        folder / EXPORT.record
        for folder in (output, begun_move(EXPORT.content(output)))
        if (folder / EXPORT.record).exists()
    )
    try:
        return {EXPORT.record, *json.loads(report.read_text(encoding="utf-8"))["files"].keys()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{report} is damaged, so --overwrite can't know which files to delete.") from error


def _load_tokenizer(place: str | None, source: str, vocab_size: int) -> PreTrainedTokenizerFast | None:
    if place is None and not has_tokenizer(source):
        return None
    return load_model_tokenizer(place, source, vocab_size)


@contextmanager
def _output_folder(output: Path, dry_run: bool) -> Iterator[Path]:
    """An empty folder, whose content the output gets if the body succeeds and this is no dry run."""
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    content = EXPORT.content(output)
    with written_whole(content) as folder:
        folder.mkdir()
        yield folder
    put_in_place(content, output, last=EXPORT.record)
    delete(EXPORT.work(output))


@contextmanager
def _exporters_quiet() -> Iterator[None]:
    """
    Without messages below errors: torch's exporter lists packages that it does not need, and onnxruntime describes
    the machine. onnxruntime does not say what its level was, so that stays.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    onnxruntime.set_default_logger_severity(3)
    try:
        yield
    finally:
        logger.setLevel(level)
