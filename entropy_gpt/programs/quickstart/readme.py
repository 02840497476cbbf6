"""
Writes the README's table and the committed cards from committed results:

    python -m entropy_gpt.programs.quickstart.readme
"""

import re
from pathlib import Path

from entropy_gpt.evaluation.records.results import load_results
from entropy_gpt.evaluation.showing.comparison import comparison_markdown
from entropy_gpt.evaluation.showing.model_card import model_card


ROOT = Path(__file__).resolve().parents[3]
QUICKSTART_RESULTS = ROOT / "model_cards" / "results" / "quickstart.json"
README = ROOT / "README.md"
CARDS = ROOT / "model_cards"
QUICKSTART_BLOCK = "quickstart results"


def find_block(text: str, name: str) -> re.Match | None:
    """What stands between the two comments that enclose a generated part."""
    return re.search(f"(?<=<!-- {name}: begin -->\n).*?(?=<!-- {name}: end -->)", text, re.DOTALL)


def replace_block(page: Path, name: str, content: str):
    """
    Replaces a generated part of the README, or of another page.

    Raises:
        `ValueError`: If the page lacks the two comments that enclose it.
    """
    text = page.read_text(encoding="utf-8")
    block = find_block(text, name)
    if block is None:
        raise ValueError(f"{page} has no place for the part {name!r}: give it <!-- {name}: begin --> and end.")
    page.write_text(f"{text[: block.start()]}\n{content}\n{text[block.end() :]}", encoding="utf-8")


def update_readme(readme: Path = README, results: Path = QUICKSTART_RESULTS):
    """
    Replaces the table in the README by one of the committed results.

    Raises:
        `ValueError`: If the README has no place for it, or the results can't be shown.
    """
    replace_block(readme, QUICKSTART_BLOCK, comparison_markdown(load_results(results)))


def write_cards(folder: Path = CARDS, results: Path = QUICKSTART_RESULTS):
    """Writes the card of each model of the committed quickstart, by the model's name."""
    for result in load_results(results):
        model_card(result).save(folder / f"{result.name}.md")


if __name__ == "__main__":
    update_readme()
    write_cards()
