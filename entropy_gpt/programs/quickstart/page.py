"""
Writes the tables of docs/quickstart.md and docs/ladder.md, and the committed cards, from committed results:

    python -m entropy_gpt.programs.quickstart.page
"""

from collections.abc import Sequence
from pathlib import Path

from entropy_gpt.evaluation.origin import ROOT
from entropy_gpt.evaluation.records.results import ModelResult, load_results
from entropy_gpt.evaluation.showing.comparison import comparison_markdown
from entropy_gpt.evaluation.showing.markdown import replace_block
from entropy_gpt.evaluation.showing.model_card import model_card


# Files with results of models, by the page that shows them.
QUICKSTART_RESULTS = (ROOT / "model_cards" / "results" / "quickstart.json",)
HEALED_RESULTS = tuple(
    ROOT / "model_cards" / "results" / f"healed-{function}.json" for function in ("softmax", "power4")
)
PAGE = ROOT / "docs" / "quickstart.md"
HEALED_PAGE = ROOT / "docs" / "ladder.md"
CARDS = ROOT / "model_cards"
BLOCK, HEALED_BLOCK = "quickstart results", "healed"


def load_all(files: Sequence[Path]) -> list[ModelResult]:
    """The results of all models of these files, in their order."""
    return [result for file in files for result in load_results(file)]


def update_page(page: Path = PAGE, files: Sequence[Path] = QUICKSTART_RESULTS, block: str = BLOCK):
    """
    Replaces a page's table by one of committed results.

    Raises:
        `ValueError`: If the page has no place for it, or the results can't be shown.
    """
    replace_block(page, block, comparison_markdown(load_all(files)))


def write_cards(folder: Path = CARDS):
    """Writes the card of each model of the committed results, by the model's name."""
    for result in load_all((*QUICKSTART_RESULTS, *HEALED_RESULTS)):
        model_card(result).save(folder / f"{result.name}.md")


if __name__ == "__main__":
    update_page()
    update_page(HEALED_PAGE, HEALED_RESULTS, HEALED_BLOCK)
    write_cards()
