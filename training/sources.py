"""Where documents come from: text files, data files, saved data sets, the Hub."""

import functools
import hashlib
import json
import logging
import operator
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, load_dataset_builder
from datasets.config import DATASET_STATE_JSON_FILENAME, DATASETDICT_JSON_FILENAME
from datasets.exceptions import DatasetsError
from pyarrow import compute

from entropy_gpt.conversion.early_checks import expanded

from .arguments import NAMED_TEXTS, PACKAGES, STANDARD_LIBRARY, DataArguments
from .corpus import (
    TEXT_SUFFIXES,
    Corpus,
    Document,
    choose_files,
    describe_left_out,
    load_corpus,
    load_standard_library,
)
from .data_files import CARD, GZIP, READERS, read_column, read_rows, split_files, suffix_of
from .errors import CorpusError
from .package_corpus import load_packages
from .streaming import Texts


logger = logging.getLogger(__name__)

Rows = Dataset | IterableDataset
OTHER_SPLITS = "of other splits"
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
        left_out (`Counter`): The number of files that are not read, by the reason.
    """

    name: str
    version: str
    revision: str | None
    fingerprint: str
    training: Texts
    validation: Texts
    documents: int | None
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def identity(self) -> str:
        """What identifies the text without reading it: its revision, or else the time and size of its files."""
        digest = hashlib.sha256(self.fingerprint.encode()).hexdigest()[:16]
        return self.revision or f"{self.version} fingerprint:{digest}".strip()


@dataclass(frozen=True)
class _Place:
    """
    What a name stands for.

    Args:
        name (`str`): The name that was given.
        kind (`str`): `"text"`, `"saved"`, `"data file"`, `"data folder"` or `"Hub"`.
        files (`list[Path]`): The data files.
        left_out (`Counter`): Files that are not read, by the reason.
    """

    name: str
    kind: str
    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def path(self) -> Path:
        return Path(expanded(self.name))


def open_source(arguments: DataArguments, without: Path | None = None) -> Source:
    """
    Opens what the arguments name. Of text files nothing is held but their names, and nothing is downloaded beforehand
    when streaming. A path is never taken for a pattern. What a folder holds and is not read is logged in one line.

    Where no other documents are named for validation, some are kept apart: of text files as
    [`~training.corpus.load_corpus`] does, of rows those whose hash falls into the share, whatever their order, and
    the same whether they are streamed or not.

    Args:
        arguments ([`DataArguments`]): What to read.
        without (`Path`, *optional*): A folder that is not read, such as one inside that is being written to.

    Raises:
        `CorpusError`: If it can't be read, has no such split, column or text, or an argument does nothing.
    """
    place = _find_place(arguments.dataset, without)
    other = place if arguments.validation_dataset is None else _find_place(arguments.validation_dataset, without)
    _refuse_idle(arguments, {place.kind, other.kind})
    if arguments.validation_dataset is None and arguments.validation_split is None:
        source = _open(arguments, place, arguments.dataset_split, arguments.validation_share, without)
        _log_left_out({place.name: source})
        return source
    split = arguments.validation_split or arguments.dataset_split
    if (other.name, split) == (arguments.dataset, arguments.dataset_split):
        raise CorpusError(f"{other.name} is both trained and evaluated on: give another validation_split, or none.")
    training = _open(arguments, place, arguments.dataset_split, 0, without)
    validation = _open(arguments, other, split, 0, without)
    if other.name == place.name:  # what one leaves to the other is read
        left_out = training.left_out + validation.left_out
        left_out.subtract(place.left_out + Counter({OTHER_SPLITS: len(place.files)}))
        _log_left_out({place.name: replace(training, left_out=+left_out)})
    else:
        _log_left_out({place.name: training, other.name: validation})
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


def _log_left_out(sources: dict[str, Source]):
    for name, source in sources.items():
        if source.left_out:
            logger.warning("Left out of %s: %s.", name, describe_left_out(source.left_out))


def _refuse_idle(arguments: DataArguments, kinds: set[str]):
    """Refuses what was asked for and would do nothing."""
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


def _find_place(dataset: str, without: Path | None) -> _Place:
    """What a name stands for: files, a folder, or else a data set on the Hub."""
    if dataset in NAMED_TEXTS:
        return _Place(dataset, "text")
    path = Path(expanded(dataset))
    if path.is_file():
        is_data = suffix_of(path) in READERS
        return _Place(dataset, "data file", [path]) if is_data else _Place(dataset, "text")
    if path.is_dir():
        if any((path / name).exists() for name in (DATASET_STATE_JSON_FILENAME, DATASETDICT_JSON_FILENAME)):
            return _Place(dataset, "saved")
        return _look_into(dataset, path, without)
    is_path = dataset.startswith((".", "/", "~")) or dataset.count("/") > 1
    if is_path or path.suffix.lower() == GZIP or suffix_of(path) in {*TEXT_SUFFIXES, *READERS}:
        raise CorpusError(f"There is no {dataset}. Give a file or folder that is there, or a data set on the Hub.")
    return _Place(dataset, "Hub")


def _look_into(dataset: str, folder: Path, without: Path | None) -> _Place:
    """A folder holds text files or data files. JSON next to text files is not read: folders of code hold some."""
    data, left_out = choose_files(folder, frozenset(READERS), without)
    text, _ = choose_files(folder, TEXT_SUFFIXES, without)
    text = [file for file in text if file.name != CARD]
    tables = [file for file in data if suffix_of(file) != ".json"]
    if text and tables:
        raise CorpusError(
            f"{folder} holds data files and text files, such as {tables[0].name} and {text[0].name}: give a folder "
            "that holds one of them, or the path of a file."
        )
    if text or not data:
        return _Place(dataset, "text")
    return _Place(dataset, "data folder", data, left_out)


def _open(
    arguments: DataArguments, place: _Place, split: str, validation_share: float, without: Path | None
) -> Source:
    """Opens one data set; with a share of 0, all documents are in its `training`."""
    if place.name == STANDARD_LIBRARY:
        return _source_of_corpus(load_standard_library(validation_share))
    if place.name == PACKAGES:
        return _source_of_corpus(load_packages(validation_share))
    if place.kind == "text":
        return _source_of_corpus(load_corpus(place.path, validation_share, without))
    version, left_out = "", place.left_out
    try:
        if place.kind == "saved":
            rows, fingerprint = _load_saved(place.path, split)
        elif place.kind == "Hub":
            rows, fingerprint, version = _load_from_hub(arguments, place.name, split)
        else:
            config = arguments.dataset_config if place.name == arguments.dataset else None
            files = _files_of_split(place, split, config)
            left_out = left_out + Counter({OTHER_SPLITS: len(place.files) - len(files)})
            rows, fingerprint = _read_files(files, arguments)
        first = next(iter(rows), None)
    except (OSError, ValueError, DatasetsError) as error:
        for known in (error, error.__cause__):
            if isinstance(known, CorpusError):
                raise known from None
        raise CorpusError(f"{place.name} (split {split}) can't be loaded: {error.__cause__ or error}") from error
    _check_column(first, arguments.text_column, place.name)
    return _source_of_rows(
        rows,
        arguments.text_column,
        validation_share,
        name=(place.name if place.kind == "Hub" else place.path.name or place.name)
        + (f" ({split})" if split != "train" else ""),
        version=version,
        fingerprint=fingerprint,
        left_out=left_out,
    )


def _load_saved(path: Path, split: str) -> tuple[Dataset, str]:
    """What `save_to_disk` saved. `load_from_disk` takes some paths for addresses."""
    if (path / DATASETDICT_JSON_FILENAME).exists():
        splits = json.loads((path / DATASETDICT_JSON_FILENAME).read_text(encoding="utf-8"))["splits"]
        if split not in splits:
            raise ValueError(f"it holds the splits {', '.join(splits)}")
        path = path / split
    state = json.loads((path / DATASET_STATE_JSON_FILENAME).read_text(encoding="utf-8"))
    parts = [Dataset.from_file(str(path / file["filename"])) for file in state["_data_files"]]
    return concatenate_datasets(parts), state["_fingerprint"]


def _load_from_hub(arguments: DataArguments, dataset: str, split: str) -> tuple[Rows, str, str]:
    """Rows, fingerprint and commit. `load_dataset` does not return the commit."""
    its_own = dataset == arguments.dataset
    builder = load_dataset_builder(
        dataset,
        arguments.dataset_config if its_own else None,
        revision=arguments.dataset_revision if its_own else None,
    )
    if arguments.streaming:
        return builder.as_streaming_dataset(split), f"{builder.hash} {builder.config_id} {split}", builder.hash
    builder.download_and_prepare()
    rows = builder.as_dataset(split)
    return rows, rows._fingerprint, builder.hash


def _files_of_split(place: _Place, split: str, config: str | None) -> list[Path]:
    splits = {"train": place.files}
    if place.kind == "data folder":
        splits = split_files(place.path, place.files, config)
    if not splits.get(split):
        raise ValueError(f"it holds the splits {', '.join(splits)}")
    return splits[split]


def _read_files(files: list[Path], arguments: DataArguments) -> tuple[Rows, str]:
    """The rows of data files: the text alone, if there is any."""
    column = arguments.text_column
    _check_column(next((row for file in files for row in read_rows(file)), None), column, arguments.dataset)
    stamps = [(str(file.resolve()), (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files]
    fingerprint = hashlib.sha256(repr((stamps, column)).encode()).hexdigest()[:32]
    features = Features({column: Value("large_string")})
    given = {"gen_kwargs": {"files": [str(file) for file in files], "column": column}}
    if arguments.streaming:
        return IterableDataset.from_generator(read_column, features, **given), fingerprint
    return Dataset.from_generator(read_column, features, **given, fingerprint=fingerprint), fingerprint


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
    rows: Rows,
    column: str,
    validation_share: float,
    name: str,
    version: str,
    fingerprint: str,
    left_out: Counter[str],
) -> Source:
    documents = None
    if isinstance(rows, Dataset):
        documents = len(rows)
        left_out = left_out + Counter({"rows without text": _count_blank(rows, column)})
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
    training, validation = Texts(training, text_of), Texts(validation, text_of)
    return Source(name, version, None, fingerprint, training, validation, documents, left_out)


def _count_blank(rows: Dataset, column: str) -> int:
    texts = rows.data.column(column)
    if pa.types.is_null(texts.type):
        return len(texts)
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        return 0  # a row that is no text is refused when it is read
    trimmed = (compute.utf8_trim_whitespace(chunk.fill_null("")) for chunk in texts.chunks)
    return sum(compute.sum(compute.equal(compute.utf8_length(chunk), 0)).as_py() or 0 for chunk in trimmed)


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
    columns = {name: [getattr(document, name) for document in documents] for name in ("length", "begin")}
    rows = Dataset.from_dict(
        {
            **columns,
            # Names of files need not be UTF-8.
            "name": [os.fsencode(document.name) for document in documents],
            "path": [os.fsencode(document.path) for document in documents],
            "held_out": [index >= len(corpus.training) for index in range(len(documents))],
        }
    ).to_iterable_dataset(num_shards=min(PARTS, len(documents)))
    training, validation = (
        Texts(rows.filter(belongs, input_columns="held_out"), _read_row) for belongs in (operator.not_, bool)
    )
    revision, left_out = corpus.revision, corpus.left_out
    return Source(corpus.name, "", revision, revision, training, validation, len(documents), left_out)


def _read_row(row: dict) -> str:
    return Document(os.fsdecode(row["name"]), Path(os.fsdecode(row["path"])), row["length"], row["begin"]).text
