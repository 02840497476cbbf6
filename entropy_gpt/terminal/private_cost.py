"""Prints the predicted cost of private inference."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from rich.console import Console

from entropy_gpt.evaluation.private_inference.program.cost import MEGA, project
from entropy_gpt.evaluation.private_inference.program.networks import Network
from entropy_gpt.workflows.private_cost import PredictedCost, private_cost

from .private import choose_network, read_networks
from .progress import format_seconds
from .tables import break_path, print_side_by_side


console = Console()


def run(
    architectures: list[str],
    networks: Sequence[str],
    kept: int,
    length: int,
    max_new_tokens: int = 1,
    **options,
):
    """
    Prints the megabytes of each operation, the round trips and the time of each architecture, side by side.

    Args:
        architectures (`list[str]`): Notations and models; the others are compared with the first one.
        networks (`Sequence[str]`): Networks to estimate the time for; LAN and WAN if there are none. Forms are chosen
            for the first, or a WAN.
        kept (`int`): Earlier tokens, whose keys and values are cached.
        length (`int`): Tokens of the prompt.
        max_new_tokens (`int`): Tokens of the answer.
        options: Further arguments of [`private_cost`].

    Raises:
        `UserError`: If an architecture or a network is not known, or the sizes do not fit.
    """
    shown = read_networks(networks)
    chosen_for, titles = choose_network(networks), list(dict.fromkeys(architectures))
    sizes = {"kept": kept, "length": length, "max_new_tokens": max_new_tokens}
    costs = private_cost(titles, network=chosen_for, **sizes, **options)
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
    if any(cost.plain for cost in costs):
        rows += _draft_rows(costs, shown, max_new_tokens)
    print_side_by_side(console, ("MB, both\nparties", *map(_heading, costs)), rows)
    for sizes, titles in _group_by_sizes(costs, length, max_new_tokens).items():
        names = f"{', '.join(titles)}: " if len(titles) < len(costs) else ""
        console.print(f"{names}{sizes}", markup=False, highlight=False)
    console.print(
        f"Predicted for the protocol cheetah in the forms for {chosen_for}, with two cores for both parties, without "
        f"the set-up of a connection: {_describe_set_up(costs[0], kept + length + max_new_tokens - 1)}.",
        style="dim",
    )
    if (acceptance := options.get("draft_acceptance")) is not None:
        console.print(
            f"Expected, if each draft is right with probability {acceptance:g} where those before it are.",
            style="dim",
        )


def _first_phase_rows(costs: Sequence[PredictedCost], networks: Iterable[Network]) -> Iterator[tuple[str, ...]]:
    yield "before the prompt", *(f"{cost.total_bytes / MEGA:,.1f}" for cost in costs)
    yield "round trips before", *(f"{cost.round_trips:,.0f}" for cost in costs)
    for network in networks:
        yield f"before, on {network.name}", *(format_seconds(project(cost, network)) for cost in costs)


def _draft_rows(
    costs: Sequence[PredictedCost], networks: Sequence[Network], new_tokens: int
) -> Iterator[tuple[str, ...]]:
    """What a pass takes, and a token of the answer, with drafts and without."""
    yield "passes", *(f"{cost.passes:,.1f}" for cost in costs)
    measures: dict[str, tuple[Callable[[PredictedCost], float], Callable[[float], str]]] = {
        "MB": (lambda cost: cost.total_bytes / MEGA, lambda megabytes: f"{megabytes:,.1f}"),
        "round trips": (lambda cost: cost.round_trips, lambda trips: f"{trips:,.0f}"),
    }
    for network in networks:
        measures[f"on {network.name},"] = partial(project, network=network), format_seconds
    for name, (measure, show) in measures.items():
        yield f"{name} a pass", *(show(measure(cost) / cost.passes) for cost in costs)
        yield f"{name} a token", *(show(measure(cost) / new_tokens) for cost in costs)
        yield "  without drafts", *(show(measure(cost.plain) / new_tokens) for cost in costs)


def _heading(cost: PredictedCost) -> str:
    """The architecture in lines of its parts; a model has its path before."""
    notation = cost.config.notation
    name = "" if cost.title == notation else f"{break_path(cost.title)}\n"
    return name + notation.replace("+", "+\n")


def _group_by_sizes(costs: list[PredictedCost], length: int, new_tokens: int) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    answer = f", answer of {new_tokens:,}" if new_tokens > 1 else ""
    for cost in costs:
        config = cost.config
        sizes = (
            f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd:,}, vocabulary of "
            f"{config.vocab_size:,}, prompt of {length:,} tokens{answer}"
        )
        groups.setdefault(sizes, []).append(cost.title)
    return groups


def _describe_set_up(cost: PredictedCost, positions: int) -> str:
    keys = f"{cost.key_bytes / MEGA:.0f} MB"
    if not cost.table_bytes:
        return keys
    return f"{keys} and {cost.table_bytes / MEGA:,.0f} MB for tables of {positions:,} positions"
