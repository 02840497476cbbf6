"""Evaluation of models on one text, one model after the other. Each result is saved as soon as it is complete."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from entropy_gpt.conversion.early_checks import expanded
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.measuring.perplexity import Windows
from entropy_gpt.evaluation.records.measurement import (
    BATCH_TOKENS,
    HEAD_TOKENS,
    MeasuredText,
    describe_model,
    measure_attention,
    measure_heads,
    measure_text,
)
from entropy_gpt.evaluation.records.results import RESULTS, ModelResult, load_results, save_results
from entropy_gpt.training.claims import claimed
from entropy_gpt.training.files import delete, written_whole
from entropy_gpt.training.library_bars import library_bars_hidden
from entropy_gpt.training.progress import SILENT, Progress
from entropy_gpt.training.sources import Source
from modeling_entropy_gpt import EntropyGPTForCausalLM

from .evaluate_inputs import (
    Candidate,
    EvaluationOptions,
    check_options,
    count_frequencies,
    find_candidates,
    find_windows,
    load_model,
    open_text,
    tokenize_text,
)
from .options import read_arguments, with_argument_names
from .output_folder import EVALUATION


PICTURES = "pictures"
# Options that do not change results.
WITHOUT_EFFECT = ("models", "batch_tokens")


@with_argument_names
def evaluate(
    models: str | Path | Sequence[str | Path],
    *,
    text: str | Path | None = None,
    held_out: bool = False,
    split: str = "train",
    config: str | None = None,
    text_column: str = "text",
    tokenizer: str | Path | None = None,
    eos_token: str | None = None,
    context: int | None = None,
    stride: int | None = None,
    separate: bool = False,
    bos: bool = False,
    max_tokens: int | None = None,
    per_position: bool = False,
    frequency_text: str | Path | None = None,
    head_tokens: int = HEAD_TOKENS,
    prompt: str | None = None,
    head: tuple[int, int] | None = None,
    tasks: Sequence[str] | None = None,
    task_data: str | Path | None = None,
    limit: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    dtype: str = "float32",
    device: str | None = None,
    seed: int = 0,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> list[ModelResult]:
    """
    Measures models as `entropy-gpt evaluate` does: perplexity on a text, attention heads, operations, and tasks.

    All models read the same text in the same windows. With an `output`, an interrupted evaluation continues when it is
    called again with the same arguments.

    Args:
        models (`str`, `Path` or a sequence of them): EntropyGPTs or GPT-2s: folders, or repositories on the Hub.
        text (`str` or `Path`, *optional*):
            A text file, a folder of text files, a data file or folder (JSON lines, CSV, TSV, Parquet), or a data set
            on the Hub. Default: the held-out part of Python's standard library.
        held_out (`bool`): Evaluate only the part of `text` that training on it keeps for validation.
        split (`str`): The split of a data set.
        config (`str`, *optional*): The configuration of a data set.
        text_column (`str`): The column of a data set that holds the text.
        tokenizer (`str` or `Path`, *optional*): The tokenizer of all models. Default: that of each model.
        eos_token (`str`, *optional*): The tokenizer's token for the end of a text, if it names none itself.
        context (`int`, *optional*):
            Tokens that a model sees at once. Default: one less than the fewest positions of a model, at most 1023.
        stride (`int`, *optional*):
            Tokens that each window after the first predicts. With fewer, each prediction sees more text. Default: all.
        separate (`bool`): Predict each document alone, not one after the other as in training.
        bos (`bool`): Begin with the beginning-of-text token, so that the first token is predicted too.
        max_tokens (`int`, *optional*): Stop after this many tokens of text, at least 2.
        per_position (`bool`): Add the perplexity by the number of tokens seen before.
        frequency_text (`str` or `Path`, *optional*):
            Add the perplexity by how often a token occurs in this text, which is given like `text`. "training" means
            the part of `text` that is not evaluated.
        head_tokens (`int`): Tokens whose rows of attention are measured, spread over the text; 0 for none.
        prompt (`str`, *optional*): Add the entropy of every head at every token of this text, for pictures of it.
        head (`tuple[int, int]`, *optional*):
            Layer and head, from 0, whose attention to `prompt` is kept. Default: the head with the lowest entropy.
        tasks (`Sequence[str]`, *optional*): Names of tasks of lm-eval.
        task_data (`str` or `Path`, *optional*): Folder with BLiMP, LAMBADA, HellaSwag or ARC, for tasks `local_*`.
        limit (`int`, *optional*): The number of samples of each task. Default: all.
        batch_tokens (`int`): Tokens in one forward pass. They affect speed and memory, not results.
        dtype (`str`): Type of weights and computation: "float32", "bfloat16" or "float16".
        device (`str`, *optional*): Such as "cpu" or "cuda:0". Default: a GPU if there is one.
        seed (`int`): Seed of the samples that lm-eval draws.
        output (`str` or `Path`, *optional*): Folder for `results.json` and pictures. Default: nothing is written.
        overwrite (`bool`): Replace another evaluation in `output`.
        progress (`Progress`): Receives each stage.

    Returns:
        `list[ModelResult]`: The result of each model, in the order of `models`.

    Raises:
        `UserError`: If an option, a model, the text or a task can't be used, or `output` holds something else. The
            message names the option of the command and the argument: `--max-tokens` is `max_tokens`.

    Example:

    ```python
    import entropy_gpt

    results = entropy_gpt.evaluate(["runs/baseline/model", "runs/proposal/model"], text="my_texts", stride=64)
    for result in results:
        print(result.title, result.likelihood.likelihood.perplexity)
    ```
    """
    options = read_arguments(EvaluationOptions, locals())
    evaluation = prepare_evaluation(options, output, overwrite, progress)
    return measure_models(evaluation, progress)


@dataclass(frozen=True)
class Evaluation:
    """
    An evaluation that was checked and can begin.

    Args:
        options ([`EvaluationOptions`]): The options.
        candidates (`list[Candidate]`): The models.
        source ([`Source`]): The text.
        windows ([`Windows`]): The windows in which all models read it.
        output (`Path`, *optional*): Folder for numbers and pictures.
        overwrite (`bool`): Whether another evaluation there is replaced.
        earlier (`list[ModelResult]`): Results in that folder, measured with the same settings.
    """

    options: EvaluationOptions
    candidates: list[Candidate]
    source: Source
    windows: Windows
    output: Path | None
    overwrite: bool
    earlier: list[ModelResult]

    @property
    def settings(self) -> dict:
        """Everything that the results depend on except the models, as JSON stores it."""
        return _describe(self.options, self.source, self.windows)


def prepare_evaluation(
    options: EvaluationOptions, output: str | Path | None, overwrite: bool, progress: Progress
) -> Evaluation:
    """
    Looks at the models and opens the text; writes nothing.

    Args:
        options ([`EvaluationOptions`]): The options.
        output (`str` or `Path`, *optional*): Folder for numbers and pictures.
        overwrite (`bool`): Whether another evaluation there is replaced.
        progress (`Progress`): Receives each stage.

    Raises:
        `UserError`: If a model, the text or a task can't be used, or the folder holds something else.
    """
    check_options(options)
    output = None if output is None else Path(expanded(output))
    if output is not None:
        EVALUATION.is_in(output)
    with library_bars_hidden():
        if options.task_names:
            _task_scores().check_tasks(options.task_names, options.task_data)
        with progress.stage("looking at the models", len(options.models)) as line:
            candidates = []
            for candidate in find_candidates(options):
                candidates.append(candidate)
                line.advance()
        windows = find_windows(options, candidates)
        with progress.stage("opening the text"):
            source = open_text(options)
    earlier = [] if output is None else _find_earlier(output, _describe(options, source, windows), overwrite)
    return Evaluation(options, candidates, source, windows, output, overwrite, earlier)


def measure_models(evaluation: Evaluation, progress: Progress) -> list[ModelResult]:
    """
    Measures each model that has no result yet, and draws the heads. `results.json` grows by one model at a time.

    Args:
        evaluation ([`Evaluation`]): The evaluation.
        progress (`Progress`): Receives each stage.

    Returns:
        `list[ModelResult]`: The result of each model, in order.

    Raises:
        `UserError`: If the text is too short, or a task fails.
    """
    with library_bars_hidden(), _claimed(evaluation) as evaluation:
        results: list[ModelResult] = []
        prepared: dict[str, _PreparedText] = {}  # by vocabulary
        for candidate in evaluation.candidates:
            model = load_model(candidate.source, evaluation.options)
            result = describe_model(model, candidate.name, evaluation.windows, candidate.weights)
            known = [one for one in evaluation.earlier if (one.name, one.weights) == (result.name, result.weights)]
            if not known:
                if candidate.vocabulary not in prepared:
                    prepared[candidate.vocabulary] = _prepare_text(candidate, evaluation, progress)
                _measure(model, result, candidate, prepared[candidate.vocabulary], evaluation.options, progress)
            results += known or [result]
            if evaluation.output is not None:
                _save(results, evaluation)
        if evaluation.output is not None:
            _draw(results, evaluation.output / PICTURES)
    return results


def list_tasks() -> dict[str, str]:
    """The tasks of `task_data`: name and description."""
    return _task_scores().local_tasks()


def _task_scores() -> ModuleType:
    """The module that calls lm-eval. It takes seconds to import, so it is imported only for tasks."""
    from entropy_gpt.evaluation.measuring import task_scores

    return task_scores


def _describe(options: EvaluationOptions, source: Source, windows: Windows) -> dict:
    settings = {**dataclasses.asdict(options), **dataclasses.asdict(windows), "fingerprint": source.fingerprint}
    for name in WITHOUT_EFFECT:
        del settings[name]
    return json.loads(json.dumps({"text_name": source.name, **settings}, default=str))


@contextmanager
def _claimed(evaluation: Evaluation) -> Iterator[Evaluation]:
    """The evaluation with what its folder holds now, while other commands are kept out of it."""
    output, settings = evaluation.output, evaluation.settings
    if output is None:
        yield evaluation
        return
    with claimed(output, lambda: (output / RESULTS).exists() and _read_settings(output) == settings):
        yield dataclasses.replace(evaluation, earlier=_find_earlier(output, settings, evaluation.overwrite))


def _read_settings(output: Path) -> dict:
    return dict(json.loads((output / EVALUATION.record).read_text(encoding="utf-8")))


def _find_earlier(output: Path, settings: dict, overwrite: bool) -> list[ModelResult]:
    """The results of an earlier evaluation in the folder, which must have the same settings or be overwritten."""
    remedy = "give another --output, or --overwrite"
    if not EVALUATION.is_in(output) or overwrite:
        return []
    try:
        earlier = _read_settings(output)
        results = load_results(output / RESULTS) if (output / RESULTS).exists() else []
    except ValueError as error:
        raise UserError(f"{output} holds a damaged evaluation ({error}): {remedy}.") from error
    changed = [
        f"{name} {earlier.get(name)} then, {now} now" for name, now in settings.items() if earlier.get(name) != now
    ]
    if changed:
        raise UserError(f"{output} holds an evaluation with other settings ({'; '.join(changed)}): {remedy}.")
    return results


def _save(results: list[ModelResult], evaluation: Evaluation):
    output = evaluation.output
    if len(results) == 1 and not evaluation.earlier:  # an overwritten evaluation stays until a model is measured
        delete(output / RESULTS)
        with written_whole(output / EVALUATION.record) as path:
            path.write_text(json.dumps(evaluation.settings, indent=1) + "\n", encoding="utf-8")
    with written_whole(output / RESULTS) as path:
        save_results(results, path)


@dataclass(frozen=True)
class _PreparedText:
    """A text tokenised for one vocabulary, and the further arguments of [`measure_text`]."""

    text: MeasuredText
    breakdown: dict


def _prepare_text(candidate: Candidate, evaluation: Evaluation, progress: Progress) -> _PreparedText:
    name, source, options = candidate.name, evaluation.source, evaluation.options
    with progress.stage(f"{name}: tokenising", source.documents if not options.evaluates_a_part else None) as line:
        text = tokenize_text(source, candidate, evaluation.windows, options, line.advance)
        line.say(f"{text.tokens:,} tokens")
    breakdown = {"by_position": options.per_position}
    if options.frequency_text is not None:
        with progress.stage(f"{name}: counting tokens"):
            counts, counted = count_frequencies(source, candidate, options)
            breakdown |= {"token_counts": counts, "frequency_text": counted}
    return _PreparedText(text, breakdown)


def _measure(
    model: EntropyGPTForCausalLM,
    result: ModelResult,
    candidate: Candidate,
    prepared: _PreparedText,
    options: EvaluationOptions,
    progress: Progress,
):
    """Adds the measurements that the options ask for to the result."""
    name, text = candidate.name, prepared.text
    result.likelihood = measure_text(model, text, progress, name, options.batch_tokens, **prepared.breakdown)
    if options.head_tokens:
        result.heads = measure_heads(model, text, progress, name, options.head_tokens, options.batch_tokens)
    if options.prompt is not None:
        result.attention = measure_attention(model, candidate.tokenizer, options.prompt, options.head, progress, name)
    if options.task_names:
        batch_size = max(1, options.batch_tokens // text.windows.context)
        with progress.stage(f"{name}: tasks") as line:
            result.tasks = _task_scores().score_tasks(
                model,
                candidate.tokenizer,
                options.task_names,
                options.task_data,
                batch_size,
                options.limit,
                options.seed,
                on_requests=line.reach,
            )


def _draw(results: list[ModelResult], folder: Path):
    """Draws the heads of each model, and a comparison of all."""
    from entropy_gpt.evaluation.showing.head_plots import compare_models, plot_head_diagnostics

    measured = [result for result in results if result.heads is not None]
    for result in measured:
        with written_whole(folder / f"{result.name.replace('/', '-')}.png") as path:
            figure = plot_head_diagnostics(result.heads.heads, f"{result.name}: {result.title}")
            figure.savefig(path, format="png")
    if measured:
        with written_whole(folder / "entropy_comparison.png") as path:
            compare_models(measured).savefig(path, format="png")
