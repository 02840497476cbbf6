"""The check of prose: what it finds, and what it leaves alone."""

import pytest

from .check_prose import find_length, find_words, read_prose


@pytest.mark.parametrize(
    "line",
    [
        "        seed (`int`): Of the order.",
        "# Of a batch, what the original is given.",
        "This page tells what it costs.",
        "Documents are read until there are so many blocks.",
        "ours beside theirs",
    ],
)
def test_words_that_have_better_ones_are_found(line):
    ((number, _),) = find_words(f"Fine.\n{line}\n")
    assert number == 2


def test_other_words_are_left_alone():
    assert not [*find_words("Of the two, besides the first, none foretells it.\nSeed of the order.\n| a beside b |\n")]


def test_long_sentences_are_found_where_their_paragraph_begins():
    text = f"# Heading\n\nShort.\n\nOne {'more ' * 24}here. Short again.\n\n{'word ' * 25}end.\n"
    assert [number for number, _ in find_length(text)] == [5, 7]


def test_long_paragraphs_are_found_and_items_are_paragraphs_of_their_own():
    assert [number for number, _ in find_length("A line.\n" * 6)] == [1]
    assert not [*find_length("- An item.\n" * 6)]
    assert not [*find_length("| a | b |\n" * 30)]


def test_code_and_what_is_folded_away_are_no_prose(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\ntells beside\n```\nThe option `--folded beside` is code.\n")
    assert not [*find_words(read_prose(page))]
    assert not [*find_length(f"<details>\n{'word ' * 40}\n</details>\n")]


def test_modules_are_read_by_their_strings_and_comments(tmp_path):
    module = tmp_path / "module.py"
    module.write_text('told = 1\n"""It is told."""\nother = told  # it tells\n')
    assert [number for number, _ in find_words(read_prose(module))] == [2, 3]
