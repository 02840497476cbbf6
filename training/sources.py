"""Where documents come from: text files, data files, saved data sets, the Hub."""

import functools
import hashlib
import operator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, DatasetBuilder, DatasetDict, IterableDataset, load_dataset_builder, load_from_disk
from datasets.config import DATASET_STATE_JSON_FILENAME, DATASETDICT_JSON_FILENAME
from datasets.exceptions import DatasetsError

from .arguments import STANDARD_LIBRARY, DataArguments
from .corpus import TEXT_SUFFIXES, Corpus, Document, find_files, load_corpus, load_standard_library
from .errors import CorpusError
from .streaming import Texts


# The builder that reads files of a suffix.
BUILDERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSED = ".gz"
Rows = Dataset | IterableDataset
# Parts that workers can share among them, where the data set has none of its own.
PARTS = 64


@dataclass(frozen=True)
class Source:
    """
    Documents to train and evaluate on.

    Args:
        name (`str`): What the text is.
        version (`str`): A commit where the documents come from the Hub, else nothing.
        revision (`str`, *optional*): Identifies the text, if that is known without reading it again.
        fingerprint (`str`): Changes with the documents.
        training ([`Texts`]): Documents to train on.
        validation ([`Texts`]): Documents to evaluate on.
        documents (`int`, *optional*): Number of all, empty ones included, where it is known.
    """

    name: str
    version: str
    revision: str | None
    fingerprint: str
    training: Texts
    validation: Texts
    documents: int | None


def open_source(arguments: DataArguments, without: Path | None = None) -> Source:
    """
    Opens what the arguments name. Of text files nothing is held but their names; data files and the Hub are read by
    `datasets`, and nothing is downloaded beforehand when streaming.

    Where no other documents are named for validation, some are kept apart: of text files as
    [`~training.corpus.load_corpus`] does, of rows those whose hash falls into the share, whatever their order, and
    the same whether they are streamed or not.

    Args:
        arguments ([`DataArguments`]): What to read.
        without (`Path`, *optional*): A folder that is not read, such as one inside that is being written to.

    Raises:
        `CorpusError`: If it can't be read, has no such split, column or text, or an argument does nothing.
    """
    _refuse_idle(arguments, without)
    if arguments.validation_dataset is None and arguments.validation_split is None:
        return _open(arguments, arguments.dataset, arguments.dataset_split, arguments.validation_share, without)
    other = arguments.validation_dataset or arguments.dataset
    split = arguments.validation_split or arguments.dataset_split
    if (other, split) == (arguments.dataset, arguments.dataset_split):
        raise CorpusError(f"{other} is both trained and evaluated on: give another validation_split, or none.")
    training = _open(arguments, arguments.dataset, arguments.dataset_split, 0, without)
    validation = _open(arguments, other, split, 0, without)
    both = (training, validation)
    return Source(
        name=f"{training.name}, evaluated on {validation.name}",
        version=" ".join(dict.fromkeys(source.version for source in both if source.version)),
        revision=None if None in (revisions := [source.revision for source in both]) else ", ".join(revisions),
        fingerprint=" ".join(source.fingerprint for source in both),
        training=training.training,
        validation=validation.training,
        documents=None if None in (counts := [source.documents for source in both]) else sum(counts),
    )


def _refuse_idle(arguments: DataArguments, without: Path | None):
    """Refuses what was asked for and would do nothing."""
    others = (arguments.dataset, arguments.validation_dataset)
    kinds = {_kind(dataset, without) for dataset in others if dataset is not None}
    acts = {
        "dataset_config": bool(kinds & {"Hub", "data folder"}),
        "dataset_revision": "Hub" in kinds,
        "dataset_split": kinds != {"text"},
        "text_column": kinds != {"text"},
        "validation_split": kinds != {"text"},
        "validation_share": arguments.validation_dataset is None and arguments.validation_split is None,
        "shuffle_buffer": arguments.streaming,
        "data_cache": not arguments.streaming,
    }
    for name, does in acts.items():
        if not does and (value := getattr(arguments, name)) != getattr(DataArguments, name):
            raise CorpusError(f"{name}={value} does nothing here, with dataset={arguments.dataset}: leave it out.")


def _kind(dataset: str, without: Path | None) -> str:
    """What a name stands for: `"text"`, `"saved"`, `"data file"`, `"data folder"` or `"Hub"`."""
    if dataset == STANDARD_LIBRARY:
        return "text"
    path = Path(dataset).expanduser()
    if path.is_file():
        return "text" if _builder(path) is None else "data file"
    if path.is_dir():
        if any((path / name).exists() for name in (DATASET_STATE_JSON_FILENAME, DATASETDICT_JSON_FILENAME)):
            return "saved"
        return "data folder" if _holds_data(path, without) else "text"
    is_path = dataset.startswith((".", "/", "~")) or dataset.count("/") > 1
    if is_path or path.suffix in {*TEXT_SUFFIXES, *BUILDERS, COMPRESSED}:
        raise CorpusError(f"There is no {dataset}. Give a file or folder that is there, or a data set on the Hub.")
    return "Hub"


def _builder(path: Path) -> str | None:
    suffix = Path(path.stem).suffix if path.suffix == COMPRESSED else path.suffix
    return BUILDERS.get(suffix.lower())


def _holds_data(folder: Path, without: Path | None) -> bool:
    """Whether a folder is one of data files. JSON next to text files is not: folders of code hold some."""
    files = list(find_files(folder, frozenset({*TEXT_SUFFIXES, *BUILDERS, COMPRESSED}), without))
    data = [file for file in files if _builder(file)]
    text = [file for file in files if file.suffix in TEXT_SUFFIXES and file.name != "README.md"]
    tables = [file for file in data if file.suffix != ".json"]
    if text and tables:
        raise CorpusError(
            f"{folder} holds data files and text files, such as {tables[0].name} and {text[0].name}: give a folder "
            "that holds one of them, or the path of a file."
        )
    return bool(data) and not text


def _open(arguments: DataArguments, dataset: str, split: str, validation_share: float, without: Path | None) -> Source:
    """Opens one data set; with a share of 0, all documents are in its `training`."""
    path, kind = Path(dataset).expanduser(), _kind(dataset, without)
    if dataset == STANDARD_LIBRARY:
        return _source_of_corpus(load_standard_library(validation_share))
    if kind == "text":
        return _source_of_corpus(load_corpus(path, validation_share, without))
    if kind == "data folder" and without is not None and path.resolve() in without.resolve().parents:
        raise CorpusError(
            f"{without} lies in {dataset}, all of whose files are read: give an output_dir outside of it."
        )
    version = ""
    try:
        if kind == "saved":
            rows, fingerprint = _load_saved(path, split)
        else:
            builder = _make_builder(arguments, dataset, kind)
            version = builder.hash if kind == "Hub" else ""
            rows, fingerprint = _read_split(builder, split, arguments.streaming)
        first = next(iter(rows), None)
    except StopIteration:  # what the JSON reader makes of an empty file
        first = None
    except (OSError, ValueError, DatasetsError) as error:
        raise CorpusError(f"{dataset} (split {split}) can't be loaded: {error.__cause__ or error}") from error
    _check_column(first, arguments.text_column, dataset)
    return _source_of_rows(
        rows,
        arguments.text_column,
        validation_share,
        name=(dataset if kind == "Hub" else path.name or dataset) + (f" ({split})" if split != "train" else ""),
        version=version,
        fingerprint=fingerprint,
    )


def _load_saved(path: Path, split: str) -> tuple[Rows, str]:
    saved = load_from_disk(path)
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ValueError(f"it holds the splits {', '.join(saved)}")
        saved = saved[split]
    return saved, saved._fingerprint


def _make_builder(arguments: DataArguments, dataset: str, kind: str) -> DatasetBuilder:
    path = Path(dataset).expanduser()
    if kind == "data file":
        return load_dataset_builder(_builder(path), data_files=str(path))
    its_own = dataset == arguments.dataset
    return load_dataset_builder(
        dataset if kind == "Hub" else str(path),
        arguments.dataset_config if its_own else None,
        revision=arguments.dataset_revision if its_own else None,
    )


def _read_split(builder: DatasetBuilder, split: str, streaming: bool) -> tuple[Rows, str]:
    """As `load_dataset` does, which does not return the commit."""
    if streaming:
        return builder.as_streaming_dataset(split), f"{builder.hash} {builder.config_id} {split}"
    builder.download_and_prepare()
    rows = builder.as_dataset(split)
    return rows, rows._fingerprint


def _check_column(first: dict | None, column: str, dataset: str):
    if first is None:
        raise CorpusError(f"{dataset} is empty: there is no text to train on.")
    if column not in first:
        raise CorpusError(f"{dataset} has no column {column}, but {', '.join(first)}: give one as text_column.")
    if not isinstance(first[column], str | None):
        raise CorpusError(
            f"The column {column} of {dataset} holds no text, but {type(first[column]).__name__}: give another of "
            f"{', '.join(first)} as text_column."
        )


def _source_of_rows(
    rows: Rows, column: str, validation_share: float, name: str, version: str, fingerprint: str
) -> Source:
    documents = None
    if isinstance(rows, Dataset):
        documents = len(rows)
        rows = rows.to_iterable_dataset(num_shards=min(PARTS, documents))
    rows = rows.select_columns(column)
    training, validation = (
        rows.filter(
            functools.partial(_belong, validation_share=validation_share, held_out=held_out),
            input_columns=column,
            batched=True,
        )
        for held_out in (False, True)
    )
    text_of = operator.itemgetter(column)
    return Source(name, version, None, fingerprint, Texts(training, text_of), Texts(validation, text_of), documents)


def _belong(texts: list[str | None], validation_share: float, held_out: bool) -> list[bool]:
    """Which texts belong to the part that is held out for validation, or to the other; blank ones do to none."""
    if wrong := [text for text in texts if not isinstance(text, str | None)]:
        raise CorpusError(f"There is a row whose text is a {type(wrong[0]).__name__}: give another text_column.")
    return [
        text is not None and bool(text.strip()) and (_share_of(text) < validation_share) == held_out for text in texts
    ]


def _share_of(text: str) -> float:
    """A number from 0 to 1 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def _source_of_corpus(corpus: Corpus) -> Source:
    documents = (*corpus.training, *corpus.validation)
    columns = {name: [getattr(document, name) for document in documents] for name in ("name", "length", "begin")}
    rows = Dataset.from_dict(
        {
            **columns,
            "path": [str(document.path) for document in documents],
            "held_out": [index >= len(corpus.training) for index in range(len(documents))],
        }
    ).to_iterable_dataset(num_shards=min(PARTS, len(documents)))
    training, validation = (
        Texts(rows.filter(belongs, input_columns="held_out"), _read_row) for belongs in (operator.not_, bool)
    )
    return Source(corpus.name, "", corpus.revision, corpus.revision, training, validation, len(documents))


def _read_row(row: dict) -> str:
    return Document(row["name"], Path(row["path"]), row["length"], row["begin"]).text
