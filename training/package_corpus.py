"""
Python code of installed packages as a corpus: the pinned text on every machine, or an error that says what differs.

    python -m entropy_gpt.training.package_corpus  pins what the packages of constraints.txt hold here
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from .corpus import Corpus, Document, is_text
from .errors import CorpusError


PINS = Path(__file__).with_name("python_packages.json")
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
# Packages whose code is tested on, which is not trained on.
TESTED_ON = frozenset({"networkx", "sympy"})
# Packages that some Python or platform that is supported does not install. So are those whose constraint has a marker.
NOT_EVERYWHERE = frozenset({"cachetools", "jax", "jaxlib", "opt_einsum", "spu", "termcolor", "triton"})
# Tests, and what says which build of a release this is.
NOT_READ = frozenset({"test", "tests", "testing", "version.py", "_version.py"})
# Longer files are tables in the guise of code.
LONGEST_FILE = 250_000
# Validation has packages with no more characters than these, and no more than these of a file, so that it has many.
LARGEST_VALIDATED, LONGEST_VALIDATED = 1_000_000, 10_000
# Hexadecimal digits of a file's hash that a pin keeps.
DIGITS = 8


@dataclass(frozen=True)
class Pin:
    """
    What is known of a package.

    Args:
        package (`str`): Its name.
        version (`str`): Its version, without the build.
        licence (`str`): Its licence, as its metadata names it.
        characters (`int`): Characters of its files, before those of the same text are dropped.
        hashes (`str`): Beginnings of the SHA-256 of its files, one after the other in the order of their names.
    """

    package: str
    version: str
    licence: str
    characters: int
    hashes: str


def load_packages(validation_share: float = 0.05, pins: Path = PINS) -> Corpus:
    """
    The Python code of pinned packages, without their tests and without files of more than a quarter of a million
    characters. Of files with the same text, the first is kept. Documents are in the order of their names' hashes.

    Whole packages are kept for validation, as files of one package resemble each other. Of their files, the beginning
    is read.

    Args:
        validation_share (`float`): Part of the characters whose packages are kept for validation.
        pins (`Path`): The file with the pins.

    Raises:
        `CorpusError`: If a package is missing or in another version, or a file is another than the pinned one.
    """
    found: dict[str, tuple[Document, str]] = {}
    packages: dict[str, str] = {}
    known = read_pins(pins)
    for pin in known:
        package = _find(pin.package)
        if package is None or _release(package) != pin.version:
            installed = "not installed" if package is None else f"{_release(package)} here"
            raise CorpusError(
                f"The corpus has the code of {pin.package} {pin.version}, which is {installed}: pip install "
                f"{pin.package}=={pin.version}."
            )
        documents = list(_read(package))
        _check(pin, documents)
        for document, digest in documents:
            found.setdefault(digest, (document, digest))
            packages.setdefault(digest, pin.package)
    documents = sorted(found.values(), key=lambda each: hashlib.sha256(each[0].name.encode()).digest())
    content = hashlib.sha256("\n".join(f"{document.name} {digest}" for document, digest in documents).encode())
    revision = f"{len(known)} packages, {len(documents)} files sha256:{content.hexdigest()[:16]}"
    held_out = _choose_validated(known, validation_share)
    return Corpus(
        name="Python packages",
        revision=revision,
        training=tuple(document for document, digest in documents if packages[digest] not in held_out),
        validation=tuple(
            replace(document, length=min(document.length, LONGEST_VALIDATED))
            for document, digest in documents
            if packages[digest] in held_out
        ),
    )


def hash_pins(path: Path = PINS) -> str:
    """Tells pins from others, and with them the text."""
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def read_pins(path: Path = PINS) -> list[Pin]:
    """The pins of a file, in its order."""
    return [Pin(**pin) for pin in json.loads(path.read_text(encoding="utf-8"))]


def pin_packages(names: list[str]) -> list[Pin]:
    """What the installed packages of these names hold; those without Python code are left out."""
    pins = []
    for name in sorted(names, key=str.lower):
        if (package := _find(name)) is not None and (documents := list(_read(package))):
            hashes = "".join(digest[:DIGITS] for _, digest in documents)
            characters = sum(document.length for document, _ in documents)
            pins.append(Pin(name, _release(package), _licence(package), characters, hashes))
    return pins


def _choose_validated(pins: list[Pin], share: float) -> set[str]:
    """Packages that hold this share of the characters, or little more, in the order of their names' hashes."""
    wanted = round(share * sum(pin.characters for pin in pins))
    held_out: set[str] = set()
    held = 0
    for pin in sorted(pins, key=lambda pin: hashlib.sha256(pin.package.encode()).digest()):
        if held < wanted and pin.characters <= LARGEST_VALIDATED and held + pin.characters <= 1.5 * wanted:
            held_out.add(pin.package)
            held += pin.characters
    return held_out


def _find(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _release(package: Distribution) -> str:
    """The version, without the name of a build such as `+cpu`."""
    return package.version.partition("+")[0]


def _licence(package: Distribution) -> str:
    """As short as the metadata has it: an SPDX expression, the classifiers, or the first line of a text."""
    classifiers = [text for text in package.metadata.get_all("Classifier") or () if text.startswith("License :: ")]
    named = ", ".join(text.rpartition(" :: ")[2] for text in classifiers)
    first_line = (package.metadata["License"] or "not named").strip().partition("\n")[0]
    return package.metadata["License-Expression"] or named or first_line


def _read(package: Distribution) -> Iterator[tuple[Document, str]]:
    """The package's documents in the order of their names, each with the hash of its text."""
    for name in sorted(str(file) for file in package.files or () if file.suffix == ".py"):
        path = Path(package.locate_file(name))
        if NOT_READ & {*Path(name).parts} or name.startswith("..") or not path.is_file():
            continue
        content = path.read_bytes()
        if is_text(content) and (text := content.decode()).strip() and len(text) <= LONGEST_FILE:
            yield Document(name, path, len(text)), hashlib.sha256(content).hexdigest()


def _check(pin: Pin, documents: list[tuple[Document, str]]):
    pinned = [pin.hashes[start : start + DIGITS] for start in range(0, len(pin.hashes), DIGITS)]
    for (document, digest), expected in zip(documents, pinned, strict=False):
        if digest[:DIGITS] != expected:
            raise CorpusError(
                f"{document.path} is not the file of {pin.package} {pin.version} that the corpus was made of: install "
                f"it anew, with {_remedy(pin)}."
            )
    if len(documents) != len(pinned):
        raise CorpusError(
            f"{pin.package} {pin.version} has {len(documents)} files of Python here, and the corpus was made of "
            f"{len(pinned)}: install it anew, with {_remedy(pin)}."
        )


def _remedy(pin: Pin) -> str:
    return f"pip install --force-reinstall --no-deps {pin.package}=={pin.version}"


def _write(constraints: Path = CONSTRAINTS, pins: Path = PINS):
    lines = [line for line in constraints.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    names = {pinned.name for pinned in map(Requirement, lines) if pinned.marker is None} - TESTED_ON - NOT_EVERYWHERE
    rows = [json.dumps(dataclasses.asdict(pin)) for pin in pin_packages([*names])]
    pins.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    _write()
