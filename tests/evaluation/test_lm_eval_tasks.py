"""Tasks of lm-eval for local data: what is read, as stock tasks would ask it; lm-eval's own command and processes."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from datasets import Dataset
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from entropy_gpt.evaluation.lm_eval_tasks import local_data
from entropy_gpt.evaluation.measuring.task_scores import LOCAL_TASKS, TASK_FOLDER, TaskError, check_tasks, score_tasks
from modeling_entropy_gpt import EntropyGPTForCausalLM
from tests.architectures import ARCHITECTURES
from tests.strangers import run_stranger
from tests.wheel import build_wheel

from . import lm_eval_of_strangers
from .task_files import (
    PARADIGMS,
    make_model_with,
    make_pairs,
    make_passages,
    make_questions,
    make_tokenizer,
    write_blimp,
    write_lines,
)


ROOT = Path(__file__).resolve().parents[2]
READERS = {
    "arc_easy": local_data.read_arc_easy,
    "hellaswag": local_data.read_hellaswag,
    "lambada_openai": local_data.read_lambada_openai,
}
# Samples as they were published, and the same as llm-foundry and others have converted them.
PUBLISHED = {
    "arc_easy": [
        {
            "id": "1",
            "question": "Which is a café?",
            "choices": {"text": ["the house", "a dog", "ice"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
        {"question": "What is 3?", "choices": {"text": ["one", "a number"], "label": ["1", "2"]}, "answerKey": "1"},
    ],
    "hellaswag": [
        {
            "ind": 24,
            "activity_label": "Roof shingle removal",
            "ctx_a": "A man is sitting on a roof.",
            "ctx_b": "he",
            "endings": ["wraps skis.", "rips tiles off.", "holds a cube.", "starts to sing."],
            "label": "3",
        },
        {
            "activity_label": "Home and Garden",
            "ctx_a": "[header] How to clean [title] Take a cloth. [step] It is soft.",
            "ctx_b": "",
            "endings": ["Wet it. [substeps] Not much.", "Burn  it. [title] Go."],
            "label": "0",
        },
    ],
    "lambada_openai": [{"text": "He said:\n\n“Where is the\ncat” and a dog"}, {"text": "the house is\n\nold"}],
}
CONVERTED = {
    "arc_easy": [
        {"query": "Question: Which is a café?", "choices": ["the house", "a dog", "ice"], "gold": 1},
        {"query": "Question: What is 3?", "choices": ["one", "a number"], "gold": 0},
    ],
    "hellaswag": [
        {
            "query": "Roof shingle removal: A man is sitting on a roof. he",
            "choices": ["wraps skis.", "rips tiles off.", "holds a cube.", "starts to sing."],
            "label": 3,
        },
        {
            "query": "Home and Garden: How to clean. Take a cloth. It is soft.",
            "choices": ["Wet it. Not much.", "Burn it.. Go."],
            "gold": 0,
        },
    ],
    "lambada_openai": [
        {"context": "He said:\n\n“Where is the\ncat” and a", "continuation": "dog"},
        {"context": "the house", "continuation": "is\n\nold"},
    ],
}


def samples_of(datasets: dict[str, Dataset]) -> list[dict]:
    return list(datasets["test"])


def requests_of(task) -> list[tuple[str, str]]:
    """The context and continuation of all that a model is asked."""
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
    return [request.args for request in task.instances]


def load_local(name: str, folder: Path):
    manager = TaskManager(include_path=TASK_FOLDER, include_defaults=False, metadata={"task_data": str(folder)})
    return manager.load([name])["tasks"][name]


def load_stock(name: str, place: str, split: str, records: list[dict]):
    """lm-eval's own task with other data."""
    folder = Path(lm_eval.tasks.__file__).parent / place
    manager = TaskManager(include_path=folder, include_defaults=False)
    part = {"task": name, "custom_dataset": lambda **metadata: {split: Dataset.from_list(records)}, "test_split": None}
    part.update(validation_split=split, training_split=None)
    return manager.load([{"group": "stock", "task": [part]}])["tasks"][name]


def test_names_are_those_of_the_files():
    manager = TaskManager(include_path=TASK_FOLDER, include_defaults=False)
    assert set(manager.all_tasks) == {path.stem for path in TASK_FOLDER.rglob("*.yaml")}
    assert len(PARADIGMS) == 67
    stock = TaskManager(include_path=Path(lm_eval.tasks.__file__).parent / "blimp", include_defaults=False)
    assert {name for name in manager.all_tasks if "blimp" in name} == {f"local_{name}" for name in stock.all_tasks}
    assert set(LOCAL_TASKS) == set(manager.all_tasks) - {f"local_blimp_{paradigm}" for paradigm in PARADIGMS}


@pytest.mark.parametrize(
    ("name", "place", "split"),
    [
        ("arc_easy", "arc", "test"),
        ("hellaswag", "hellaswag", "validation"),
        ("lambada_openai", "lambada", "test"),
    ],
)
def test_requests_and_scores_are_those_of_the_stock_task(name, place, split, tmp_path):
    write_lines(tmp_path / f"{name}.jsonl", PUBLISHED[name])
    local, stock = load_local(f"local_{name}", tmp_path), load_stock(name, place, split, PUBLISHED[name])
    assert requests_of(local) == requests_of(stock)
    answers = [(-1.0 * index, False) for index in range(5)]
    for ours, theirs in zip(local.eval_docs, stock.eval_docs, strict=True):
        count = len(ours.get("choices", [""]))
        assert local.process_results(ours, answers[:count]) == stock.process_results(theirs, answers[:count])
    assert local.aggregation() == stock.aggregation()
    assert local.higher_is_better() == stock.higher_is_better()


def test_requests_and_scores_of_minimal_pairs_are_those_of_the_stock_task(tmp_path):
    pairs = make_pairs(5)
    write_lines(tmp_path / "causative.jsonl", pairs)
    local = load_local("local_blimp_causative", tmp_path)
    stock = load_stock("blimp_causative", "blimp", "train", pairs)
    assert requests_of(local) == requests_of(stock)
    for answers in ([(-1.0, False), (-2.0, False)], [(-2.0, False), (-1.0, False)], [(-1.0, False), (-1.0, False)]):
        ours, theirs = (task.process_results(task.eval_docs[0], answers) for task in (local, stock))
        assert ours == theirs
    assert local.aggregation() == stock.aggregation()


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("ending", local_data.ENDINGS)
def test_converted_files_give_the_samples_of_the_published_ones(name, ending, tmp_path):
    write_lines(tmp_path / "published" / f"{name}.jsonl", PUBLISHED[name])
    write_lines(tmp_path / "converted" / "deep" / "below" / f"{name}{ending}", CONVERTED[name])
    published, converted = (samples_of(READERS[name](str(tmp_path / kind))) for kind in ("published", "converted"))
    assert published == converted


def test_arc_is_read_as_its_authors_publish_it(tmp_path):
    options = [{"text": "a dog", "label": "A"}, {"text": "ice", "label": "B"}]
    write_lines(
        tmp_path / "ARC-Easy-Test.jsonl", [{"question": {"stem": "Why?", "choices": options}, "answerKey": "B"}]
    )
    (sample,) = samples_of(local_data.read_arc_easy(str(tmp_path)))
    assert sample == {"context": "Question: Why?\nAnswer:", "choices": ["a dog", "ice"], "gold": 1}


def test_paradigms_are_read_from_the_archive_or_unpacked(tmp_path):
    (tmp_path / "packed").mkdir()
    write_blimp(tmp_path / "packed" / "BLiMP.zip")
    for seed, paradigm in enumerate(PARADIGMS[:2]):
        write_lines(tmp_path / "unpacked" / "data" / f"{paradigm}.jsonl", make_pairs(2, seed))
        packed, unpacked = (
            samples_of(local_data.read_blimp(paradigm, str(tmp_path / kind))) for kind in ("packed", "unpacked")
        )
        assert packed == unpacked


def test_line_separators_within_a_text_do_not_end_its_line(tmp_path):
    write_lines(tmp_path / "lambada_openai.jsonl", [{"text": "a dog\u2028sees\x85 the cat"}])
    (sample,) = samples_of(local_data.read_lambada_openai(str(tmp_path)))
    assert sample == {"context": "a dog\u2028sees\x85 the", "target": " cat"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"query": "Question: a", "choices": ["b"', "is no JSON: "),
        ('{"query": "a", "choices": ["b", "c"], "gold": 0}', "is no sample"),
        ('{"query": "Question: a", "choices": ["b", "c"], "gold": 2}', "is no sample"),
        ('{"query": "Question: a", "choices": ["b", ""], "gold": 0}', "is no sample"),
        ('{"query": "Question: a", "choices": ["b", 3], "gold": 0}', "is no sample"),
        ('{"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answerKey": "C"}', "is no sample"),
        ('{"question": {"stem": "a", "choices": ["b", "c"]}, "answerKey": "A"}', "is no sample"),
        ('["Question: a"]', "is no sample"),
    ],
)
def test_damaged_lines_are_named(line, reason, tmp_path):
    path = tmp_path / "arc_easy.jsonl"
    write_lines(path, make_questions(2))
    path.write_text(path.read_text(encoding="utf-8") + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(TaskError, match=f"local_arc_easy: .*arc_easy.jsonl, line 4 {reason}"):
        check_tasks(["local_arc_easy"], tmp_path)


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("hellaswag", {"query": "a", "choices": ["b", "c"]}),
        ("hellaswag", {"query": "a", "choices": ["b", "c"], "label": ""}),
        ("hellaswag", {"query": "a", "choices": ["b", None], "label": 0}),
        ("hellaswag", {"ctx": "a", "endings": ["b", "c"], "label": 0}),
        ("lambada_openai", {"text": "word"}),
        ("lambada_openai", {"text": "a word "}),
        ("lambada_openai", {"context": "a", "continuation": ""}),
    ],
)
def test_records_that_are_no_samples_are_refused(name, record, tmp_path):
    write_lines(tmp_path / f"{name}.jsonl", [record])
    with pytest.raises(ValueError, match="line 1 is no sample of this task"):
        READERS[name](str(tmp_path))


def test_damaged_line_in_an_archive_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "BLiMP.zip", "w") as archive:
        archive.writestr("data/causative.jsonl", '{"sentence_good": "a"}\n')
    with pytest.raises(ValueError, match=r"causative.jsonl in .*BLiMP.zip, line 1 is no sample"):
        local_data.read_blimp("causative", str(tmp_path))
    with pytest.raises(ValueError, match=r"BLiMP.zip has 0 files of the name passive_1.jsonl, where one is read"):
        local_data.read_blimp("passive_1", str(tmp_path))


@pytest.mark.parametrize("name", ["arc_easy.jsonl", "arc_easy.jsonl.bz2", "arc_easy.jsonl.gz"])
def test_damaged_files_are_named(name, tmp_path):
    path = tmp_path / name
    write_lines(path, make_questions(50))
    content = path.read_bytes()
    damaged = [content[: len(content) // 2] + b"\xff\xfe", b"\xff\xfe"] if name.endswith("jsonl") else [content[:-20]]
    for content in [*damaged, b"\xff" * 99]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} can't be read: "):
            local_data.read_arc_easy(str(tmp_path))
    path.write_bytes(b"\n" if name.endswith("jsonl") else b"")
    with pytest.raises(ValueError, match=f"{name} (holds no sample|can't be read)"):
        local_data.read_arc_easy(str(tmp_path))


def test_damaged_archive_is_named(tmp_path):
    (tmp_path / "BLiMP.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"BLiMP.zip can't be read: "):
        local_data.read_blimp("causative", str(tmp_path))


def test_missing_data_is_named(tmp_path):
    with pytest.raises(TaskError, match=r"nowhere is no folder"):
        check_tasks(["local_blimp"], tmp_path / "nowhere")
    with pytest.raises(TaskError, match=r"Neither .* has arc_easy.jsonl or ARC-Easy-Test.jsonl; .*\.bz2 or \.gz"):
        check_tasks(["local_arc_easy"], tmp_path)
    with pytest.raises(TaskError, match=r"Neither .* has adjunct_island.jsonl or BLiMP.zip"):
        check_tasks(["local_blimp"], tmp_path)


def test_one_of_several_files_is_not_taken(tmp_path):
    for place in ("arc_easy.jsonl", "more/arc_easy.jsonl.gz"):
        write_lines(tmp_path / place, make_questions(2))
    with pytest.raises(
        TaskError, match=r"several files that could be meant: arc_easy.jsonl, more/arc_easy.jsonl.gz\."
    ):
        check_tasks(["local_arc_easy"], tmp_path)


def test_neither_tasks_nor_data_depend_on_the_working_directory(tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    model = make_model_with(tokenizer)
    write_lines(tmp_path / "data" / "lambada_openai.jsonl", make_passages(3))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    absolute = score_tasks(model, tokenizer, ["local_lambada_openai"], tmp_path / "data")
    relative = score_tasks(model, tokenizer, ["local_lambada_openai"], Path("../data"))
    assert absolute.scores == relative.scores
    shutil.copytree(TASK_FOLDER, tmp_path / "copied", ignore=shutil.ignore_patterns("__pycache__"))
    metadata = {"task_data": str(tmp_path / "data")}
    manager = TaskManager(include_path=tmp_path / "copied", include_defaults=False, metadata=metadata)
    assert len(manager.load(["local_lambada_openai"])["tasks"]["local_lambada_openai"].eval_docs) == 3


@pytest.mark.slow
def test_wheel_holds_the_tasks(tmp_path):
    wheel = build_wheel(tmp_path)
    wanted = {
        f"entropy_gpt/{path.relative_to(ROOT).as_posix()}"
        for path in TASK_FOLDER.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    held = {name for name in names if name.startswith("entropy_gpt/evaluation/lm_eval_tasks/")}
    assert held == wanted
    assert len(wanted) > len(PARADIGMS)


def fresh_process(cache: Path) -> dict:
    """Where and how a process runs that knows nothing of this one."""
    offline = {"HF_MODULES_CACHE": str(cache), "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    return {"cwd": cache, "env": {**os.environ, **offline}, "capture_output": True, "text": True}


@pytest.mark.slow
def test_lm_eval_scores_all_architectures_without_this_project(tokenizer, task_data, tmp_path):
    """In one process, as it loads them by itself, beside this one's scores of the same models."""
    tasks = ["local_lambada_openai", "local_arc_easy", "local_blimp_causative"]
    folders = {str(tmp_path / str(index)): notation for index, notation in enumerate(ARCHITECTURES)}
    for folder, notation in folders.items():
        make_model_with(tokenizer, notation).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    words = [TASK_FOLDER, task_data, ",".join(tasks), *folders]
    environment = fresh_process(tmp_path)["env"]
    output = run_stranger(tmp_path, environment, lm_eval_of_strangers.__file__, *words)
    strangers = json.loads(output.splitlines()[-1])
    for folder, notation in folders.items():
        model = EntropyGPTForCausalLM.from_pretrained(folder)
        ours = score_tasks(model, AutoTokenizer.from_pretrained(folder), tasks, task_data)
        for score in ours.scores:
            theirs = strangers[folder][score.task][f"{score.metric},none"]
            assert score.value == pytest.approx(theirs, rel=1e-4), (notation, score.task, score.metric)
        assert len(ours.scores) == 5


@pytest.mark.slow
def test_lm_eval_command_scores_as_this_project(tokenizer, task_data, tmp_path):
    torch.manual_seed(0)
    model = make_model_with(tokenizer, "EReg(SM(t)+ScFuFFN)")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tasks = ["local_blimp", "local_lambada_openai", "local_hellaswag", "local_arc_easy"]
    options = {
        "model": "hf",
        "model_args": f"pretrained={tmp_path / 'model'},trust_remote_code=True",
        "device": "cpu",
        "tasks": ",".join(tasks),
        "include_path": TASK_FOLDER,
        "metadata": json.dumps({"task_data": str(task_data)}),
        "limit": "2",
        "output_path": tmp_path / "output",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    process = subprocess.run([sys.executable, "-m", "lm_eval", "run", *arguments], **fresh_process(tmp_path))
    assert process.returncode == 0, process.stderr
    (path,) = (tmp_path / "output").rglob("results_*.json")
    theirs = json.loads(path.read_text(encoding="utf-8"))["results"]
    ours = score_tasks(model, tokenizer, tasks, task_data, limit=2)
    assert len(ours.scores) == 1 + 67 + 2 + 2 + 2
    for score in ours.scores:
        assert score.value == pytest.approx(theirs[score.task][f"{score.metric},none"], rel=1e-5)
        if score.metric != "perplexity":  # bootstrapped there with more samples
            assert score.standard_error == pytest.approx(theirs[score.task][f"{score.metric}_stderr,none"])
