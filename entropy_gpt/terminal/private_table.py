"""Measures the paper's table of private inference, and prints its plan or the table."""

from collections.abc import Sequence

from rich.console import Console

from entropy_gpt.evaluation.private_inference.costs.paper_table import PaperTable
from entropy_gpt.evaluation.private_inference.program.cost import MEGA
from entropy_gpt.workflows.private_table import (
    MEASURED,
    PICTURE,
    TABLE,
    TablePlan,
    measure_table,
    plan_table,
    predict_duration,
)

from .progress import format_seconds, progress_display
from .tables import make_table


GIGA = 1e9

console = Console()


def run(notations: Sequence[str] | None, dry_run: bool, **options):
    """
    Measures and prints the table, or only prints what would be measured.

    Args:
        notations (`Sequence[str]`, *optional*): Architectures. Default: the paper's four.
        dry_run (`bool`): Whether to measure and write nothing.
        options: Further arguments of [`plan_table`].

    Raises:
        `UserError`: If an architecture or a network is not known, the engine is missing or fails, or the folder holds
            something else.
    """
    plan = plan_table(notations, **options)
    if dry_run:
        _print_plan(plan)
        return
    with progress_display(console) as progress:
        table = measure_table(plan, progress)
    _print_table(table, plan)


def _print_plan(plan: TablePlan):
    totals, missing = plan.predicted_bytes, plan.missing
    inferences = [*plan.parts, *([plan.find_whole(totals)] if plan.whole else ())]
    lines = [
        (
            inference.title,
            str(inference.config.n_layer),
            f"{inference.predict_bytes() / MEGA:,.1f}",
            "to be measured" if inference in missing else "measured before",
        )
        for inference in inferences
    ]
    console.print(make_table(("inference", "blocks", "MB,\npredicted", ""), lines, folded={0}))
    sums = [(title, f"{total / MEGA:,.1f}") for title, total in totals.items()]
    console.print(make_table(("the whole model", "MB, predicted"), sums, folded={0}))
    sent = sum(inference.predict_bytes() for inference in missing) / GIGA
    console.print(
        f"To be measured: about {format_seconds(predict_duration(plan))} on two cores, and {sent:,.2f} GB over this "
        "machine's loopback. Nothing was measured or written.",
        highlight=False,
    )


def _print_table(table: PaperTable, plan: TablePlan):
    console.print(make_table(table.headings, table.rows, folded={0}))
    if table.phases:
        console.print(make_table(table.phase_headings, table.phase_rows, folded={0}))
    for note in table.notes:
        console.print(note, markup=False, highlight=False)
    for title, path in {"table": TABLE, "picture": PICTURE, "records": MEASURED}.items():
        if (plan.output / path).exists():
            console.print(f"{title}: {plan.output / path}", markup=False, soft_wrap=True)
