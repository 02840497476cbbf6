"""Runs an evaluation and prints its plan or its results."""

import shlex
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from transformers.utils import logging

from entropy_gpt.evaluation.records.conditions import describe_windows
from entropy_gpt.evaluation.records.results import RESULTS, ModelResult
from entropy_gpt.evaluation.showing.columns import (
    BITS_PER_BYTE,
    COLLAPSED,
    MEAN_ENTROPY,
    OVERLOADED,
    PERPLEXITY,
    WORD_PERPLEXITY,
    Column,
    list_rows,
)
from entropy_gpt.workflows.evaluate import PICTURES, Evaluation, list_tasks, measure_models, prepare_evaluation
from entropy_gpt.workflows.evaluate_inputs import EvaluationOptions
from entropy_gpt.workflows.options import read_options

from .progress import progress_display
from .tables import break_path, make_table, print_side_by_side


NAME = Column("model", "model", lambda result: f"{result.name}\n {result.title}")
COLUMNS = (NAME, PERPLEXITY, WORD_PERPLEXITY, BITS_PER_BYTE, MEAN_ENTROPY, OVERLOADED, COLLAPSED)

console = Console()


def run(output: Path, overwrite: bool, dry_run: bool, **options):
    """
    Measures all models and prints their results, or only prints what would be measured.

    Args:
        output (`Path`): Folder for numbers and pictures.
        overwrite (`bool`): Whether another evaluation there is replaced.
        dry_run (`bool`): Whether to measure and write nothing.
        options: The other arguments of [`~entropy_gpt.evaluate`].

    Raises:
        `UserError`: If a model, the text or a task can't be used, or the folder holds something else.
    """
    logging.set_verbosity_error()
    with progress_display(console) as progress:
        evaluation = prepare_evaluation(read_options(EvaluationOptions, **options), output, overwrite, progress)
        results = [] if dry_run else measure_models(evaluation, progress)
    if dry_run:
        _print_plan(evaluation)
    else:
        _print_results(results)
        _print_files(results, output)


def print_tasks():
    """Prints the tasks for `--task-data`."""
    for name, description in list_tasks().items():
        console.print(f"{name}: {description}", markup=False, soft_wrap=True)
    console.print("All other tasks have the names that lm-eval gives them, and are fetched from the Hub.")


def _print_results(results: list[ModelResult]):
    headings = [column.narrow for column in COLUMNS]
    console.print(make_table(headings, list_rows(COLUMNS, results), folded={0}))
    windows = results[0].likelihood.likelihood.windows
    console.print(escape(describe_windows(windows)), style="dim", soft_wrap=True)
    _print_parts(results)
    if any(result.tasks is not None for result in results):
        _print_scores(results)


def _print_parts(results: list[ModelResult]):
    """Prints the perplexity by position and by frequency, where it was measured."""
    likelihoods = [result.likelihood.likelihood for result in results]
    kinds = {
        "tokens seen before": [likelihood.by_position for likelihood in likelihoods],
        f"times in {likelihoods[0].frequency_text}": [likelihood.by_frequency for likelihood in likelihoods],
    }
    for title, parts in kinds.items():
        if None in parts:
            continue
        headings = [title, *(f"{break_path(result.name)}\nppl per\ntoken" for result in results)]
        ranges = {part.begin: part.range for model_parts in parts for part in model_parts}
        shown = [{part.begin: f"{part.perplexity:.2f}" for part in model_parts} for model_parts in parts]
        rows = [[ranges[begin], *(perplexities.get(begin, "") for perplexities in shown)] for begin in sorted(ranges)]
        print_side_by_side(console, headings, rows)


def _print_scores(results: list[ModelResult]):
    names = {(score.task, score.metric): None for result in results if result.tasks for score in result.tasks.scores}
    headings = ["task", "metric", *(break_path(result.name) for result in results)]
    rows = [[task, metric, *(_find_score(result, task, metric) for result in results)] for task, metric in names]
    print_side_by_side(console, headings, rows, text_columns=2)


def _find_score(result: ModelResult, task: str, metric: str) -> str:
    for score in result.tasks.scores if result.tasks else []:
        if (score.task, score.metric) == (task, metric):
            error = "" if score.standard_error is None else f" ± {score.standard_error:.3f}"
            return f"{score.value:.4g}{error}"
    return ""


def _print_plan(evaluation: Evaluation):
    for candidate in evaluation.candidates:
        config = candidate.config
        sizes = f"{config.n_layer} layers, width {config.n_embd}, {config.n_positions} positions"
        console.print(
            f"{candidate.name}: {config.notation}, {sizes}, {len(candidate.tokenizer):,} tokens", markup=False
        )
    settings = (f"{name} {value}" for name, value in evaluation.settings.items() if value not in (None, False))
    console.print(f"to measure: {', '.join(settings)}", markup=False, soft_wrap=True)
    console.print(
        f"Dry run: nothing was measured or written. Results would go to {evaluation.output}.",
        markup=False,
        soft_wrap=True,
    )


def _print_files(results: list[ModelResult], output: Path):
    if any(result.heads is not None for result in results):
        console.print(f"pictures of the heads: {output / PICTURES}", markup=False, soft_wrap=True)
    console.print(f"all numbers: {output / RESULTS}", markup=False, soft_wrap=True)
    words = ["entropy-gpt", "report", str(output / RESULTS), "-o", str(output / "report.html")]
    console.print(f"make a page of them: {shlex.join(words)}", markup=False, soft_wrap=True)
