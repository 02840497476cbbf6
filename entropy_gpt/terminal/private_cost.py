"""Prices private inference from architectures alone."""

from rich.console import Console

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.costs.cost_model import SET_UP_BYTES, PredictedStep, predict
from entropy_gpt.evaluation.private_inference.program.program import Span, tables_bytes
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from modeling_entropy_gpt import EntropyGPTConfig

from .tables import make_table


HEAD_SIZE = 64

console = Console()


def run(notations: list[str], sizes: dict, kept: int, length: int, all_positions: bool, embedding: str):
    """
    Prints the megabytes of each operation and the round trips of all, side by side.

    Args:
        notations (`list[str]`): Architectures; the first is what the others are compared with.
        sizes (`dict`): Fields of the config; of `n_head`, `None` stands for heads of 64 numbers.
        kept (`int`): Tokens before, whose keys and values are kept.
        length (`int`): Tokens.
        all_positions (`bool`): Whether the logits of all of them are wanted.
        embedding (`str`): As in [`PrivateSettings`].

    Raises:
        `UserError`: If an architecture is not known, or sizes do not fit.
    """
    settings = PrivateSettings(embedding=embedding)
    span = Span(kept, length, length if all_positions else 1)
    steps = {notation: _predict(notation, sizes, settings, span) for notation in notations}
    costs = {notation: _operations(predicted) for notation, predicted in steps.items()}
    operations = list(dict.fromkeys(name for cost in costs.values() for name in cost))
    rows = [(name, *(f"{cost.get(name, 0) / 1e6:,.1f}" for cost in costs.values())) for name in operations]
    totals = [sum(cost.values()) for cost in costs.values()]
    rows.append(("all", *(f"{total / 1e6:,.1f}" for total in totals)))
    rows.append(("times fewer", *(f"{totals[0] / total:.2f}" for total in totals)))
    console.print(make_table(("MB, both\nparties", *(name.replace("+", "+\n") for name in costs)), rows))
    waits = (f"{name} {sum(step.round_trips for step in predicted):,.0f}" for name, predicted in steps.items())
    console.print(f"round trips: {', '.join(waits)}", highlight=False)
    console.print(
        f"predicted for the protocol cheetah; the set-up of a connection, {_set_up(sizes, embedding, span)}, is apart",
        style="dim",
    )


def _set_up(sizes: dict, embedding: str, span: Span) -> str:
    keys = f"{SET_UP_BYTES / 1e6:.0f} MB"
    if embedding != "client_table":
        return keys
    tables = tables_bytes(sizes["vocab_size"], span.end, sizes["n_embd"]) / 1e6
    return f"{keys} and {tables:,.0f} MB for tables of {span.end:,} positions"


def _predict(notation: str, sizes: dict, settings: PrivateSettings, span: Span) -> list[PredictedStep]:
    sizes = {**sizes, "n_head": sizes["n_head"] or max(1, sizes["n_embd"] // HEAD_SIZE)}
    tokens = {"bos_token_id": None, "eos_token_id": None, "n_positions": span.end}
    try:
        config = EntropyGPTConfig.from_notation(notation, **sizes, **tokens)
        config.validate()
        return predict(config, settings, span)
    except (PrivateInferenceError, ValueError) as error:
        raise UserError(f"{notation}: {error}") from error


def _operations(steps: list[PredictedStep]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for step in steps:
        totals[step.operation] = totals.get(step.operation, 0) + step.total_bytes
    return totals
