"""Report about evaluated models: a page out of their results and of logs of training runs."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from entropy_gpt.conversion.early_checks import expanded
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.records.results import RESULTS, ModelResult, load_results
from entropy_gpt.evaluation.records.run_log import LOG_NAME, RunLog
from entropy_gpt.evaluation.showing.page import Page, page_html, page_markdown
from entropy_gpt.evaluation.showing.report import build_report
from entropy_gpt.training.claims import claimed
from entropy_gpt.training.files import delete, written_whole
from entropy_gpt.training.progress import SILENT, Progress

from .options import as_tuple, with_argument_names
from .output_folder import check_page


# The name of a picture of an earlier page.
PICTURE = re.compile(r"[a-z0-9-]+-[0-9a-f]{8}\.png")


@with_argument_names
def report(
    paths: str | Path | Sequence[str | Path], output: str | Path = "report.html", *, progress: Progress = SILENT
) -> Path:
    """
    Makes a page about evaluated models, as `entropy-gpt report` does.

    Args:
        paths (`str`, `Path` or a sequence of them):
            Results of models (`results.json` or its folder), and training runs (a folder or its `training_log.jsonl`).
        output (`str` or `Path`): The page: an `.html` file, or an `.md` file with a folder of pictures.
        progress (`Progress`): Receives one stage.

    Returns:
        `Path`: The page.

    Raises:
        `UserError`: If a path can't be read or the results can't be shown together, or the page can't be written.

    Example:

    ```python
    import entropy_gpt

    entropy_gpt.report(["evaluation_output", "runs/proposal"], "report.html")
    ```
    """
    output = Path(expanded(output))
    check_page(output)
    results, runs = read_inputs([Path(expanded(path)) for path in as_tuple(paths)])
    with progress.stage("drawing"):
        write_page(results, runs, output)
    return output


def read_inputs(paths: Sequence[Path]) -> tuple[list[ModelResult], list[RunLog]]:
    """
    Reads results of models and logs of training runs.

    Args:
        paths (`Sequence[Path]`): Files of results, logs of runs, and folders with either or both.

    Returns:
        `tuple[list[ModelResult], list[RunLog]]`: The results, merged and with unique names, and the runs.

    Raises:
        `UserError`: If a path is missing, damaged, of another kind or schema, or given twice, or there is no model.
    """
    files = [file for path in paths for file in _find_files(path)]
    for index, file in enumerate(files):
        if file.resolve() in [other.resolve() for other in files[:index]]:
            raise UserError(f"{file} is given twice. Give each file once.")
    runs = [RunLog.load(file) for file in files if _is_log(file)]
    loaded = {file: load_results(file) for file in files if not _is_log(file)}
    results = merge_results(loaded)
    if not results:
        given = ", ".join(map(str, paths))
        raise UserError(
            f"{given}: no results of models. Add those of entropy-gpt evaluate. To draw only runs, use "
            "entropy-gpt plot."
        )
    return results, runs


def merge_results(loaded: dict[Path, list[ModelResult]]) -> list[ModelResult]:
    """
    Merges the results of one model from several files, if they do not contradict one another. Models that still share
    a name get the name of their folder or file added.

    Args:
        loaded (`dict[Path, list[ModelResult]]`): The results in each file.

    Raises:
        `UserError`: If two models of a file have the same name, or two names become the same.
    """
    merged: list[tuple[Path, ModelResult]] = []
    for file, results in loaded.items():
        names = [result.name for result in results]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{file} calls two models {twice[0]!r}. Measure them under different names.")
        for result in results:
            for index, (first_file, known) in enumerate(merged):
                if (whole := _merge(known, result)) is not None:
                    merged[index] = (first_file, whole)
                    break
            else:
                merged.append((file, result))
    names = [result.name for _, result in merged]
    files = [file for file, _ in merged]
    named = [result if names.count(result.name) == 1 else _rename(result, file, files) for file, result in merged]
    names = [result.name for result in named]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"Two models would be called {twice[0]!r}. Measure one under another name.")
    return named


def write_page(results: list[ModelResult], runs: list[RunLog], output: Path):
    """
    Writes the page, one process at a time. If that fails, an earlier page and its pictures stay as they were.

    Args:
        results (`list[ModelResult]`): Results of models with unique names.
        runs (`list[RunLog]`): Training runs.
        output (`Path`): The page.

    Raises:
        `UserError`: If another process writes it.
    """
    work = output.with_name(f".writing-{output.name}")
    with claimed(work, output=output):
        page = build_report(results, runs)
        if output.suffix == ".html":
            with written_whole(output) as path:
                path.write_text(page_html(page), encoding="utf-8")
        else:
            _write_markdown(page, output)
        delete(work)


def _write_markdown(page: Page, output: Path):
    """Writes the pictures under new names, then the page, and then deletes the pictures of an earlier page."""
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


def _find_files(path: Path) -> list[Path]:
    """The file itself, or the results and the log in a folder."""
    if path.is_dir():
        files = [path / name for name in (RESULTS, LOG_NAME) if (path / name).is_file()]
        if not files:
            raise UserError(
                f"{path} holds neither {RESULTS} nor {LOG_NAME}. Give the folder of an evaluation or a training run."
            )
        return files
    if not path.is_file():
        raise UserError(
            f"There is no {path}. Give files of results, as entropy-gpt evaluate writes them, or training runs."
        )
    return [path]


def _is_log(file: Path) -> bool:
    return file.suffix == ".jsonl"


def _merge(first: ModelResult, second: ModelResult) -> ModelResult | None:
    """Both results as one; `None` if they describe two models, or contradict each other."""
    if (first.name, first.weights) != (second.name, second.weights):
        return None
    parts = {}
    for part in dataclasses.fields(ModelResult):
        known, other = getattr(first, part.name), getattr(second, part.name)
        if part.name == "costs":
            parts["costs"] = known + [cost for cost in other if cost not in known]
        elif known is None or other is None or known == other:
            parts[part.name] = other if known is None else known
        else:
            return None
    return ModelResult(**parts)


def _rename(result: ModelResult, file: Path, files: list[Path]) -> ModelResult:
    """Adds the folder of the file to the model's name, or the whole path if the folder is not unique."""
    folders = [other.resolve().parent.name for other in dict.fromkeys(files)]
    folder = file.resolve().parent.name
    return dataclasses.replace(result, name=f"{result.name} ({folder if folders.count(folder) == 1 else file})")
