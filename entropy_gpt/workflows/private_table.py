"""Measures the paper's table of private inference, and keeps what is measured."""

import re
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.costs.cost_plots import draw_costs
from entropy_gpt.evaluation.private_inference.costs.measured_inference import Inference
from entropy_gpt.evaluation.private_inference.costs.paper_table import (
    NOTATIONS,
    PaperTable,
    add_up_all,
    find_cheapest,
    list_rows,
    page_markdown,
    take_blocks,
    take_ends,
)
from entropy_gpt.evaluation.private_inference.parties.engine import check_engine
from entropy_gpt.evaluation.private_inference.program.cost import LAN, MEGA, WAN, InferenceCost, Network, parse_network
from entropy_gpt.terminal.private_cost import HEAD_SIZE
from entropy_gpt.terminal.progress import progress_display
from entropy_gpt.terminal.tables import make_table
from entropy_gpt.training.files import is_finished, written_whole
from entropy_gpt.training.progress import Stage


MEASURED, TABLE, PICTURE = "measured", "table.md", "costs.png"

console = Console()


def run(
    notations: list[str] | None,
    sizes: dict,
    context: int,
    networks: list[str],
    whole: bool,
    output: Path,
    timeout: int,
    dry_run: bool,
):
    """
    Measures what is not measured yet, and shows the table.

    Args:
        notations (`list[str]`, *optional*): Architectures, in place of the paper's.
        sizes (`dict`): Fields of the config; of `n_head`, `None` stands for heads of 64 numbers.
        context (`int`): Tokens of the prompt.
        networks (`list[str]`): As [`parse_network`] reads them, beside LAN and WAN.
        whole (`bool`): Whether the cheapest architecture is run whole too.
        output (`Path`): Folder for records, table and picture.
        timeout (`int`): Seconds for which nothing may happen.
        dry_run (`bool`): Whether to show only what would be measured.

    Raises:
        `UserError`: If an architecture or a network is not known, the engine is missing or fails, or the folder
            holds something else.
    """
    sizes = {**sizes, "n_head": sizes["n_head"] or max(1, sizes["n_embd"] // HEAD_SIZE)}
    try:
        shown = tuple(dict.fromkeys((LAN, WAN, *map(parse_network, networks))))
        rows = list_rows(notations or NOTATIONS, context, **sizes)
        plan = [*map(take_blocks, rows), take_ends(rows[0])]
        _check_output(output)
        # Records of other conditions are refused before anything is measured.
        for inference in (*plan, *(map(_name_whole, rows[1:]) if whole else ())):
            _load(inference, output)
        if not dry_run:
            check_engine()
    except (PrivateInferenceError, ValueError) as error:
        raise UserError(str(error)) from error
    if dry_run:
        _print_plan(rows, plan, whole, output)
        return
    table = _measure_all(rows, plan, whole, shown, output, timeout)
    _write(table, output)
    _print(table, output)


def _check_output(output: Path):
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file. Give the name of a folder.")
    if output.exists() and any(map(is_finished, output.iterdir())) and not (output / MEASURED).is_dir():
        raise UserError(f"{output} is there already and holds no benchmark: give another --output.")


def _name_whole(row: Inference) -> Inference:
    """The same, told from its blocks."""
    return replace(row, title=f"{row.title}, whole")


def _load(inference: Inference, output: Path) -> InferenceCost | None:
    return inference.load_measured(_place(inference, output))


def _place(inference: Inference, output: Path) -> Path:
    return output / MEASURED / f"{re.sub(r'[^a-z0-9]+', '-', inference.title.lower()).strip('-')}.json"


def _measure_all(
    rows: list[Inference],
    plan: list[Inference],
    whole: bool,
    networks: tuple[Network, ...],
    output: Path,
    timeout: int,
) -> PaperTable:
    """The blocks of each row and the ends, as planned, and then the cheapest row whole if that is asked for."""
    with progress_display(console) as progress:

        def obtain(inference: Inference, number: int) -> InferenceCost:
            with progress.stage(f"{number} of {len(plan) + whole}: {inference.title}") as line:
                cost = _load(inference, output)
                if cost is None:
                    return _measure(inference, output, timeout, line)
                line.say("measured before")
                return cost

        *blocks, ends = (obtain(inference, number) for number, inference in enumerate(plan, 1))
        sums = add_up_all(rows, {row.title: cost for row, cost in zip(rows, blocks, strict=True)}, ends)
        cheapest = find_cheapest(rows, {title: total.total_bytes for title, total in sums.items()})
        return PaperTable(sums, ends, obtain(_name_whole(cheapest), len(plan) + 1) if whole else None, networks)


def _measure(inference: Inference, output: Path, timeout: int, line: Stage) -> InferenceCost:
    def show(event: dict):
        if event["event"] == "program":
            line.reach(0, event["steps"])
        elif event["event"] == "step":
            place = "" if event["cost"]["layer"] is None else f"layer {event['cost']['layer']}, "
            line.say(place + event["cost"]["operation"])
            line.advance()

    cost = inference.measure(timeout_seconds=timeout, on_event=show)
    with written_whole(_place(inference, output)) as path:
        cost.save(path)
    line.say(f"{cost.total_bytes / MEGA:,.1f} MB")
    return cost


def _print_plan(rows: list[Inference], plan: list[Inference], whole: bool, output: Path):
    totals = {row.title: row.predict_bytes() for row in rows}
    plan = [*plan, *([_name_whole(find_cheapest(rows, totals))] if whole else ())]
    lines = [
        (
            inference.title,
            str(inference.config.n_layer),
            f"{inference.predict_bytes() / MEGA:,.1f}",
            "measured before" if _load(inference, output) else "to be measured",
        )
        for inference in plan
    ]
    console.print(make_table(("inference", "blocks", "MB,\npredicted", ""), lines))
    sums = [(title, f"{total / MEGA:,.1f}") for title, total in totals.items()]
    console.print(make_table(("the whole model", "MB, predicted"), sums))


def _write(table: PaperTable, output: Path):
    with written_whole(output / TABLE) as path:
        path.write_text(page_markdown(table, PICTURE), encoding="utf-8")
    with written_whole(output / PICTURE) as path:
        draw_costs(table.sums, path)


def _print(table: PaperTable, output: Path):
    console.print(make_table(table.headings, table.rows, folded={0}))
    for note in table.notes:
        console.print(note, markup=False, highlight=False)
    for title, path in {"table": TABLE, "picture": PICTURE, "records": MEASURED}.items():
        console.print(f"{title}: {output / path}", markup=False, soft_wrap=True)
