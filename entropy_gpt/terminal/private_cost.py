"""Prints the predicted cost of private inference."""

from rich.console import Console

from entropy_gpt.workflows.private_cost import PredictedCost, private_cost

from .tables import make_table


console = Console()


def run(notations: list[str], kept: int, length: int, **options):
    """
    Prints the megabytes of each operation and the round trips of each architecture, side by side.

    Args:
        notations (`list[str]`): Architectures; the others are compared with the first one.
        kept (`int`): Earlier tokens, whose keys and values are cached.
        length (`int`): Tokens of the prompt.
        options: Further arguments of [`private_cost`].

    Raises:
        `UserError`: If an architecture is not known, or the sizes do not fit.
    """
    costs = private_cost(list(dict.fromkeys(notations)), kept=kept, length=length, **options)
    parts = [cost.by_operation for cost in costs]
    operations = list(dict.fromkeys(name for part in parts for name in part))
    rows = [(name, *(f"{part.get(name, 0) / 1e6:,.1f}" for part in parts)) for name in operations]
    rows.append(("all", *(f"{cost.total_bytes / 1e6:,.1f}" for cost in costs)))
    rows.append(("times fewer", *(f"{costs[0].total_bytes / cost.total_bytes:.2f}" for cost in costs)))
    console.print(make_table(("MB, both\nparties", *(cost.notation.replace("+", "+\n") for cost in costs)), rows))
    round_trips = (f"{cost.notation} {cost.round_trips:,.0f}" for cost in costs)
    console.print(f"round trips: {', '.join(round_trips)}", highlight=False)
    console.print(
        f"Predicted for the protocol cheetah, without the set-up of a connection: "
        f"{_describe_set_up(costs[0], kept + length)}.",
        style="dim",
    )


def _describe_set_up(cost: PredictedCost, positions: int) -> str:
    keys = f"{cost.key_bytes / 1e6:.0f} MB"
    if not cost.table_bytes:
        return keys
    return f"{keys} and {cost.table_bytes / 1e6:,.0f} MB for tables of {positions:,} positions"
