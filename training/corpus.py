"""Text files as a corpus: found, checked and split, but read only when their text is wanted."""

import hashlib
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from .data_files import read_text_file, suffix_of, unreadable
from .errors import CorpusError


TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".c", ".h", ".js", ".ts", ".java", ".go", ".rs", ".tex"})
# Folders of the standard library that are tests, tables in the guise of code, or not part of it.
NOT_READ = frozenset({"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class Document:
    """
    A text file, or a part of one.

    Args:
        name (`str`): Its name in the corpus.
        path (`Path`): Where the file lies.
        length (`int`): Characters of the document.
        begin (`int`): The character of the file that it begins with.
    """

    name: str
    path: Path
    length: int
    begin: int = 0

    @property
    def text(self) -> str:
        """The text, which is read anew."""
        text = read_text_file(self.path)[self.begin : self.begin + self.length]
        if len(text) < self.length:
            raise CorpusError(f"{self.path} has become shorter since it was first read. Run again.")
        return text


@dataclass(frozen=True)
class Corpus:
    """
    Documents split into training and validation, whole documents at a time.

    Args:
        name (`str`): What the text is.
        revision (`str`): Identifies the text: a version where there is one, and a hash.
        training (`tuple[Document, ...]`): Documents to train on.
        validation (`tuple[Document, ...]`): Documents to evaluate on.
        left_out (`Counter`): The number of files that are not read, by the reason.
    """

    name: str
    revision: str
    training: tuple[Document, ...]
    validation: tuple[Document, ...]
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def characters(self) -> int:
        """Length of all documents together."""
        return sum(document.length for document in (*self.training, *self.validation))


def load_standard_library(validation_share: float = 0.05) -> Corpus:
    """
    The source of this interpreter's standard library, without its tests and its tables of encodings: Python code that
    is on every machine.

    Args:
        validation_share (`float`): Part of the characters that is kept for validation.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if not NOT_READ & {*path.relative_to(root).parts}]
    # A handful of files exist to be in another encoding; they are left out.
    texts = ((path, content.decode()) for path in files if is_text(content := path.read_bytes()))
    documents, digest = survey(root, texts)
    revision = f"Python {platform.python_version()} {digest}"
    return split_documents(documents, "Python standard library", revision, validation_share)


def load_corpus(path: Path, validation_share: float = 0.05, without: Path | None = None) -> Corpus:
    """
    The text files in a folder, or one text file. Each is read once, and again whenever its text is wanted: a corpus
    takes memory for names, and not for text.

    Args:
        path (`Path`):
            A file of any name, or a folder, of which files with a usual suffix of text or code are read, also
            compressed by gzip, but for hidden ones (`.git`, `.venv`).
        validation_share (`float`): Part of the characters that is kept for validation; with 0, nothing is.
        without (`Path`, *optional*): A folder to leave out, such as one inside `path` that is being written to.

    Raises:
        `CorpusError`: If there is no such path, or a file is empty, binary or unreadable.
    """
    if not path.exists():
        raise CorpusError(f"There is no {path}. Give a folder of text files, or one text file.")
    files, left_out = [path], Counter()
    if path.is_dir():
        files, left_out = choose_files(path, TEXT_SUFFIXES, without)
        if not files:
            raise CorpusError(
                f"{path} holds no text files. Files that end in {', '.join(sorted(TEXT_SUFFIXES))} are read; to use "
                "one of another name, give its path."
            )
    root = path if path.is_dir() else path.parent
    documents, digest = survey(root, ((file, read_text_file(file)) for file in files))
    if not documents:
        raise CorpusError(f"{path} is empty: there is no text to train on.")
    if blank := len(files) - len(documents):
        left_out["empty"] = blank
    return replace(split_documents(documents, path.name or str(path), digest, validation_share), left_out=left_out)


def choose_files(
    folder: Path, suffixes: frozenset[str], without: Path | None = None
) -> tuple[list[Path], Counter[str]]:
    """
    The files of these suffixes in a folder and those in it, also linked ones, in the order of their names.

    Returns:
        The files, and the number of others by the reason why they are left out: their suffix, or that they are hidden.

    Raises:
        `CorpusError`: If a folder can't be listed.
    """

    def refuse(error: OSError):
        raise CorpusError(unreadable(Path(error.filename), error)) from error

    seen = {folder.resolve(), without and without.resolve()}
    chosen: list[Path] = []
    left_out: Counter[str] = Counter()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        left_out["hidden"] += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and _is_new(Path(parent, name), seen))
        for file in (Path(parent, name) for name in names if not name.startswith(".")):
            if not file.is_file():
                left_out["links to nothing"] += 1
            elif suffix_of(file) in suffixes:
                chosen.append(file)
            else:
                left_out[suffix_of(file) or "without suffix"] += 1
    return sorted(chosen), +left_out


def _is_new(folder: Path, seen: set[Path | None]) -> bool:
    """Whether a folder was not met before, by whichever link. Links may lead round in a circle."""
    if (place := folder.resolve()) in seen:
        return False
    seen.add(place)
    return True


def describe_left_out(left_out: Counter[str]) -> str:
    """What is not read and why, such as `.png (12), hidden (2)`."""
    return ", ".join(f"{reason} ({count:,})" for reason, count in left_out.most_common())


def survey(root: Path, texts: Iterable[tuple[Path, str]]) -> tuple[list[Document], str]:
    """The documents of the files that hold text, and a hash of their names and texts."""
    documents, digest = [], hashlib.sha256()
    for path, text in texts:
        if text.strip():
            documents.append(Document(str(path.relative_to(root)), path, len(text)))
            digest.update(f"{documents[-1].name}\0{text}\0".encode(errors="surrogateescape"))
    return documents, f"sha256:{digest.hexdigest()[:16]}"


def split_documents(documents: list[Document], name: str, revision: str, validation_share: float) -> Corpus:
    """
    Splits by document, in an order that depends on names alone. If that leaves less than half of the wanted share for
    validation, because the documents are few or long, the end of the longest one is added to it.
    """
    wanted = round(validation_share * sum(document.length for document in documents))
    held_out: set[str] = set()
    held_length = 0
    for document in sorted(documents, key=lambda document: hashlib.sha256(os.fsencode(document.name)).digest()):
        if held_length < wanted and held_length + document.length <= 1.5 * wanted:
            held_out.add(document.name)
            held_length += document.length
    training = [document for document in documents if document.name not in held_out]
    validation = [document for document in documents if document.name in held_out]
    if held_length < wanted / 2:
        longest = max(range(len(training)), key=lambda index: training[index].length)
        training[longest], end = _cut_end(training[longest], wanted - held_length)
        validation.append(end)
    return Corpus(name, revision, tuple(training), tuple(validation))


def _cut_end(document: Document, length: int) -> tuple[Document, Document]:
    """
    The document without its end, and its end: as many characters as wanted, or up to twice as many to cut at a line's
    end, or else at a space.
    """
    text = document.text
    place = document.length - length
    earliest = max(0, place - length)
    for separator in "\n", " ":
        if (found := text.rfind(separator, earliest, place)) >= 0:
            place = found + 1
            break
    return (
        replace(document, name=f"{document.name} (beginning)", length=place),
        replace(document, name=f"{document.name} (end)", length=document.length - place, begin=place),
    )


def is_text(content: bytes) -> bool:
    if b"\0" in content:
        return False
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
