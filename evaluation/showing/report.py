"""The page about evaluated models: its sections, out of words, tables and pictures."""

from entropy_gpt.evaluation.records.results import ModelResult
from entropy_gpt.evaluation.records.run_log import RunLog

from .page import Page, Paragraph, Picture, Section, Table
from .report_pictures import head_pictures, prediction_pictures, run_pictures, tradeoff_blocks
from .report_summary import summarize
from .report_tables import (
    comparison_table,
    condition_table,
    cost_table,
    model_table,
    operations_table,
    task_table,
    training_table,
)


def build_report(results: list[ModelResult], runs: list[RunLog]) -> Page:
    """
    Makes the page. Sections for which nothing was measured are left out.

    Args:
        results (`list[ModelResult]`): The models; each has a name of its own.
        runs (`list[RunLog]`): Training runs whose curves are shown too.

    Raises:
        `ValueError`: If there are no models, or two have one name.
    """
    if not results:
        raise ValueError("There are no models to report on: give one at least.")
    names = [result.name for result in results]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"Two models are called {twice[0]!r}. Give each a name of its own.")
    sections = {
        "Comparison": [comparison_table(results)],
        "Perplexity and cost": tradeoff_blocks(results),
        "Operations": [operations_table(results)],
        "Tasks": [task_table(results)],
        "Private inference": [cost_table(results)],
        "Prediction": prediction_pictures(results),
        "Attention heads": head_pictures(results),
        "Training": [training_table(results), *run_pictures(runs)],
        "Models and conditions": [model_table(results), condition_table(results)],
    }
    return Page(
        title=f"Evaluation of {names[0]}" if len(names) == 1 else f"Evaluation of {len(names)} models",
        summary=summarize(results),
        sections=[_section(title, blocks) for title, blocks in sections.items() if any(blocks)],
    )


def _section(title: str, blocks: list[Paragraph | Table | Picture | None]) -> Section:
    return Section(title, [block for block in blocks if block is not None])
