"""The README's table and the committed cards, from committed results: `python -m evaluation.readme` writes them."""

import re
from pathlib import Path

from .comparison import comparison_markdown
from .model_card import model_card
from .results import load_results


ROOT = Path(__file__).resolve().parent.parent
QUICKSTART_RESULTS = ROOT / "model_cards" / "results" / "quickstart.json"
README = ROOT / "README.md"
CARDS = ROOT / "model_cards"
BEGIN, END = "<!-- quickstart results: begin -->\n", "<!-- quickstart results: end -->"
README_BLOCK = re.compile(f"(?<={BEGIN}).*?(?={END})", re.DOTALL)


def update_readme(readme: Path = README, results: Path = QUICKSTART_RESULTS):
    """
    Replaces the table in the README by one of the committed results.

    Raises:
        `ValueError`: If the README lacks the two comments that enclose the table, or the results can't be shown.
    """
    text = readme.read_text(encoding="utf-8")
    if not README_BLOCK.search(text):
        raise ValueError(f"{readme} has no place for the table: a line {BEGIN.strip()}, and after it {END}.")
    table = comparison_markdown(load_results(results))
    readme.write_text(README_BLOCK.sub(lambda _: f"\n{table}\n", text), encoding="utf-8")


def write_cards(folder: Path = CARDS, results: Path = QUICKSTART_RESULTS):
    """Writes the card of each model of the committed quickstart, by the model's name."""
    for result in load_results(results):
        model_card(result).save(folder / f"{result.name}.md")


if __name__ == "__main__":
    update_readme()
    write_cards()
