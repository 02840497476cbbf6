"""What a report is made of: results of models out of several files, and logs of training runs."""

import dataclasses
from pathlib import Path

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.records.results import RESULTS, ModelResult, load_results
from entropy_gpt.evaluation.records.run_log import LOG_NAME, RunLog


def read_inputs(paths: list[Path]) -> tuple[list[ModelResult], list[RunLog]]:
    """
    Reads what was given, each file once.

    Args:
        paths (`list[Path]`): Files of results, logs of runs, and folders that hold either or both.

    Returns:
        `tuple[list[ModelResult], list[RunLog]]`: The models, each with a name of its own, and the runs.

    Raises:
        `UserError`: If something is missing, broken, of another kind or schema, or given twice, or there is no
            model.
    """
    files = [file for path in paths for file in _find_files(path)]
    for index, file in enumerate(files):
        if file.resolve() in [other.resolve() for other in files[:index]]:
            raise UserError(f"{file} is given twice. Give each once.")
    runs = [RunLog.load(file) for file in files if _is_log(file)]
    loaded = {file: load_results(file) for file in files if not _is_log(file)}
    results = merge_results(loaded)
    if not results:
        given = ", ".join(map(str, paths))
        raise UserError(
            f"{given}: no results of models. Give those of entropy-gpt evaluate; entropy-gpt plot draws runs alone."
        )
    return results, runs


def merge_results(loaded: dict[Path, list[ModelResult]]) -> list[ModelResult]:
    """
    Makes one result of what several files tell of one model, where they do not contradict one another. Models that
    still share a name are told apart by their files.

    Args:
        loaded (`dict[Path, list[ModelResult]]`): What each file holds.

    Raises:
        `UserError`: If a file calls two models the same.
    """
    merged: list[tuple[Path, ModelResult]] = []
    for file, results in loaded.items():
        names = [result.name for result in results]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{file} calls two models {twice[0]!r}. Measure them under names of their own.")
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


def _find_files(path: Path) -> list[Path]:
    """The file itself, or what a folder holds."""
    if path.is_dir():
        files = [path / name for name in (RESULTS, LOG_NAME) if (path / name).is_file()]
        if not files:
            raise UserError(
                f"{path} holds neither {RESULTS} nor {LOG_NAME}. Give the folder of an evaluation or a training run."
            )
        return files
    if not path.is_file():
        raise UserError(
            f"There is no {path}. Give files of results, such as entropy-gpt evaluate writes, or training runs."
        )
    return [path]


def _is_log(file: Path) -> bool:
    return file.suffix == ".jsonl"


def _merge(first: ModelResult, second: ModelResult) -> ModelResult | None:
    """What both tell of one model; `None` if they are of two, or contradict one another."""
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
    """Adds the folder of the file, or all of its path where that does not tell it from the others."""
    folders = [other.resolve().parent.name for other in dict.fromkeys(files)]
    folder = file.resolve().parent.name
    return dataclasses.replace(result, name=f"{result.name} ({folder if folders.count(folder) == 1 else file})")
