"""Runs `entropy-gpt evaluate`: each model's measurements, one after the other, kept as they are done."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from datasets import disable_progress_bars
from rich.console import Console
from rich.markup import escape
from transformers.utils import logging

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.measuring.perplexity import Windows
from entropy_gpt.evaluation.records.conditions import describe_windows
from entropy_gpt.evaluation.records.measurement import MeasuredText, describe_model, measure_heads, measure_text
from entropy_gpt.evaluation.records.results import RESULTS, ModelResult, load_results, save_results
from entropy_gpt.evaluation.showing.head_plots import plot_comparison, plot_head_diagnostics
from entropy_gpt.terminal.progress import progress_display
from entropy_gpt.terminal.tables import make_table
from entropy_gpt.training.files import delete, is_finished, written_whole
from entropy_gpt.training.progress import Progress
from entropy_gpt.training.sources import Source
from modeling_entropy_gpt import EntropyGPTForCausalLM

from .evaluate_inputs import (
    Candidate,
    Job,
    check_options,
    count_frequencies,
    find_candidates,
    find_windows,
    load_model,
    open_text,
    tokenize_text,
)


SETTINGS, PICTURES = "settings.json", "pictures"
# The columns of the table, for a terminal of 80 characters.
HEADINGS = (
    "model",
    "ppl per\ntoken",
    "ppl per\nword",
    "bits/\nbyte",
    "entropy\n(nats)",
    "over-\nloaded",
    "col-\nlapsed",
)

console = Console()


@dataclass(frozen=True)
class Prepared:
    """A text as models of one vocabulary see it, and what [`measure_text`] is to tell beside the whole."""

    text: MeasuredText
    breakdown: dict


def run(job: Job, output: Path, overwrite: bool, dry_run: bool):
    """
    Measures all models.

    Args:
        job ([`Job`]): What to measure, and on what.
        output (`Path`): Folder for numbers and pictures.
        overwrite (`bool`): Whether another evaluation that is there is replaced.
        dry_run (`bool`): Whether to show only what would be measured.

    Raises:
        `UserError`: If a model, the text or a task can't be used, or the folder holds something else.
    """
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    check_options(job)
    if job.task_names:
        _lm_eval().check_tasks(job.task_names, job.task_data)
    with progress_display(console) as progress:
        with progress.stage("looking at the models", len(job.models)) as line:
            candidates = []
            for candidate in find_candidates(job):
                candidates.append(candidate)
                line.advance()
        windows = find_windows(job, candidates)
        with progress.stage("opening the text"):
            source = open_text(job)
        settings = _describe(job, source, windows)
        earlier = _find_earlier(output, settings, overwrite)
        if not dry_run:
            _measure_all(candidates, source, windows, job, earlier, output, settings, progress)
    if dry_run:
        _print_plan(candidates, settings, output)
        return
    results = load_results(output / RESULTS)
    _draw(results, output)
    _print_results(results)
    _print_where(results, output)


def print_tasks():
    """Lists the tasks for data of one's own."""
    for name, description in _lm_eval().local_tasks().items():
        console.print(f"{name}: {description}", markup=False, soft_wrap=True)
    console.print("Others are known by the names that lm-eval gives them, and fetched from the Hub.")


def _lm_eval():
    """What calls lm-eval, which takes seconds to load: only where tasks are asked for."""
    from entropy_gpt.evaluation.measuring import task_scores

    return task_scores


def _describe(job: Job, source: Source, windows: Windows) -> dict:
    """All that the numbers depend on, but for the models."""
    options = {**dataclasses.asdict(job), **dataclasses.asdict(windows), "fingerprint": source.fingerprint}
    for name in ("models", "batch_tokens"):
        del options[name]
    return json.loads(json.dumps({"text_name": source.name, **options}, default=str))


def _find_earlier(output: Path, settings: dict, overwrite: bool) -> list[ModelResult]:
    """What an earlier run with the same settings has measured."""
    remedy = "give another --output, or --overwrite"
    if not output.exists() or (output.is_dir() and not any(map(is_finished, output.iterdir()))):
        return []
    if not output.is_dir() or not (output / SETTINGS).exists():
        raise UserError(f"{output} is there already and holds no evaluation: give another --output.")
    if overwrite:
        return []
    try:
        earlier = dict(json.loads((output / SETTINGS).read_text(encoding="utf-8")))
        results = load_results(output / RESULTS) if (output / RESULTS).exists() else []
    except ValueError as error:
        raise UserError(f"{output} holds a damaged evaluation ({error}): {remedy}.") from error
    changed = [
        f"{name} {earlier.get(name)} then, {now} now" for name, now in settings.items() if earlier.get(name) != now
    ]
    if changed:
        raise UserError(f"{output} holds an evaluation with other settings ({'; '.join(changed)}): {remedy}.")
    return results


def _measure_all(
    candidates: list[Candidate],
    source: Source,
    windows: Windows,
    job: Job,
    earlier: list[ModelResult],
    output: Path,
    settings: dict,
    progress: Progress,
):
    """Leaves results.json, which grows by a model at a time."""
    results: list[ModelResult] = []
    prepared: dict[str, Prepared] = {}  # by vocabulary
    for candidate in candidates:
        model = load_model(candidate.source, job)
        result = describe_model(model, candidate.name, windows, candidate.weights)
        known = [one for one in earlier if (one.name, one.weights) == (result.name, result.weights)]
        if not known:
            if candidate.vocabulary not in prepared:
                prepared[candidate.vocabulary] = _prepare(candidate, source, windows, job, progress)
            _measure(model, result, candidate, prepared[candidate.vocabulary], job, progress)
        results += known or [result]
        if len(results) == 1 and not earlier:  # nothing is written, or replaced, before something is measured
            delete(output / RESULTS)
            with written_whole(output / SETTINGS) as path:
                path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        with written_whole(output / RESULTS) as path:
            save_results(results, path)


def _prepare(candidate: Candidate, source: Source, windows: Windows, job: Job, progress: Progress) -> Prepared:
    name = candidate.name
    with progress.stage(f"{name}: tokenising", source.documents if not job.evaluates_a_part else None) as line:
        text = tokenize_text(source, candidate, windows, job, line.advance)
        line.say(f"{text.tokens:,} tokens")
    breakdown = {"by_position": job.per_position}
    if job.frequency_text is not None:
        with progress.stage(f"{name}: counting tokens"):
            breakdown["token_counts"], breakdown["frequency_text"] = count_frequencies(source, candidate, job)
    return Prepared(text, breakdown)


def _measure(
    model: EntropyGPTForCausalLM,
    result: ModelResult,
    candidate: Candidate,
    prepared: Prepared,
    job: Job,
    progress: Progress,
):
    """Adds what was asked for to the result."""
    name, text = candidate.name, prepared.text
    result.likelihood = measure_text(model, text, progress, name, job.batch_tokens, **prepared.breakdown)
    if job.head_tokens:
        result.heads = measure_heads(model, text, progress, name, job.head_tokens, job.batch_tokens)
    if job.task_names:
        batch_size = max(1, job.batch_tokens // text.windows.context)
        with progress.stage(f"{name}: tasks") as line:
            result.tasks = _lm_eval().score_tasks(
                model,
                candidate.tokenizer,
                job.task_names,
                job.task_data,
                batch_size,
                job.limit,
                job.seed,
                on_requests=line.reach,
            )


def _draw(results: list[ModelResult], output: Path):
    measured = [result for result in results if result.heads is not None]
    for result in measured:
        with written_whole(output / PICTURES / f"{result.name.replace('/', '-')}.png") as path:
            plot_head_diagnostics(result, path)
    if measured:
        with written_whole(output / PICTURES / "entropy_comparison.png") as path:
            plot_comparison(measured, path)


def _print_results(results: list[ModelResult]):
    console.print(make_table(HEADINGS, map(table_row, results), folded={0}))
    windows = results[0].likelihood.likelihood.windows
    console.print(escape(describe_windows(windows)), style="dim", soft_wrap=True)
    _print_parts(results)
    if any(result.tasks is not None for result in results):
        _print_scores(results)


def table_row(result: ModelResult) -> tuple[str, ...]:
    """A model in the order of `HEADINGS`; what was not measured is empty."""
    likelihood = result.likelihood.likelihood
    entropies = ("", "", "")
    if result.heads is not None:
        entropy = result.heads.heads.entropy
        entropies = (f"{entropy.mean:.2f}", f"{entropy.overloaded_share:.0%}", f"{entropy.collapsed_share:.0%}")
    return (
        f"{result.name}\n {result.title}",
        f"{likelihood.perplexity:.2f}",
        f"{likelihood.word_perplexity:.4g}",
        f"{likelihood.bits_per_byte:.3f}",
        *entropies,
    )


def _print_parts(results: list[ModelResult]):
    """Perplexities of some of the tokens, where they were asked for."""
    likelihoods = [result.likelihood.likelihood for result in results]
    kinds = {
        "tokens seen before": [likelihood.by_position for likelihood in likelihoods],
        f"times in {likelihoods[0].frequency_text}": [likelihood.by_frequency for likelihood in likelihoods],
    }
    for title, parts in kinds.items():
        if None in parts:
            continue
        headings = [title, *(f"{result.name}\nppl per token" for result in results)]
        ranges = {part.begin: part.range for model_parts in parts for part in model_parts}
        shown = [{part.begin: f"{part.perplexity:.2f}" for part in model_parts} for model_parts in parts]
        rows = [[ranges[begin], *(perplexities.get(begin, "") for perplexities in shown)] for begin in sorted(ranges)]
        console.print(make_table(headings, rows, folded=range(len(headings))))


def _print_scores(results: list[ModelResult]):
    names = {(score.task, score.metric): None for result in results if result.tasks for score in result.tasks.scores}
    headings = ["task", "metric", *(result.name for result in results)]
    rows = [[task, metric, *(_find_score(result, task, metric) for result in results)] for task, metric in names]
    console.print(make_table(headings, rows, text_columns=2, folded=range(len(headings))))


def _find_score(result: ModelResult, task: str, metric: str) -> str:
    for score in result.tasks.scores if result.tasks else []:
        if (score.task, score.metric) == (task, metric):
            error = "" if score.standard_error is None else f" ± {score.standard_error:.3f}"
            return f"{score.value:.4g}{error}"
    return ""


def _print_plan(candidates: list[Candidate], settings: dict, output: Path):
    for candidate in candidates:
        config = candidate.config
        sizes = f"{config.n_layer} layers, width {config.n_embd}, {config.n_positions} positions"
        console.print(
            f"{candidate.name}: {config.notation}, {sizes}, {len(candidate.tokenizer):,} tokens", markup=False
        )
    told = ", ".join(f"{name} {value}" for name, value in settings.items() if value not in (None, False))
    console.print(f"to measure: {told}", markup=False, soft_wrap=True)
    console.print(f"nothing is measured or written (dry run); it would go to {output}", markup=False, soft_wrap=True)


def _print_where(results: list[ModelResult], output: Path):
    if any(result.heads is not None for result in results):
        console.print(f"pictures of the heads: {output / PICTURES}", markup=False, soft_wrap=True)
    console.print(f"all numbers: {output / RESULTS}", markup=False, soft_wrap=True)
    console.print(
        f"one page of them: entropy-gpt report {output / RESULTS} -o {output / 'report.html'}",
        markup=False,
        soft_wrap=True,
    )
