"""The texts of a study: what it trains and validates on, and what it tests on."""

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.training.arguments import DataArguments
from entropy_gpt.training.corpus import Document, load_corpus
from entropy_gpt.training.package_corpus import read_pins
from entropy_gpt.training.sources import Source, open_source


NOT_TESTED_ON = frozenset({"test", "tests", "testing"})
# What makes a paragraph prose: this many words, and this share of letters and spaces among its characters.
FEWEST_WORDS, PLAIN_SHARE = 20, 0.9


@dataclass(frozen=True)
class Sample:
    """
    Text that is tested on.

    Args:
        name (`str`): What it is.
        revision (`str`): Its version and hash.
        documents (`tuple`): Its documents, or their texts.
    """

    name: str
    revision: str
    documents: tuple[Document | str, ...]

    @property
    def texts(self) -> Iterator[str]:
        return (each if isinstance(each, str) else each.text for each in self.documents)


def load_text(dataset: str) -> Source:
    """
    What a study trains and validates on.

    Raises:
        `CorpusError`: If it can't be read.
    """
    return open_source(DataArguments(dataset=dataset))


def read_samples(test: dict[str, dict], transfer: dict[str, dict]) -> dict[str, dict[str, Sample]]:
    """
    All that a protocol tests on, by the field of a record that it is measured for, and by name.

    Raises:
        `UserError`: If one of them is not here, or is another text.
    """
    return {
        "test": {package: read_package(package, **wanted) for package, wanted in test.items()},
        "transfer": {name: read_descriptions(**wanted) for name, wanted in transfer.items()},
    }


def read_package(package: str, release: str, characters: int) -> Sample:
    """
    The code of an installed package, without its tests: of its files, in an order that depends on their names' hashes,
    as many as hold that many characters.

    Args:
        package (`str`): Its name.
        release (`str`): The version that it has to have.
        characters (`int`): Characters of the files together, no more than these.

    Raises:
        `UserError`: If it is not installed, or in another version.
    """
    spec = importlib.util.find_spec(package)
    installed = version(package) if spec is not None else "nothing"
    if installed != release:
        raise UserError(f"The study tests on {package} {release}, and {installed} is installed: pip install it.")
    corpus = load_corpus(Path(spec.origin).parent, validation_share=0)
    chosen: list[Document] = []
    for document in sorted(corpus.training, key=_hash_of_name):
        if not NOT_TESTED_ON & {*Path(document.name).parts} and document.length <= characters:
            chosen.append(document)
            characters -= document.length
    revision = f"{package} {release}, {len(chosen)} files of {corpus.revision}"
    return Sample(corpus.name, revision, tuple(chosen))


def read_descriptions(sha256: str) -> Sample:
    """
    English prose that is wherever the training text is: paragraphs of the descriptions that its packages come with,
    none twice, in the order of their hashes.

    Args:
        sha256 (`str`): Beginning of the hash that the text has to have.

    Raises:
        `UserError`: If the text is another.
    """
    descriptions = map(_read_description, (pin.package for pin in read_pins()))
    found = {paragraph for description in descriptions for paragraph in _list_prose(description)}
    paragraphs = sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())
    digest = hashlib.sha256("\n".join(paragraphs).encode()).hexdigest()[:16]
    if digest != sha256:
        raise UserError(
            f"The descriptions of the installed packages hold another text than the study is tested on ({digest}, not "
            f"{sha256}): install the packages of constraints.txt."
        )
    return Sample("descriptions of packages", f"{len(paragraphs)} paragraphs of sha256:{digest}", tuple(paragraphs))


def _read_description(package: str) -> str:
    """Wherever its metadata has it: below the headers, or among them."""
    try:
        metadata = distribution(package).metadata
    except PackageNotFoundError as error:
        raise UserError(
            f"The study is tested on the description of {package}, which is not installed: install the packages of "
            "constraints.txt."
        ) from error
    return metadata.get_payload() or metadata.get("Description", "")


def _list_prose(description: str) -> Iterator[str]:
    """Paragraphs that are sentences, rather than code, lists, tables or links; white space is one space."""
    for part in re.split(r"\n\s*\n", description):
        paragraph = " ".join(part.split())
        plain = sum(character.isalpha() or character == " " for character in paragraph)
        if (
            len(paragraph.split()) >= FEWEST_WORDS
            and paragraph[0].isupper()
            and paragraph.endswith(".")
            and plain >= PLAIN_SHARE * len(paragraph)
        ):
            yield paragraph


def _hash_of_name(document: Document) -> str:
    return hashlib.sha256(document.name.encode()).hexdigest()
