"""From what the arguments name to blocks of tokens: every kind of data set, the cache, and what is refused."""

import gzip
import itertools
import json
import multiprocessing
import shutil
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

from entropy_gpt.training import preparation
from entropy_gpt.training.arguments import DataArguments
from entropy_gpt.training.corpus import load_corpus
from entropy_gpt.training.errors import CorpusError
from entropy_gpt.training.packing import pack
from entropy_gpt.training.preparation import prepare_data
from entropy_gpt.training.sources import open_source
from entropy_gpt.training.streaming import PackedStream
from entropy_gpt.training.tokenizer import train_tokenizer
from tests.slow import slow_but, slow_cases


CONTEXT = 16
# The shortest vocabulary, of which a text shows what it is.
SMALL = {"tokenizer_vocab_size": 257}
STREAMED = {"streaming": True, "validation_tokens": 4 * CONTEXT}
# Blank ones are skipped.
TEXTS = [f"document {index} of many, {'very ' * (index % 5)}short\n" for index in range(200)] + ["", " \n", None]
FORMATS = ("jsonl", "json", "json.gz", "csv", "parquet", "saved", "folder of jsonl", "folder of parquet")


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    """Neither the user's caches nor the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write_rows(folder: Path, kind: str, texts=TEXTS, name: str = "data") -> str:
    """A data set of texts as one of the formats; the path to it."""
    rows = Dataset.from_dict({"number": range(len(texts)), "text": texts})
    if kind.startswith("folder of "):
        half = len(texts) // 2
        write_rows(folder / kind, kind.removeprefix("folder of "), texts[:half], "part-0")
        write_rows(folder / kind, kind.removeprefix("folder of "), texts[half:], "part-1")
        (folder / kind / "README.md").write_text("# About the data\n")
        return str(folder / kind)
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.{kind}"
    if kind == "saved":
        rows.save_to_disk(path)
    elif kind == "csv":
        rows.to_csv(path)
    elif kind == "parquet":
        rows.to_parquet(path)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(lines.encode()) if kind.endswith(".gz") else lines.encode())
    return str(path)


def prepare(dataset, context=CONTEXT, seed=0, **arguments):
    return prepare_data(DataArguments(dataset=str(dataset), **{**SMALL, **arguments}), context, seed)


def read(blocks, tokenizer) -> list[str]:
    """The documents that blocks hold, but for one that is cut at the end."""
    joined = "".join(tokenizer.decode(block["input_ids"]) for block in blocks)
    return joined.split(tokenizer.eos_token)[:-1]


def documents_of(dataset, **arguments):
    source = open_source(DataArguments(dataset=str(dataset), **arguments))
    return sorted(source.training), sorted(source.validation)


@pytest.mark.parametrize("kind", slow_but(("json.gz", "csv", "folder of parquet"), FORMATS))
def test_every_format_holds_the_same_documents(kind, tmp_path):
    dataset = write_rows(tmp_path, kind)
    training, validation = documents_of(dataset)
    assert sorted(training + validation) == sorted(TEXTS[:-3])
    assert 3 <= len(validation) <= 25
    assert documents_of(dataset, **STREAMED) == (training, validation)
    assert (training, validation) == documents_of(write_rows(tmp_path, "jsonl", TEXTS[::-1], "reversed"))


def test_what_is_prepared_is_what_packing_makes_of_the_documents(tmp_path):
    data = prepare(write_rows(tmp_path, "jsonl"))
    source = open_source(DataArguments(dataset=str(tmp_path / "data.jsonl")))
    for blocks, texts in ((data.training, source.training), (data.validation, source.validation)):
        expected = pack(texts, data.tokenizer, CONTEXT)
        assert [block["input_ids"].tolist() for block in blocks] == expected["input_ids"][:]
    assert (data.name, data.context) == ("data.jsonl", CONTEXT)
    assert data.training_documents + data.validation_documents == len(TEXTS) - 3
    assert data.training_tokens == CONTEXT * len(data.training)
    assert data.validation_tokens == CONTEXT * len(data.validation)
    assert data.revision.startswith("sha256:")
    assert prepare(write_rows(tmp_path, "parquet")).revision == data.revision


def test_text_files_are_split_as_corpora_are(text_folder):
    corpus = load_corpus(text_folder)
    data = prepare(text_folder)
    for blocks, documents in ((data.training, corpus.training), (data.validation, corpus.validation)):
        expected = pack([document.text for document in documents], data.tokenizer, CONTEXT)
        assert [block["input_ids"].tolist() for block in blocks] == expected["input_ids"][:]
    assert (data.name, data.revision) == (corpus.name, corpus.revision)
    assert (data.training_documents, data.validation_documents) == (len(corpus.training), len(corpus.validation))
    assert documents_of(text_folder, **STREAMED) == documents_of(text_folder)


@pytest.mark.slow
def test_the_standard_library_is_streamed(monkeypatch):
    monkeypatch.setattr(preparation, "TOKENIZER_CHARACTERS", 10_000)
    data = prepare("python-stdlib", context=128, streaming=True, validation_tokens=1024)
    assert data.name == "Python standard library"
    assert len(data.validation) == 8
    assert len(next(iter(data.training))["input_ids"]) == 128


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(20):
        (folder / f"{index}.py").write_text(f"x = {index}\n" * (index + 1))
    (folder / "settings.json").write_text("{}")
    return folder


def test_a_stream_holds_the_same_documents(tmp_path):
    dataset = write_rows(tmp_path, "folder of jsonl")
    data, stream = prepare(dataset), prepare(dataset, shuffle_buffer=20, **STREAMED)
    assert isinstance(stream.training, PackedStream)
    assert (stream.training_tokens, stream.training_documents) == (None, None)
    assert stream.tokenizer.backend_tokenizer.to_str() == data.tokenizer.backend_tokenizer.to_str()
    assert stream.validation[:]["input_ids"].tolist() == data.validation[:4]["input_ids"].tolist()
    stream.training.passes = 1
    streamed, kept = (read(blocks, data.tokenizer) for blocks in (stream.training, data.training))
    assert streamed != kept
    assert len({*streamed} & {*kept}) >= len(kept) - 1


def test_streams_of_another_seed_have_another_order(tmp_path):
    dataset = write_rows(tmp_path, "jsonl")
    streams = (prepare(dataset, seed=seed, **STREAMED).training for seed in (1, 1, 2))
    first, again, other = (
        [block["input_ids"].tolist() for block in itertools.islice(stream, 9)] for stream in streams
    )
    assert first == again != other


def test_validation_tokens_are_spread_over_all(tmp_path):
    dataset = write_rows(tmp_path, "jsonl")
    whole = prepare(dataset, validation_share=0.5).validation
    few = prepare(dataset, validation_share=0.5, validation_tokens=5 * CONTEXT + 3).validation
    expected = [whole[index * len(whole) // 5]["input_ids"].tolist() for index in range(5)]
    assert few[:]["input_ids"].tolist() == expected


@pytest.mark.parametrize("streamed", [{}, STREAMED], ids=["kept", "streamed"])
def test_another_split_or_data_set_is_evaluated_on(streamed, tmp_path):
    rows = {name: Dataset.from_dict({"text": TEXTS[begin:][:60]}) for name, begin in (("train", 0), ("dev", 60))}
    DatasetDict(rows).save_to_disk(tmp_path / "both")
    expected = sorted(TEXTS[:60]), sorted(TEXTS[60:120])
    assert documents_of(tmp_path / "both", validation_split="dev", **streamed) == expected
    training, validation = (
        write_rows(tmp_path, kind, texts) for kind, texts in (("jsonl", TEXTS[:60]), ("csv", TEXTS[60:120]))
    )
    data = prepare(training, validation_dataset=validation, **streamed)
    assert documents_of(training, validation_dataset=validation, validation_split="train", **streamed) == expected
    assert data.name == "data.jsonl, evaluated on data.csv"
    (tmp_path / "note.txt").write_text("A text.\n" * 20)
    expected = expected[0], ["A text.\n" * 20]
    assert documents_of(training, validation_dataset=str(tmp_path / "note.txt"), **streamed) == expected


def test_splits_of_a_folder_are_told_by_its_names(tmp_path):
    for name, texts in (("train", TEXTS[:100]), ("validation", TEXTS[100:])):
        write_rows(tmp_path / "rows", "jsonl", texts, name)
    training, validation = documents_of(tmp_path / "rows", validation_split="validation")
    assert (training, validation) == (sorted(TEXTS[:100]), sorted(TEXTS[100:-3]))
    assert sorted(itertools.chain(*documents_of(tmp_path / "rows"))) == training


def test_a_given_tokenizer_is_used(tmp_path):
    tokenizer = train_tokenizer(TEXTS[:50], 300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    dataset = write_rows(tmp_path, "jsonl")
    place = str(tmp_path / "tokenizer")
    by_argument = prepare_data(DataArguments(dataset=dataset, tokenizer=place), CONTEXT, 0)
    by_default = prepare_data(DataArguments(dataset=dataset), CONTEXT, 0, default_tokenizer=place)
    for data in (by_argument, by_default):
        assert data.tokenizer.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert by_argument.training.cache_files == by_default.training.cache_files


def test_a_folder_without_tokenizer_is_named(tmp_path):
    arguments = DataArguments(dataset=write_rows(tmp_path, "jsonl"), tokenizer=str(tmp_path))
    with pytest.raises(CorpusError, match=f"{tmp_path} has no tokenizer"):
        prepare_data(arguments, CONTEXT, 0)


def test_a_tokenizer_is_trained_on_the_first_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "TOKENIZER_CHARACTERS", 100)
    dataset = write_rows(tmp_path, "jsonl", [f"only the {word} " * 9 for word in ("first", "second")] * 40)
    data = prepare(dataset, tokenizer_vocab_size=300, validation_dataset=write_rows(tmp_path, "csv"))
    assert "first" in "".join(data.tokenizer.get_vocab())
    assert "second" not in "".join(data.tokenizer.get_vocab())


@pytest.fixture
def counted(monkeypatch):
    """What was tokenised; in a cache that is found again, nothing."""
    calls = []

    def pack_and_count(*arguments):
        calls.append(arguments)
        return pack(*arguments)

    monkeypatch.setattr(preparation, "pack", pack_and_count)
    return calls


@pytest.mark.parametrize("kind", ["jsonl", "saved", "texts"])
def test_blocks_are_found_again(kind, counted, tmp_path, text_folder):
    dataset = text_folder if kind == "texts" else write_rows(tmp_path, kind)
    first, again = (prepare(dataset, data_cache=str(tmp_path / "kept")) for _ in range(2))
    assert len(counted) == 2  # training and validation
    assert again.training[:]["input_ids"].tolist() == first.training[:]["input_ids"].tolist()
    assert again.validation[:]["input_ids"].tolist() == first.validation[:]["input_ids"].tolist()
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert (again.revision, again.training_documents) == (first.revision, first.training_documents)
    prepare(dataset, data_cache=str(tmp_path / "kept"), validation_tokens=CONTEXT)
    assert len(counted) == 2
    assert not list((tmp_path / "kept").glob("_unfinished-*"))


@pytest.mark.parametrize(
    "change", [{"tokenizer_vocab_size": 258}, {"validation_share": 0.2}, {"context": 8}, {"text_column": "other"}, {}]
)
def test_what_changes_the_blocks_makes_new_ones(change, counted, tmp_path):
    dataset = tmp_path / "rows.jsonl"
    dataset.write_text("".join(json.dumps({"text": text, "other": text}) + "\n" for text in TEXTS))
    prepare(dataset)
    if not change:
        dataset.write_text("".join(json.dumps({"text": f"{text}!"}) + "\n" for text in TEXTS))
    prepare(dataset, **change)
    assert len(counted) == 4


@pytest.mark.parametrize("kind", ["folder of jsonl", "saved"])
def test_changed_rows_are_read_anew(kind, tmp_path):
    dataset = write_rows(tmp_path, kind)
    first = prepare(dataset)
    shutil.rmtree(dataset)
    write_rows(tmp_path, kind, [f"another {text}" for text in TEXTS])
    assert prepare(dataset).revision != first.revision


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("training.arrow", truncate),
        ("record.json", lambda path: path.write_text("[]")),
        ("tokenizer/tokenizer.json", Path.unlink),
        *slow_cases(
            ("validation.arrow", Path.unlink),
            ("record.json", truncate),
            ("record.json", Path.unlink),
            ("tokenizer/tokenizer.json", truncate),
        ),
    ],
)
def test_damaged_blocks_are_made_anew(name, damage, tmp_path, caplog):
    dataset = write_rows(tmp_path, "jsonl")
    expected = prepare(dataset).training[:]["input_ids"].tolist()
    (folder,) = (path for path in (tmp_path / "cache" / "entropy_gpt").iterdir() if path.is_dir())
    damage(folder / name)
    assert prepare(dataset).training[:]["input_ids"].tolist() == expected
    assert "is damaged and made anew" in caplog.text
    caplog.clear()
    prepare(dataset)
    assert "is damaged" not in caplog.text


def test_runs_at_the_same_time_share_the_blocks(tmp_path, text_folder):
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=prepare, args=(text_folder,), kwargs={"data_cache": str(tmp_path / "kept")})
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len([path for path in (tmp_path / "kept").iterdir() if path.is_dir()]) == 1


def test_who_watches_is_told_of_stages_and_documents(tmp_path):
    stages, counts = [], []
    arguments = DataArguments(dataset=write_rows(tmp_path, "jsonl"), **SMALL)
    prepare_data(arguments, CONTEXT, 0, on_stage=lambda *stage: stages.append(stage), on_documents=counts.append)
    assert stages == [("reading the text", None), ("training the tokenizer", None), ("tokenising", len(TEXTS))]
    assert sum(counts) == len(TEXTS) - 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 1}, "context of 1 .* at least 2"),
        ({"validation_share": 0.0}, "validation_share=0.0 has to be above 0 and at most 0.5"),
        ({"validation_share": 1.0}, "validation_share=1.0 has to be above 0 and at most 0.5"),
        ({"validation_share": float("nan")}, "validation_share=nan"),
        ({"shuffle_buffer": 0, **STREAMED}, "shuffle_buffer=0 has to be at least 1"),
        ({"tokenizer_vocab_size": 256}, "tokenizer_vocab_size=256 has to be at least 257"),
        ({"validation_tokens": CONTEXT - 1}, f"validation_tokens={CONTEXT - 1} has to be at least {CONTEXT}"),
        ({"streaming": True}, "needs validation_tokens"),
        ({"text_column": "body"}, r"has no column body, but number, text"),
        ({"text_column": "number"}, r"column number of .* holds no text, but int"),
        ({"dataset_split": "test"}, r"data\.jsonl \(split test\) can't be loaded: .*train"),
        ({"dataset_split": "test", **STREAMED}, r"data\.jsonl \(split test\) can't be loaded: .*train"),
        ({"validation_dataset": "elsewhere/nowhere.csv"}, r"There is no elsewhere/nowhere\.csv"),
        ({"validation_split": "train"}, "both trained and evaluated on"),
        ({"dataset_config": "en"}, "dataset_config=en does nothing"),
        ({"dataset_revision": "main"}, "dataset_revision=main does nothing"),
        ({"shuffle_buffer": 5}, "shuffle_buffer=5 does nothing"),
        ({"data_cache": "kept", **STREAMED}, "data_cache=kept does nothing"),
        ({"context": 10_000}, "one block takes 10000"),
        ({"context": 500}, "In the part kept for validation: .* one block takes 500"),
    ],
)
def test_bad_arguments_are_named(arguments, message, tmp_path):
    with pytest.raises(CorpusError, match=message):
        prepare(write_rows(tmp_path, "jsonl"), **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"dataset_split": "dev"}, {"text_column": "body"}, {"validation_split": "dev"}, {"dataset_revision": "main"}],
)
def test_arguments_for_rows_do_nothing_for_text_files(arguments, text_folder):
    ((name, value),) = arguments.items()
    with pytest.raises(CorpusError, match=f"{name}={value} does nothing"):
        prepare(text_folder, **arguments)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "nowhere.txt", "nowhere.json.gz", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(name):
    with pytest.raises(CorpusError, match=f"There is no {name}"):
        prepare(name)


@pytest.mark.parametrize("streamed", [{}, STREAMED], ids=["kept", "streamed"])
def test_a_hub_that_can_not_be_reached_is_told_of(streamed):
    with pytest.raises(CorpusError, match=r"someone/something \(split train\) can't be loaded: Couldn't reach"):
        prepare("someone/something", dataset_config="en", dataset_revision="main", **streamed)


@pytest.mark.parametrize("streamed", [{}, STREAMED], ids=["kept", "streamed"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"text": ""}\n{"text": null}\n', "is empty"),
        ('{"text": "good"}\n{broken\n', r"bad\.jsonl is damaged: line 2: "),
        ('{"text": "good"}\n["bad"]\n', r"bad\.jsonl is damaged: line 2: a row is a list"),
    ],
)
def test_bad_data_files_are_named(content, message, streamed, tmp_path):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(CorpusError, match=message):
        prepare(tmp_path / "bad.jsonl", **streamed)


def test_a_folder_of_two_kinds_is_named(tmp_path, text_folder):
    write_rows(text_folder, "csv")
    with pytest.raises(CorpusError, match=r"holds data files and text files, such as data\.csv and \d+\.py"):
        prepare(text_folder)


def test_what_a_run_leaves_in_its_own_folder_is_not_read(text_folder):
    expected = documents_of(text_folder)
    write_rows(text_folder / "run", "csv")
    (text_folder / "run" / "README.md").write_text("# A model\n")
    source = open_source(DataArguments(dataset=str(text_folder)), without=text_folder / "run")
    assert (sorted(source.training), sorted(source.validation)) == expected


def test_a_run_in_a_folder_of_data_files_does_not_read_its_own_log(tmp_path):
    folder = Path(write_rows(tmp_path, "folder of jsonl"))
    expected = documents_of(folder)
    write_rows(folder / "run", "jsonl", ["the log of a run"] * 9)
    source = open_source(DataArguments(dataset=str(folder)), without=folder / "run")
    assert (sorted(source.training), sorted(source.validation)) == expected


def test_a_row_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": null}\n' + '{"text": ["a", "b"]}\n' * 5)
    with pytest.raises(CorpusError, match=r"text is a list: give another text_column"):
        prepare(path)


def test_the_tokenizer_that_was_given_is_given_back(tmp_path):
    """Blocks are the same for tokenizers that differ in what does not tokenise."""
    path = write_rows(tmp_path, "jsonl")
    tokenizer = train_tokenizer(filter(None, TEXTS), 300)
    for name in ("first", "second"):
        tokenizer.chat_template = name
        tokenizer.save_pretrained(tmp_path / name)
        assert prepare_with(path, tmp_path / name).tokenizer.chat_template == name


def prepare_with(dataset, tokenizer):
    return prepare_data(DataArguments(dataset=str(dataset), tokenizer=str(tokenizer)), CONTEXT, 0)


def test_too_few_rows_for_validation_end_before_the_rest_is_tokenised(tmp_path):
    seen = []
    with pytest.raises(CorpusError, match=r"kept for validation: .*raise validation_share=0.01, or name a"):
        prepare_data(
            DataArguments(dataset=write_rows(tmp_path, "jsonl", ["a text " * 90] * 3), validation_share=0.01, **SMALL),
            CONTEXT,
            0,
            on_documents=seen.append,
        )
    assert sum(seen) == 0


def test_a_saved_data_set_without_the_split_is_named(tmp_path):
    DatasetDict({"dev": Dataset.from_dict({"text": TEXTS})}).save_to_disk(tmp_path / "rows")
    with pytest.raises(CorpusError, match=r"rows \(split train\) can't be loaded: it holds the splits dev"):
        prepare(tmp_path / "rows")


def test_a_cache_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match=r"can't be kept in .*file.*give data_cache"):
        prepare(write_rows(tmp_path, "jsonl"), data_cache=str(tmp_path / "file"))
