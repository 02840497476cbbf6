"""Long texts in pieces that tokenizers make the same tokens of."""

import re
from collections.abc import Iterator


# A document longer than this many characters is tokenised in pieces, if the tokenizer joins nothing between a word and
# the end of its line.
PIECE_CHARACTERS = 1 << 18
PLACE_TO_CUT = re.compile(r"(?<=[^\W_])\n(?=\S)")


def cut_pieces(text: str) -> Iterator[tuple[str, bool]]:
    """
    Pieces of a long text, and whether each is the last: of all of them together, a byte-level tokenizer like GPT-2's
    makes the same tokens as of the whole.
    """
    begin = 0
    while place := PLACE_TO_CUT.search(text, begin + 1 + PIECE_CHARACTERS):  # behind where this piece begins
        yield text[begin : place.start()], False
        begin = place.start()
    yield text[begin:], True
