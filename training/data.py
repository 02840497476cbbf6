"""From text files to blocks of tokens: corpus, tokenizer, packing."""

import copy
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"
TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".c", ".h", ".js", ".ts", ".java", ".go", ".rs", ".tex"})
# Folders of the standard library that are tests, tables in the guise of code, or not part of it.
NOT_READ = frozenset({"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"})


class CorpusError(ValueError):
    """The given text can't be used; the message says why and what to do."""


@dataclass(frozen=True)
class Document:
    """A text and the name that it has in the corpus."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """
    Documents split into training and validation, whole documents at a time.

    Args:
        name (`str`): What the text is.
        revision (`str`): What tells this text from any other: a version where there is one, and a hash.
        training (`tuple[Document, ...]`): Documents to train on.
        validation (`tuple[Document, ...]`): Documents to evaluate on.
    """

    name: str
    revision: str
    training: tuple[Document, ...]
    validation: tuple[Document, ...]

    @property
    def characters(self) -> int:
        """Length of all documents together."""
        return sum(len(document.text) for document in (*self.training, *self.validation))


def load_standard_library(validation_share: float = 0.05) -> Corpus:
    """
    The source of this interpreter's standard library, without its tests and its tables of encodings: Python code that
    is on every machine.

    Args:
        validation_share (`float`): Part of the characters that is kept for validation.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if not NOT_READ & {*path.relative_to(root).parts}]
    texts = {path: path.read_bytes() for path in files}
    # A handful of files exist to be in another encoding; they are left out.
    decodable = {path: text.decode() for path, text in texts.items() if _is_text(text)}
    documents = [Document(str(path.relative_to(root)), text) for path, text in decodable.items() if text.strip()]
    return _split(documents, "Python standard library", f"Python {platform.python_version()}", validation_share)


def load_corpus(path: Path, validation_share: float = 0.05, without: Path | None = None) -> Corpus:
    """
    The text files in a folder, or one text file.

    Args:
        path (`Path`):
            A file of any name, or a folder, of which files with a usual suffix of text or code are read, but for
            hidden ones (`.git`, `.venv`).
        validation_share (`float`): Part of the characters that is kept for validation.
        without (`Path`, *optional*): A folder to leave out, such as one inside `path` that is being written to.

    Raises:
        `CorpusError`: If there is no such path, or a file is empty, binary or unreadable.
    """
    if not path.exists():
        raise CorpusError(f"There is no {path}. Give a folder of text files, or one text file.")
    files = [path]
    if path.is_dir():
        files = sorted(_walk(path, without))
        if not files:
            raise CorpusError(
                f"{path} holds no text files. Files that end in {', '.join(sorted(TEXT_SUFFIXES))} are read; to use "
                "one of another name, give its path."
            )
    root = path if path.is_dir() else path.parent
    documents = [Document(str(file.relative_to(root)), _read_text(file)) for file in files]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise CorpusError(f"{path} is empty: there is no text to train on.")
    return _split(documents, path.name or str(path), "", validation_share)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level BPE tokenizer like GPT-2's, with `<|endoftext|>` as its only special token.

    Args:
        texts (`Iterable[str]`): Text to learn the merges from.
        vocab_size (`int`): Number of tokens, at least 257: the bytes and the special token. Less come out if the text
            does not hold that many.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def pack(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    block_size: int,
    on_document: Callable[[Document], None] = lambda document: None,
) -> Dataset:
    """
    Joins documents, each followed by the end-of-text token, and cuts them into blocks of equal length.

    Args:
        documents (`Iterable[Document]`): Documents, in the order in which they are joined.
        tokenizer (`PreTrainedTokenizerFast`): A tokenizer with an end-of-text token.
        block_size (`int`): Length of a block in tokens. What is left at the end is dropped.
        on_document: Called after each document, for progress.

    Returns:
        `Dataset`: Column `input_ids`, of `block_size` tokens a row.

    Raises:
        `CorpusError`: If the documents are too short for one block.
    """
    tokens = np.fromiter(_token_stream(documents, tokenizer, on_document), dtype=np.int32)
    blocks = len(tokens) // block_size
    if not blocks:
        raise CorpusError(
            f"The text is too short: it has {len(tokens)} tokens, and one block takes {block_size}. Give more text."
        )
    return Dataset.from_dict({"input_ids": tokens[: blocks * block_size].reshape(blocks, block_size)})


def collate_blocks(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of packed blocks, every token of which is a label, the end of text included."""
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}


def _token_stream(documents, tokenizer, on_document) -> Iterator[int]:
    # The fast tokenizer itself: the wrapper warns of texts longer than a model's context, which are packed anyway. A
    # copy, in which the name of a special token in a text is text.
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True
    for document in documents:
        yield from backend.encode(document.text, add_special_tokens=False).ids
        yield tokenizer.eos_token_id
        on_document(document)


def _split(documents: list[Document], name: str, version: str, validation_share: float) -> Corpus:
    """
    Splits by document, in an order that depends on names alone. If that leaves less than half of the wanted share for
    validation, because the documents are few or long, the end of the longest one is added to it.
    """
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.name}\0{document.text}\0".encode())
    revision = f"{version} sha256:{digest.hexdigest()[:16]}".strip()

    wanted = round(validation_share * sum(len(document.text) for document in documents))
    held_out: set[str] = set()
    held_length = 0
    for document in sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest()):
        if held_length < wanted and held_length + len(document.text) <= 1.5 * wanted:
            held_out.add(document.name)
            held_length += len(document.text)
    training = [document for document in documents if document.name not in held_out]
    validation = [document for document in documents if document.name in held_out]
    if held_length < wanted / 2:
        longest = max(range(len(training)), key=lambda index: len(training[index].text))
        training[longest], end = _cut_end(training[longest], wanted - held_length)
        validation.append(end)
    return Corpus(name, revision, tuple(training), tuple(validation))


def _cut_end(document: Document, length: int) -> tuple[Document, Document]:
    """
    The document without its end, and its end: as many characters as wanted, or up to twice as many to cut at a line's
    end, or else at a space.
    """
    place = len(document.text) - length
    earliest = max(0, place - length)
    for separator in "\n", " ":
        if (found := document.text.rfind(separator, earliest, place)) >= 0:
            place = found + 1
            break
    return (
        Document(f"{document.name} (beginning)", document.text[:place]),
        Document(f"{document.name} (end)", document.text[place:]),
    )


def _walk(folder: Path, without: Path | None) -> Iterator[Path]:
    """The files in a folder and those in it that are read: of a known suffix, and not hidden."""

    def refuse(error: OSError):
        raise CorpusError(_unreadable(Path(error.filename), error)) from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        inside = [Path(parent, name) for name in folders if not name.startswith(".")]
        folders[:] = [path.name for path in inside if without is None or path.resolve() != without.resolve()]
        files = [Path(parent, name) for name in names if not name.startswith(".")]
        yield from (file for file in files if file.suffix in TEXT_SUFFIXES and file.is_file())


def _read_text(file: Path) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CorpusError(_unreadable(file, error)) from error
    if not _is_text(content):
        raise CorpusError(f"{file} is not UTF-8 text (is it binary?). Convert it, or leave it out.")
    return content.decode()


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path} can't be read ({error.strerror}). Make it readable, or leave it out."


def _is_text(content: bytes) -> bool:
    if b"\0" in content:
        return False
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
