"""What numbers depend on, in words, and where two of them do not depend on the same."""

from collections import Counter
from collections.abc import Iterable

from entropy_gpt.evaluation.measuring.perplexity import Windows
from entropy_gpt.evaluation.measuring.scores import TaskResult, TaskScore
from entropy_gpt.evaluation.origin import Origin

from .results import AnswerCheck, Conditions, ModelResult, PrivateCost


# The number of a commit's letters that distinguish it from any other.
SHORT_COMMIT = 12
# What a number depends on: the name of each condition, and its value in words.
Facts = dict[str, str]


def list_settings(settings: dict) -> str:
    """Names and values in one line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def describe_windows(windows: Windows) -> str:
    """What a model saw at once, in words."""
    overlap = (
        " without overlap" if windows.stride == windows.context else f", {windows.stride:,} tokens further each time"
    )
    begin = "after a beginning-of-text token" if windows.bos else "without a beginning-of-text token"
    return f"windows of {windows.context:,} tokens{overlap}, documents {_order(windows)}, {begin}"


def describe_origin(measured: Origin) -> str:
    """What computed a number: packages, commit of this project, and machine."""
    return f"{list_settings(measured.versions)}; commit {_short_commit(measured.git_revision)}; {measured.machine}"


def describe_origins(measured: Iterable[Origin]) -> str:
    """What computed many numbers: each machine and its packages, with the commits."""
    commits: dict[tuple[str, str], dict[str, None]] = {}
    for each in measured:
        found = commits.setdefault((list_settings(each.versions), each.machine), {})
        found[_short_commit(each.git_revision)] = None
    return "; or ".join(
        f"{versions}; commit {' or '.join(found)}; {machine}" for (versions, machine), found in commits.items()
    )


def describe_check(check: AnswerCheck) -> str:
    """How a private answer compares with the clear."""
    error = (
        ""
        if check.largest_error is None
        else f"; logits differ by {check.largest_error:.4f} at most, of up to {check.largest_logit:.1f}"
    )
    return f"{check.same} of {check.answers} tokens are the same{error}"


def text_facts(result: ModelResult) -> Facts:
    """What bits per byte and perplexity per word depend on: whatever the tokenizer, it is the same text."""
    likelihood, conditions = result.likelihood.likelihood, result.likelihood.conditions
    windows = likelihood.windows
    return {
        **_text(conditions),
        "context": f"{windows.context:,} tokens",
        "stride": f"{windows.stride:,} tokens",
        "documents": _order(windows),
        "beginning-of-text token": "yes" if windows.bos else "no",
        "predicted text": f"{likelihood.words:,} words, {likelihood.bytes:,} bytes",
        "type of numbers": conditions.dtype,
    }


def token_facts(result: ModelResult) -> Facts:
    """What perplexity per token depends on: the tokenizer too."""
    return {
        **text_facts(result),
        "vocabulary": f"{result.likelihood.conditions.vocab_size:,} tokens",
        "predicted tokens": f"{result.likelihood.likelihood.tokens:,}",
    }


def frequency_facts(result: ModelResult) -> Facts:
    """What perplexity by the frequency of tokens depends on: the text that they are counted in too."""
    return {
        **token_facts(result),
        "tokens counted in": result.likelihood.likelihood.frequency_text or "an unnamed text",
    }


def head_facts(result: ModelResult) -> Facts:
    """What the numbers of attention heads depend on."""
    conditions = result.heads.conditions
    return {
        **_text(conditions),
        "vocabulary": f"{conditions.vocab_size:,} tokens",
        "context": f"{conditions.context:,} tokens",
        "rows of each head": f"{result.heads.heads.rows:,}",
        "type of numbers": conditions.dtype,
    }


def diversity_facts(result: ModelResult) -> Facts:
    """What the diversity of heads depends on: it may be taken from fewer rows."""
    return {**head_facts(result), "rows for the diversity": f"{result.heads.heads.diversity_rows:,}"}


def operation_facts(result: ModelResult) -> Facts:
    """What numbers of operations depend on."""
    return {"sequence": f"{result.operations.context:,} tokens"}


def traffic_facts(cost: PrivateCost) -> Facts:
    """What bytes and rounds of private inference depend on."""
    return {
        "protocol": cost.protocol,
        "prompt": f"{cost.context:,} tokens",
        "answer": f"{cost.answers:,} token" + "s" * (cost.answers != 1),
        "versions": list_settings(cost.versions) or "unknown",
    }


def duration_facts(cost: PrivateCost) -> Facts:
    """What seconds of private inference depend on."""
    return {**traffic_facts(cost), "network": cost.network, "machine": cost.machine}


def task_facts(score: TaskScore, tasks: TaskResult) -> Facts:
    """What a score of a task depends on."""
    return {
        "version of the task": score.task_version,
        "examples shown": f"{score.few_shot:,}",
        "samples": f"{score.samples:,}",
        **harness_facts(tasks),
    }


def harness_facts(tasks: TaskResult) -> Facts:
    """What all scores of a model depend on."""
    return {
        "samples of a task": "all" if tasks.limit is None else f"at most {tasks.limit:,}",
        "context": f"{tasks.context:,} tokens",
        "beginning-of-text token": tasks.bos,
        "data": tasks.data,
        "type of numbers": tasks.dtype,
        "lm-eval": tasks.versions.get("lm_eval", "of unknown version"),
    }


def common_facts(all_facts: Iterable[Facts]) -> Facts:
    """What most numbers depend on; where there are as many of two kinds, the kind that comes first."""
    counts = Counter(tuple(facts.items()) for facts in all_facts)
    return dict(max(counts, key=counts.get))


def list_facts(facts: Facts) -> str:
    """Conditions in one line."""
    return "; ".join(f"{name}: {value}" for name, value in facts.items())


def describe_difference(facts: Facts, reference: Facts) -> str:
    """In which conditions a number differs from others; nothing if in none."""
    return "; ".join(
        f"{name}: {value}, not {reference[name]}" for name, value in facts.items() if value != reference[name]
    )


def _short_commit(revision: str | None) -> str:
    commit, changes, _ = (revision or "unknown").partition("+changes")
    return f"{commit[:SHORT_COMMIT]}{changes}"


def _text(conditions: Conditions) -> Facts:
    return {"text": conditions.corpus, "revision": conditions.corpus_revision}


def _order(windows: Windows) -> str:
    return "each alone" if windows.separate else "one after the other with end-of-text between them"
