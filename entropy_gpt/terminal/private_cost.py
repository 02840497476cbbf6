"""Prints the predicted cost of private inference."""

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console

from entropy_gpt.evaluation.private_inference.program.cost import MEGA, project
from entropy_gpt.evaluation.private_inference.program.networks import Network
from entropy_gpt.workflows.private_cost import PredictedCost, private_cost

from .private import choose_network, read_networks
from .progress import format_seconds
from .tables import break_path, print_side_by_side


console = Console()


def run(architectures: list[str], networks: Sequence[str], kept: int, length: int, **options):
    """
    Prints the megabytes of each operation, the round trips and the time of each architecture, side by side.

    Args:
        architectures (`list[str]`): Notations and models; the others are compared with the first one.
        networks (`Sequence[str]`): Networks to estimate the time for; LAN and WAN if there are none. Forms are chosen
            for the first, or a WAN.
        kept (`int`): Earlier tokens, whose keys and values are cached.
        length (`int`): Tokens of the prompt.
        options: Further arguments of [`private_cost`].

    Raises:
        `UserError`: If an architecture or a network is not known, or the sizes do not fit.
    """
    shown = read_networks(networks)
    chosen_for, titles = choose_network(networks), list(dict.fromkeys(architectures))
    costs = private_cost(titles, kept=kept, length=length, network=chosen_for, **options)
    parts = [cost.by_operation for cost in costs]
    operations = list(dict.fromkeys(name for part in parts for name in part))
    rows = [(name, *(f"{part.get(name, 0) / MEGA:,.1f}" for part in parts)) for name in operations]
    rows.append(("all", *(f"{cost.total_bytes / MEGA:,.1f}" for cost in costs)))
    rows.append(("times fewer", *(f"{costs[0].total_bytes / cost.total_bytes:.2f}" for cost in costs)))
    rows.append(("round trips", *(f"{cost.round_trips:,.0f}" for cost in costs)))
    for network in shown:
        rows.append((f"on {network.name}", *(format_seconds(project(cost, network)) for cost in costs)))
    if any(cost.before for cost in costs):
        rows += _first_phase_rows([cost.first_phase for cost in costs], shown)
    print_side_by_side(console, ("MB, both\nparties", *map(_heading, costs)), rows)
    for sizes, titles in _group_by_sizes(costs, length).items():
        names = f"{', '.join(titles)}: " if len(titles) < len(costs) else ""
        console.print(f"{names}{sizes}", markup=False, highlight=False)
    console.print(
        f"Predicted for the protocol cheetah in the forms for {chosen_for}, with two cores for both parties, without "
        f"the set-up of a connection: {_describe_set_up(costs[0], kept + length)}.",
        style="dim",
    )


def _first_phase_rows(costs: Sequence[PredictedCost], networks: Iterable[Network]) -> Iterator[tuple[str, ...]]:
    yield "before the prompt", *(f"{cost.total_bytes / MEGA:,.1f}" for cost in costs)
    yield "round trips before", *(f"{cost.round_trips:,.0f}" for cost in costs)
    for network in networks:
        yield f"before, on {network.name}", *(format_seconds(project(cost, network)) for cost in costs)


def _heading(cost: PredictedCost) -> str:
    """The architecture in lines of its parts; a model has its path before."""
    notation = cost.config.notation
    name = "" if cost.title == notation else f"{break_path(cost.title)}\n"
    return name + notation.replace("+", "+\n")


def _group_by_sizes(costs: list[PredictedCost], length: int) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for cost in costs:
        config = cost.config
        sizes = (
            f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd:,}, vocabulary of "
            f"{config.vocab_size:,}, prompt of {length:,} tokens"
        )
        groups.setdefault(sizes, []).append(cost.title)
    return groups


def _describe_set_up(cost: PredictedCost, positions: int) -> str:
    keys = f"{cost.key_bytes / MEGA:.0f} MB"
    if not cost.table_bytes:
        return keys
    return f"{keys} and {cost.table_bytes / MEGA:,.0f} MB for tables of {positions:,} positions"
