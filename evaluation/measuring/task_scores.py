"""Scores of lm-eval: its stock tasks, and tasks of this project that read local data."""

import difflib
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from lm_eval import evaluate
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from entropy_gpt.evaluation.errors import TaskError
from entropy_gpt.evaluation.origin import collect_origin, recorded_versions

from .lm_eval_model import LMEvalModel, quiet_loggers, quiet_streams
from .modes import evaluation_mode
from .scores import TaskResult, TaskScore


# For lm_eval --include_path too.
TASK_FOLDER = Path(__file__).resolve().parents[1] / "lm_eval_tasks"
# What the names of these tasks begin with, and those of no other.
LOCAL = "local_"
LOCAL_TASKS = {
    "local_arc_easy": "ARC-easy, four answers to a question of science: acc, acc_norm",
    "local_blimp": "BLiMP, minimal pairs of sentences: acc of 67 paradigms, each alone local_blimp_PARADIGM, and mean",
    "local_hellaswag": "HellaSwag, four endings of a text: acc, acc_norm",
    "local_lambada_openai": "LAMBADA in OpenAI's version, the last word of a passage: perplexity, acc",
}
# lm-eval takes 100,000: minutes for LAMBADA, to change the third digit of a standard error.
BOOTSTRAP_SAMPLES = 1000
# If there are more sources of data, their number is given instead.
NAMED_SOURCES = 4

logger = logging.getLogger(__name__)


def local_tasks() -> dict[str, str]:
    """What the tasks for local data are about, by their names."""
    return dict(LOCAL_TASKS)


def check_tasks(tasks: list[str], task_data: Path | None):
    """
    Loads tasks with their data, to know before any work that they can be scored.

    Args:
        tasks (`list[str]`): Their names; none is no error here.
        task_data (`Path`, *optional*): The folder that local tasks read.

    Raises:
        `TaskError`: If a name is unknown, or data is missing or damaged.
    """
    if tasks:
        with quiet_loggers():
            _load_tasks(tasks, task_data)


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    task_data: Path | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    seed: int = 0,
    on_requests: Callable[[int, int], None] = lambda answered, known: None,
) -> TaskResult:
    """
    Lets lm-eval score a model as it stands, without dropout. The model's type, device and attention are left alone.
    What lm-eval logs, prints and draws does not reach the terminal; Python's, NumPy's and torch's random numbers begin
    anew at the seed.

    Args:
        model (`PreTrainedModel`): A causal language model, such as an EntropyGPT or one converted from a GPT-2.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        tasks (`list[str]`):
            Names of tasks, groups or tags: those of [`local_tasks`], a paradigm `local_blimp_*`, or any of lm-eval's,
            which read their data from the Hub.
        task_data (`Path`, *optional*): The folder that local tasks read.
        batch_size (`int`): Requests in a forward pass; it changes speed and memory alone.
        limit (`int`, *optional*): Samples to take of each task, the first ones.
        seed (`int`): Seed of what lm-eval draws, such as examples shown before a sample.
        on_requests: Called with the number of requests answered and of those known so far, for progress.

    Returns:
        [`TaskResult`]: Of each group its means first, then of each task; metrics in lm-eval's order.

    Raises:
        `TaskError`: If a name is unknown, data is missing or damaged, the tokenizer or the model's number of positions
            does not suit, or the model's answers are not finite.
    """
    begin = time.perf_counter()
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise TaskError(f"{name} is {value}: allowed are 1 and more.")
    with quiet_loggers(), evaluation_mode(model):
        loaded = _load_tasks(tasks, task_data)
        lm = LMEvalModel(model, tokenizer, batch_size, on_requests)
        with quiet_streams():
            results = _evaluate(lm, loaded, limit, seed)
    if lm.shortened:
        logger.warning(
            "Requests longer than the %d tokens that the model sees, whose beginnings were left out: %d of %d.",
            lm.max_length,
            lm.shortened,
            lm.answered,
        )
    return TaskResult(
        scores=_list_scores(results, loaded),
        bos=lm.bos_rule,
        context=lm.max_length,
        limit=limit,
        data=_describe_data(list(loaded["tasks"].values())),
        dtype=str(model.dtype).removeprefix("torch."),
        seed=seed,
        seconds=time.perf_counter() - begin,
        **collect_origin(model.device, recorded_versions("lm_eval")),
    )


def _load_tasks(names: list[str], task_data: Path | None) -> TaskDict:
    if not names:
        raise TaskError(f"No task is named: allowed are {', '.join(LOCAL_TASKS)} and lm-eval's own.")
    local = _local_names()
    with_stock_tasks = not all(name.startswith(LOCAL) for name in names)
    manager = _manager(with_stock_tasks, task_data if task_data is None else task_data.absolute())
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        raise TaskError(
            f"{unknown[0]!r} is no task that lm-eval knows. "
            + (f"Near it are {', '.join(near)}. " if near else "")
            + f"For data of your own there are {', '.join(LOCAL_TASKS)}."
        )
    loaded = [part for name in dict.fromkeys(names) for part in _load_task(manager, name, name in local)]
    try:
        return manager.load(loaded)
    except ValueError as error:  # a task on its own and in a group
        raise TaskError(f"{error}: leave one out.") from error


@functools.cache
def _manager(with_stock_tasks: bool, task_data: Path | None) -> TaskManager:
    """Knows the tasks; to read the files of the stock ones takes seconds."""
    metadata = {} if task_data is None else {"task_data": str(task_data)}
    return TaskManager(include_path=TASK_FOLDER, include_defaults=with_stock_tasks, metadata=metadata)


def _load_task(manager: TaskManager, name: str, is_local: bool) -> list[Task | Group]:
    """A task or a group, or the tasks of a tag."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # stock tasks raise whatever happens to their data on the way
        if is_local:
            raise TaskError(f"{name}: {error}") from error
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise TaskError(
            f"{name} can't be loaded ({reason}). Tasks of lm-eval's own read their data from the Hub; those that read "
            f"files of yours are {', '.join(LOCAL_TASKS)}."
        ) from error
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def _local_names() -> set[str]:
    return {path.stem for path in TASK_FOLDER.rglob("*.yaml")}


def _evaluate(lm: LMEvalModel, loaded: TaskDict, limit: int | None, seed: int) -> dict:
    """As lm-eval's `simple_evaluate`, which would also run programs that write to the terminal."""
    set_seed(seed)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed)
    try:
        return evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=BOOTSTRAP_SAMPLES, log_samples=False)
    except OverflowError as error:
        raise TaskError("A perplexity is too large for a number: the model predicts next to nothing.") from error


def _list_scores(results: dict, loaded: TaskDict) -> list[TaskScore]:
    """Groups first."""
    groups = loaded["groups"]
    names = sorted(results["results"], key=lambda name: name not in groups)
    return [
        score
        for name in names
        for score in _scores_of(name, results, groups[name].get_all_tasks() if name in groups else [])
    ]


def _scores_of(name: str, results: dict, parts: list[Task]) -> list[TaskScore]:
    """All that lm-eval calls `metric,filter`, of a task or of a group that has parts."""
    figures, scores = results["results"][name], []
    leaves = [task.task_name for task in parts] or [name]
    for key, value in figures.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr"):
            continue
        error = figures[f"{metric}_stderr,{filter_name}"]
        scores.append(
            TaskScore(
                task=name,
                task_version=str(results["versions"][name]),
                metric=metric if filter_name == "none" else key,
                value=value,
                standard_error=None if error == "N/A" else error,
                samples=figures["sample_len"],
                higher_is_better=_common(results["higher_is_better"][leaf].get(metric) for leaf in leaves),
                few_shot=_common(results["n-shot"][leaf] for leaf in leaves),
            )
        )
    return scores


def _common(values: Iterable):
    """The value that all have, or `None`."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def _describe_data(tasks: list[Task]) -> str:
    """Where the samples come from, with a hash of all that the tasks hold, whatever the limit."""
    digest = hashlib.sha256()
    for task in sorted(tasks, key=lambda task: task.task_name):
        digest.update(json.dumps([task.task_name, task.eval_docs[:]], sort_keys=True, default=str).encode())
    local = _local_names()
    sources = sorted({_source_of(task, task.task_name in local) for task in tasks})
    named = ", ".join(sources) if len(sources) <= NAMED_SOURCES else f"{len(sources)} files, {sources[0]} and others"
    return f"{named} sha256:{digest.hexdigest()[:16]}"


def _source_of(task: Task, is_local: bool) -> str:
    if is_local:
        return task.eval_docs.info.description
    return "/".join(part for part in (task.DATASET_PATH, task.DATASET_NAME) if part)
