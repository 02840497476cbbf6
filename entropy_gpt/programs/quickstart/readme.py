"""
Writes the README's table and the committed cards from committed results:

    python -m entropy_gpt.programs.quickstart.readme
"""

from pathlib import Path

from entropy_gpt.evaluation.origin import ROOT
from entropy_gpt.evaluation.records.results import load_results
from entropy_gpt.evaluation.showing.comparison import comparison_markdown
from entropy_gpt.evaluation.showing.markdown import replace_block
from entropy_gpt.evaluation.showing.model_card import model_card


QUICKSTART_RESULTS = ROOT / "model_cards" / "results" / "quickstart.json"
README = ROOT / "README.md"
CARDS = ROOT / "model_cards"
QUICKSTART_BLOCK = "quickstart results"


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
