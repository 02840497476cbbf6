"""The table in the README, out of the committed results of the quickstart: `python -m evaluation.readme` writes it."""

import re
from pathlib import Path

from .comparison import comparison_markdown
from .results import load_results


ROOT = Path(__file__).resolve().parent.parent
QUICKSTART_RESULTS = ROOT / "model_cards" / "results" / "quickstart.json"
README = ROOT / "README.md"
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


if __name__ == "__main__":
    update_readme()
