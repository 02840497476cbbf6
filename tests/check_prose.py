"""
Finds prose that is hard to read, in the documentation's pages and in docstrings and comments:

    python -m tests.check_prose

Prints a line for each finding, with its place and the remedy; the exit status is 1 if there is any.
"""

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

from .pages import PAGES, ROOT


# Folders whose docstrings and comments are checked.
FOLDERS = ("modeling_entropy_gpt", "conversion", "training", "evaluation", "entropy_gpt")
WORDS = {
    r"\(`[^)]*`[^)]*\): Of\b": 'no definition begins with "Of": name the thing',
    r"# Of\b": 'no comment begins with "Of": name the thing',
    r"\b(?:tell|tells|told)\b(?! \(`)": "say, show, report, list",
    r"\bso many\b": "as many, this many, or the number",
    r'(?<!")(?<!--folded )\bbeside\b(?!")': "compared with, next to, in addition to",
}
LONGEST_SENTENCE = 25  # words
LONGEST_PARAGRAPH = 5  # lines
# From Python 3.12 on, the text of an f-string is a token of its own.
TOKENS = (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
FENCE = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!--.*?-->")
CODE = re.compile(r"`[^`]*`")
# Conditions that are folded away are lists of settings and versions.
FOLDED = re.compile(r"^<details.*?^</details>$", re.DOTALL | re.MULTILINE)
# Tables, equations, headings, pictures, markup and rows of links are no sentences.
NO_PROSE = re.compile(r"^(?:\||    |#|!\[|<|---|\[.*\) ·$)")
ITEM = re.compile(r"^ *(?:[-*]|\d+\.) ")


def find_words(text: str) -> Iterator[tuple[int, str]]:
    """Lines with words that have a better one, and the remedy."""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("|"):  # rows of tables hold data
            continue
        for pattern, remedy in WORDS.items():
            if found := re.search(pattern, line):
                yield number, f"{found[0]!r}: {remedy}"


def find_length(text: str) -> Iterator[tuple[int, str]]:
    """Sentences and paragraphs of a page that are too long."""
    for first, lines in _paragraphs(_blank(FOLDED, text)):
        if len(lines) > LONGEST_PARAGRAPH:
            yield first, f"a paragraph of {len(lines)} lines: {LONGEST_PARAGRAPH} at most"
        for sentence in re.split(r"(?<=[.!?])[)*\"]*\s+(?=\W*[A-Z0-9])", _plain(" ".join(lines))):
            if (count := len(sentence.split())) > LONGEST_SENTENCE:
                start = " ".join(sentence.split()[:6])
                yield first, f"a sentence of {count} words ({start} ...): {LONGEST_SENTENCE} at most"


def read_prose(path: Path) -> str:
    """The text of a page without code, or the strings and comments of a module; lines keep their numbers."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return CODE.sub("Code", COMMENT.sub("", _blank(FENCE, text)))
    lines = [""] * (text.count("\n") + 1)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in TOKENS:
            for number, line in enumerate(token.string.splitlines(), start=token.start[0] - 1):
                lines[number] += line
    return "\n".join(lines)


def _blank(pattern: re.Pattern, text: str) -> str:
    """Without what the pattern matches; lines keep their numbers."""
    return pattern.sub(lambda found: "\n" * found[0].count("\n"), text)


def _paragraphs(text: str) -> Iterator[tuple[int, list[str]]]:
    first, lines = 0, []
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        ends = not line.strip() or (NO_PROSE.match(line) and not lines) or line.startswith(("|", "<"))
        if lines and (ends or ITEM.match(line)):
            yield first, lines
            lines = []
        if not ends:
            first = first if lines else number
            lines.append(line.strip())


def _plain(text: str) -> str:
    """Links as their text."""
    return ITEM.sub("", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text))


def main() -> int:
    """The exit status."""
    modules = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    pages = [*PAGES, ROOT / "CHANGELOG.md"]
    found = 0
    for path in (*pages, *modules):
        text = read_prose(path)
        findings = [*find_words(text), *(find_length(text) if path in PAGES else ())]
        for line, remedy in sorted(findings):
            print(f"{path.relative_to(ROOT)}:{line}: {remedy}")
        found += len(findings)
    return min(found, 1)


if __name__ == "__main__":
    sys.exit(main())
