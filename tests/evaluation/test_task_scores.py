"""Scores of lm-eval: against ones computed by hand, their conditions, and what is refused."""

import logging
import math
import statistics

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_gpt.conversion.gpt2_checkpoint import load_gpt2
from entropy_gpt.evaluation.measuring.scores import TaskResult
from entropy_gpt.evaluation.measuring.task_scores import LOCAL_TASKS, TaskError, check_tasks, local_tasks, score_tasks
from entropy_gpt.evaluation.origin import hash_weights

from .task_files import (
    PARADIGMS,
    make_model_with,
    make_pairs,
    make_passages,
    make_questions,
    make_tokenizer,
    write_lines,
)


NOTATIONS = ("SM+LN+G", "EReg(SM(t)+ScFuFFN)")


@pytest.fixture(scope="module")
def all_scores(tokenizer, task_data):
    torch.manual_seed(0)
    model = make_model_with(tokenizer)
    seen = []
    result = score_tasks(
        model, tokenizer, list(LOCAL_TASKS), task_data, on_requests=lambda *counts: seen.append(counts)
    )
    return model, result, seen


def values_of(result: TaskResult) -> dict[tuple[str, str], float]:
    return {(score.task, score.metric): score.value for score in result.scores}


def log_probability(model, context_ids: list[int], continuation_ids: list[int]) -> tuple[float, bool]:
    """Of the continuation, and whether it is what the model would say: token by token."""
    total, is_greedy = 0.0, True
    for end, token in enumerate(continuation_ids):
        with torch.no_grad():
            logits = model(torch.tensor([context_ids + continuation_ids[:end]])).logits[0, -1].double()
        total += (logits[token] - logits.logsumexp(-1)).item()
        is_greedy &= logits.argmax().item() == token
    return total, is_greedy


def continue_text(model, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    context_ids, whole_ids = tokenizer.encode(context), tokenizer.encode(context + continuation)
    return log_probability(model, context_ids, whole_ids[len(context_ids) :])


def best(values: list[float]) -> int:
    return values.index(max(values))


@pytest.mark.parametrize("notation", NOTATIONS)
def test_accuracy_on_minimal_pairs_is_as_by_hand(notation, tokenizer, tmp_path):
    model, pairs = make_model_with(tokenizer, notation), make_pairs(40)
    write_lines(tmp_path / "causative.jsonl", pairs)

    def log_probability_of(sentence: str) -> float:
        return log_probability(model, [tokenizer.bos_token_id], tokenizer.encode(f" {sentence}"))[0]

    right = [log_probability_of(pair["sentence_good"]) > log_probability_of(pair["sentence_bad"]) for pair in pairs]
    result = score_tasks(model, tokenizer, ["local_blimp_causative"], tmp_path)
    (score,) = result.scores
    assert 0.2 < score.value < 0.8
    assert score.value == statistics.mean(right)
    assert math.isclose(score.standard_error, statistics.stdev(right) / math.sqrt(len(right)))
    assert (score.metric, score.samples, score.higher_is_better, score.few_shot) == ("acc", 40, True, 0)
    assert result.bos == "no token before a context; <|endoftext|> (0) where there is no context"


def test_normalised_accuracy_is_as_by_hand(tokenizer, tmp_path):
    model, questions = make_model_with(tokenizer), make_questions(40, query="Cooking: {}", gold="label")
    write_lines(tmp_path / "hellaswag.jsonl", questions)
    right, right_by_length = [], []
    for question in questions:
        texts = question["choices"]
        values = [continue_text(model, tokenizer, question["query"], f" {text}")[0] for text in texts]
        right.append(best(values) == question["label"])
        right_by_length.append(
            best([value / len(text) for value, text in zip(values, texts, strict=True)]) == question["label"]
        )
    values = values_of(score_tasks(model, tokenizer, ["local_hellaswag"], tmp_path))
    assert right != right_by_length
    assert values == {
        ("local_hellaswag", "acc"): statistics.mean(right),
        ("local_hellaswag", "acc_norm"): statistics.mean(right_by_length),
    }


def test_perplexity_of_last_words_is_as_by_hand(tokenizer, tmp_path):
    model, passages = make_model_with(tokenizer), make_passages(20)
    for passage in passages[:5]:  # some that the model gets right
        ids = torch.tensor([tokenizer.encode(passage["context"])])
        with torch.no_grad():
            passage["continuation"] = tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() or "?"
    write_lines(tmp_path / "lambada_openai.jsonl", passages)
    answers = [continue_text(model, tokenizer, one["context"], f" {one['continuation']}") for one in passages]
    result = score_tasks(model, tokenizer, ["local_lambada_openai"], tmp_path)
    scores = {score.metric: score for score in result.scores}
    assert math.isclose(
        scores["perplexity"].value, math.exp(-statistics.mean(value for value, _ in answers)), rel_tol=1e-4
    )
    assert scores["acc"].value == statistics.mean(is_greedy for _, is_greedy in answers)
    assert not scores["perplexity"].higher_is_better
    assert scores["perplexity"].standard_error > 0


def test_batch_size_changes_no_score(all_scores, tokenizer, task_data):
    model, result, _ = all_scores
    values = values_of(score_tasks(model, tokenizer, list(LOCAL_TASKS), task_data, batch_size=3))
    assert values == pytest.approx(values_of(result), rel=1e-5)


def test_converted_gpt2_scores_as_the_original(tokenizer, task_data, tmp_path):
    original = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2))
    original.save_pretrained(tmp_path)
    tasks = ["local_lambada_openai", "local_arc_easy"]
    results = [score_tasks(model, tokenizer, tasks, task_data) for model in (original, load_gpt2(str(tmp_path)))]
    assert values_of(results[0]) == pytest.approx(values_of(results[1]), rel=1e-5)


def test_group_is_the_mean_of_its_parts(all_scores):
    _, result, _ = all_scores
    assert result.scores[0].task == "local_blimp"
    parts = [score for score in result.scores if score.task.startswith("local_blimp_")]
    assert [score.task for score in parts] == [f"local_blimp_{paradigm}" for paradigm in PARADIGMS]
    assert math.isclose(result.scores[0].value, statistics.mean(score.value for score in parts))
    assert result.scores[0].samples == sum(score.samples for score in parts) == 2 * 67
    assert result.scores[0].standard_error > 0


def test_conditions_are_recorded(all_scores):
    _, result, _ = all_scores
    assert result.context == 64
    assert result.limit is None
    assert result.seed == 0
    assert result.dtype == "float32"
    assert result.versions["lm_eval"]
    assert result.data.startswith(
        "arc_easy.jsonl.gz, below/BLiMP.zip, hellaswag_val.jsonl.bz2, lambada_openai.jsonl sha256:"
    )
    assert {score.task_version for score in result.scores} == {"1.0"}
    assert result.seconds > 0


def test_hash_of_data_is_of_the_samples(tokenizer, tmp_path):
    model, folders = make_model_with(tokenizer), [tmp_path / name for name in ("plain", "packed", "other")]
    write_lines(folders[0] / "arc_easy.jsonl", make_questions(5))
    write_lines(folders[1] / "arc_easy.jsonl.bz2", make_questions(5))
    write_lines(folders[2] / "arc_easy.jsonl", make_questions(5, seed=9))
    data = [score_tasks(model, tokenizer, ["local_arc_easy"], folder, limit=1).data for folder in folders]
    hashes = [text.partition("sha256:")[2] for text in data]
    assert hashes[0] == hashes[1] != hashes[2]


def test_limit_takes_the_first_samples(tokenizer, tmp_path):
    model, passages = make_model_with(tokenizer), make_passages(9)
    write_lines(tmp_path / "all" / "lambada_openai.jsonl", passages)
    write_lines(tmp_path / "four" / "lambada_openai.jsonl", passages[:4])
    limited = score_tasks(model, tokenizer, ["local_lambada_openai"], tmp_path / "all", limit=4)
    assert limited.limit == 4
    assert [score.samples for score in limited.scores] == [4, 4]
    assert values_of(limited) == values_of(
        score_tasks(model, tokenizer, ["local_lambada_openai"], tmp_path / "four", limit=None)
    )


def test_progress_counts_every_request(all_scores):
    _, _, seen = all_scores
    total = 2 * 2 * 67 + 8 + 4 * 12 + 3 * 6
    assert seen == [(answered, total) for answered in range(1, total + 1)]


def test_nothing_reaches_the_terminal(tokenizer, task_data, capfd):
    score_tasks(make_model_with(tokenizer), tokenizer, ["local_lambada_openai", "local_arc_easy"], task_data, limit=3)
    assert capfd.readouterr() == ("", "")


def test_progress_can_write_to_the_terminal(tokenizer, task_data, capsys):
    model = make_model_with(tokenizer)
    score_tasks(model, tokenizer, ["local_arc_easy"], task_data, limit=1, on_requests=lambda *counts: print(*counts))
    assert capsys.readouterr().out == "1 3\n2 3\n3 3\n"


def test_model_and_tokenizer_stay_as_they_are(task_data):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    model = make_model_with(tokenizer).train()
    weights, level = hash_weights(model), logging.getLogger("lm_eval").level
    score_tasks(model, tokenizer, ["local_arc_easy"], task_data, limit=2)
    assert model.training
    assert hash_weights(model) == weights
    assert tokenizer.pad_token is None
    assert logging.getLogger("lm_eval").level == level


def test_bos_token_of_the_tokenizer_is_declared(task_data):
    tokenizer = make_tokenizer()
    put_around(tokenizer, "<|endoftext|> $A")
    result = score_tasks(make_model_with(tokenizer), tokenizer, ["local_arc_easy"], task_data, limit=1)
    assert result.bos == (
        "<|endoftext|> (0) before every context, by the tokenizer's rule; <|endoftext|> (0) where there is no context"
    )


def put_around(tokenizer, template: str):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )


def test_unsuitable_tokenizers_are_refused(task_data):
    tokenizer = make_tokenizer()
    model = make_model_with(tokenizer, vocab_size=len(tokenizer) - 1)
    with pytest.raises(TaskError, match=r"makes a token \d+, and the model knows 0 to \d+"):
        score_tasks(model, tokenizer, ["local_arc_easy"], task_data)
    put_around(tokenizer, "$A <|endoftext|>")
    with pytest.raises(TaskError, match=r"puts <\|endoftext\|> \(0\) after every text"):
        score_tasks(model, tokenizer, ["local_arc_easy"], task_data)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(TaskError, match="set its bos_token"):
        score_tasks(model, tokenizer, ["local_arc_easy"], task_data)


def test_answers_that_are_not_finite_are_refused(tokenizer, task_data):
    model = make_model_with(tokenizer)
    with torch.no_grad():
        model.transformer.wpe.weight[3] = math.nan
    with pytest.raises(TaskError, match="log-probability of nan"):
        score_tasks(model, tokenizer, ["local_blimp_causative"], task_data)


def test_perplexity_beyond_numbers_is_refused(tokenizer, task_data):
    model = make_model_with(tokenizer)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1e4)
    with pytest.raises(TaskError, match="too large for a number"):
        score_tasks(model, tokenizer, ["local_lambada_openai"], task_data)


def test_requests_longer_than_the_model_sees(tokenizer, tmp_path, caplog):
    passages = [{"context": "the dog sees " * 9, "continuation": "tree"}, {"context": "the", "continuation": "cat"}]
    write_lines(tmp_path / "lambada_openai.jsonl", passages)
    result = score_tasks(make_model_with(tokenizer, n_positions=16), tokenizer, ["local_lambada_openai"], tmp_path)
    assert result.context == 16
    assert "longer than the 16 tokens that the model sees, whose beginnings were left out: 1 of 2." in caplog.text
    with pytest.raises(TaskError, match="the model sees 1: this task needs one with more positions"):
        score_tasks(make_model_with(tokenizer, n_positions=1), tokenizer, ["local_lambada_openai"], tmp_path)


@pytest.mark.parametrize("name", ["limit", "batch_size"])
def test_counts_below_one_are_refused(name, tokenizer, task_data):
    with pytest.raises(TaskError, match=f"{name} is 0: allowed are 1 and more"):
        score_tasks(make_model_with(tokenizer), tokenizer, ["local_arc_easy"], task_data, **{name: 0})


def test_task_alone_and_in_its_group_is_refused(task_data):
    with pytest.raises(TaskError, match="found in both 'local_blimp' and 'local_blimp_causative': leave one out"):
        check_tasks(["local_blimp", "local_blimp_causative"], task_data)


def test_tasks_are_checked_before_the_work(tokenizer, task_data):
    check_tasks([], None)
    check_tasks(list(local_tasks()), task_data)
    with pytest.raises(TaskError, match=r"local_arc_easy: .*--task-data FOLDER"):
        check_tasks(["local_arc_easy"], None)
    with pytest.raises(TaskError, match="No task is named"):
        score_tasks(make_model_with(tokenizer), tokenizer, [], task_data)


@pytest.mark.slow
def test_unknown_names_and_data_that_is_out_of_reach(monkeypatch):
    """In one test, since to read the names of all tasks takes seconds."""
    with pytest.raises(TaskError, match=r"'local_lambda_openai' is no task.*Near it are local_lambada_openai.*"):
        check_tasks(["local_lambda_openai"], None)

    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nand so on")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(TaskError, match=r"^arc_easy can't be loaded \(Couldn't reach the Hub\)\. [^\n]*Hub; [^\n]*$"):
        check_tasks(["arc_easy"], None)
