"""Data for a training run: tokenizer, blocks to train on and blocks to evaluate on, kept for the next time."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import tokenizers
from datasets import Dataset
from filelock import FileLock
from transformers import PreTrainedTokenizerFast

from entropy_gpt.conversion.early_checks import expanded
from entropy_gpt.conversion.tokenizer_files import save_tokenizer

from .arguments import DataArguments
from .errors import CorpusError
from .files import delete, written_whole
from .packing import Witness, pack, plain_backend, spread_blocks
from .sources import Source, open_source
from .streaming import PackedStream, Texts
from .tokenizer import SMALLEST_VOCABULARY, check_end_of_text, load_tokenizer, train_tokenizer


logger = logging.getLogger(__name__)

# A tokenizer is trained on the first documents, up to this many characters.
TOKENIZER_CHARACTERS = 100_000_000
# Goes up when the same documents and arguments come to give other blocks.
CACHE_FORMAT = 2
# What lies in a folder of the cache.
RECORD, TOKENIZER, TRAINING, VALIDATION = "record.json", "tokenizer", "training.arrow", "validation.arrow"


@dataclass(frozen=True)
class PreparedData:
    """
    What a run trains and is evaluated on.

    Args:
        name (`str`): What the text is.
        revision (`str`): Identifies the text: a version where there is one, and a hash.
        tokenizer (`PreTrainedTokenizerFast`): A tokenizer with an end-of-text token.
        training (`Dataset` or [`PackedStream`]): Column `input_ids`, of `context` tokens a row.
        validation (`Dataset`): The same, of other documents.
        validation_texts ([`Texts`]): Those documents.
        context (`int`): Tokens of a block.
        training_documents, validation_documents (`int`, *optional*): Those that are not blank; unknown of a stream.
    """

    name: str
    revision: str
    tokenizer: PreTrainedTokenizerFast
    training: Dataset | PackedStream
    validation: Dataset
    validation_texts: Texts
    context: int
    training_documents: int | None = None
    validation_documents: int | None = None

    @property
    def training_tokens(self) -> int | None:
        """Tokens of one pass; unknown of a stream."""
        return None if isinstance(self.training, PackedStream) else len(self.training) * self.context

    @property
    def validation_tokens(self) -> int:
        return len(self.validation) * self.context


@dataclass(frozen=True)
class _Job:
    """What to prepare, the tokenizer if one is given, and the callback for progress."""

    arguments: DataArguments
    context: int
    source: Source
    tokenizer: PreTrainedTokenizerFast | None
    on_stage: Callable[[str, int | None], None]
    on_documents: Callable[[int], None]


@dataclass(frozen=True)
class _Record:
    """What is recorded of cached blocks, in a file next to them."""

    revision: str
    training_documents: int
    validation_documents: int
    training_blocks: int
    validation_blocks: int


def prepare_data(
    arguments: DataArguments,
    context: int,
    seed: int,
    default_tokenizer: str | None = None,
    without: Path | None = None,
    on_stage: Callable[[str, int | None], None] = lambda description, documents: None,
    on_documents: Callable[[int], None] = lambda count: None,
) -> PreparedData:
    """
    Reads, tokenises and packs what the arguments name. Blocks and tokenizer are kept in a folder that is found again
    as long as documents, tokenizer and arguments are the same; a damaged one is made anew. Of a stream nothing is
    kept.

    Args:
        arguments ([`DataArguments`]): What to read and how.
        context (`int`): Tokens of a block.
        seed (`int`): Seed of a stream's order.
        default_tokenizer (`str`, *optional*):
            Folder or repository of the tokenizer if the arguments name none; without either, one is trained on the
            first documents.
        without (`Path`, *optional*): A folder that is not read, such as one inside that is being written to.
        on_stage: Called with a description and the number of documents, if known, when a stage begins.
        on_documents: Called with the number of documents, whenever some are tokenised.

    Raises:
        `CorpusError`: If an argument is out of range or does nothing, or documents or tokenizer can't be used.
    """
    _check_ranges(arguments, context)
    place = arguments.tokenizer or default_tokenizer
    if place and arguments.tokenizer_vocab_size != DataArguments.tokenizer_vocab_size:
        raise CorpusError(
            f"tokenizer_vocab_size={arguments.tokenizer_vocab_size} has no effect on the tokenizer of {place}: "
            "leave it out."
        )
    tokenizer = load_tokenizer(place, arguments.eos_token) if place else None
    if tokenizer is not None:
        check_end_of_text(tokenizer)
    elif arguments.eos_token:
        raise CorpusError(f"eos_token={arguments.eos_token} has no effect without a tokenizer: leave it out.")
    on_stage("reading the text", None)
    source = open_source(arguments, without)
    if next(iter(source.training), None) is None:
        raise CorpusError(f"{source.name} is empty: there is no text to train on.")
    job = _Job(arguments, context, source, tokenizer, on_stage, on_documents)
    if arguments.streaming:
        return _prepare_stream(job, seed)
    folder = _cache(arguments) / _fingerprint(job)
    with FileLock(f"{folder}.lock"):  # another run may want the same
        if (prepared := _load(folder, job)) is None:
            delete(folder)
            with written_whole(folder) as temporary:
                _write(temporary, job)
            prepared = _load(folder, job)
    return prepared


def _check_ranges(arguments: DataArguments, context: int):
    if context < 2:
        raise CorpusError(f"A context of {context} leaves nothing to predict: it has to be at least 2.")
    if not 0 < arguments.validation_share <= 0.5:
        raise CorpusError(f"validation_share={arguments.validation_share} has to be above 0 and at most 0.5.")
    if arguments.shuffle_buffer < 1:
        raise CorpusError(f"shuffle_buffer={arguments.shuffle_buffer} has to be at least 1.")
    if arguments.tokenizer_vocab_size < SMALLEST_VOCABULARY:
        raise CorpusError(
            f"tokenizer_vocab_size={arguments.tokenizer_vocab_size} has to be at least {SMALLEST_VOCABULARY}: the "
            "bytes and the end-of-text token."
        )
    if arguments.validation_tokens is not None and arguments.validation_tokens < context:
        raise CorpusError(
            f"validation_tokens={arguments.validation_tokens} has to be at least {context}, the tokens of one block."
        )
    if arguments.streaming and arguments.validation_tokens is None:
        raise CorpusError("streaming needs validation_tokens, the number of tokens to read before training begins.")


def _prepare_stream(job: _Job, seed: int) -> PreparedData:
    tokenizer = job.tokenizer or _train_tokenizer(job)
    job.on_stage("tokenising the text for validation", None)
    source, context = job.source, job.context
    validation = _pack_validation(job, source.validation, tokenizer, most_blocks=_most_validation_blocks(job))
    return PreparedData(
        source.name,
        source.identity,
        tokenizer,
        PackedStream(source.training, tokenizer, context, seed, job.arguments.shuffle_buffer),
        validation.with_format("numpy"),
        source.validation,
        context,
    )


def _cache(arguments: DataArguments) -> Path:
    folder = Path(expanded(arguments.data_cache or Path(datasets.config.HF_DATASETS_CACHE, "entropy_gpt")))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CorpusError(f"Tokenised data can't be kept in {folder} ({error.strerror}): give data_cache.") from error
    return folder


def _fingerprint(job: _Job) -> str:
    """Changes with all that the blocks depend on; how many of those for validation are taken is not part of it."""
    arguments, tokenizer = job.arguments, job.tokenizer
    if tokenizer is None:
        kind = [arguments.tokenizer_vocab_size, TOKENIZER_CHARACTERS, tokenizers.__version__]
    else:
        kind = [plain_backend(tokenizer).to_str(), tokenizer.eos_token_id]
    parts = [CACHE_FORMAT, job.source.fingerprint, arguments.text_column, arguments.validation_share, kind]
    return hashlib.sha256(json.dumps([*parts, job.context]).encode()).hexdigest()[:32]


def _load(folder: Path, job: _Job) -> PreparedData | None:
    """What the folder holds, or `None` if it is not there or damaged."""
    if not folder.exists():
        return None
    try:
        record = _Record(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
        tokenizer = job.tokenizer or load_tokenizer(str(folder / TOKENIZER))
        training, validation = (Dataset.from_file(str(folder / name)) for name in (TRAINING, VALIDATION))
        if (found := (len(training), len(validation))) != (record.training_blocks, record.validation_blocks):
            raise ValueError(f"it holds {found} blocks, and {record} is what it had")
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s is damaged and made anew: %s", folder, error)
        return None
    if (most_blocks := _most_validation_blocks(job)) is not None:
        validation = spread_blocks(validation, most_blocks)
    return PreparedData(
        job.source.name,
        record.revision,
        tokenizer,
        training.with_format("numpy"),
        validation.with_format("numpy"),
        job.source.validation,
        job.context,
        record.training_documents,
        record.validation_documents,
    )


def _write(folder: Path, job: _Job):
    folder.mkdir()
    tokenizer = job.tokenizer or _train_tokenizer(job)
    if job.tokenizer is None:
        save_tokenizer(tokenizer, folder / TOKENIZER)
    job.on_stage("tokenising", job.source.documents)
    digest = hashlib.sha256()
    training, validation = (Witness(texts, digest) for texts in (job.source.training, job.source.validation))
    # The smaller part first: of few documents, it may be the one that is too short.
    validation_blocks = len(_pack_validation(job, validation, tokenizer, folder / VALIDATION))
    training_blocks = len(pack(training, tokenizer, job.context, job.on_documents, folder / TRAINING))
    record = _Record(
        revision=job.source.revision or f"{job.source.version} sha256:{digest.hexdigest()[:16]}".strip(),
        training_documents=training.documents,
        validation_documents=validation.documents,
        training_blocks=training_blocks,
        validation_blocks=validation_blocks,
    )
    (folder / RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


def _train_tokenizer(job: _Job) -> PreTrainedTokenizerFast:
    job.on_stage("training the tokenizer", None)
    return train_tokenizer(first_texts(job.source.training, TOKENIZER_CHARACTERS), job.arguments.tokenizer_vocab_size)


def first_texts(texts: Iterable[str], characters: int) -> Iterator[str]:
    """The first texts, up to this many characters in all."""
    for text in texts:
        yield text[:characters]
        if (characters := characters - len(text)) <= 0:
            return


def _pack_validation(
    job: _Job,
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    path: Path | None = None,
    most_blocks: int | None = None,
) -> Dataset:
    try:
        return pack(texts, tokenizer, job.context, job.on_documents, path, most_blocks)
    except CorpusError as error:
        raise CorpusError(
            f"In the part kept for validation: {error} Or raise validation_share={job.arguments.validation_share}, or "
            "name a validation_split or validation_dataset."
        ) from error


def _most_validation_blocks(job: _Job) -> int | None:
    tokens = job.arguments.validation_tokens
    return None if tokens is None else tokens // job.context
