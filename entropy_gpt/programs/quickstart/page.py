"""
Writes the table of docs/quickstart.md and the committed cards from committed results:

    python -m entropy_gpt.programs.quickstart.page
"""

from pathlib import Path

from entropy_gpt.evaluation.origin import ROOT
from entropy_gpt.evaluation.records.results import load_results
from entropy_gpt.evaluation.showing.comparison import comparison_markdown
from entropy_gpt.evaluation.showing.markdown import replace_block
from entropy_gpt.evaluation.showing.model_card import model_card


QUICKSTART_RESULTS = ROOT / "model_cards" / "results" / "quickstart.json"
PAGE = ROOT / "docs" / "quickstart.md"
CARDS = ROOT / "model_cards"
BLOCK = "quickstart results"


def update_page(page: Path = PAGE, results: Path = QUICKSTART_RESULTS):
    """
    Replaces the page's table by one of the committed results.

    Raises:
        `ValueError`: If the page has no place for it, or the results can't be shown.
    """
    replace_block(page, BLOCK, comparison_markdown(load_results(results)))


def write_cards(folder: Path = CARDS, results: Path = QUICKSTART_RESULTS):
    """Writes the card of each model of the committed quickstart, by the model's name."""
    for result in load_results(results):
        model_card(result).save(folder / f"{result.name}.md")


if __name__ == "__main__":
    update_page()
    write_cards()
