"""Measurement of the paper's table of private inference. Each measurement is saved as soon as it is complete."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from entropy_gpt.conversion.early_checks import expanded
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.costs.measured_inference import Inference
from entropy_gpt.evaluation.private_inference.costs.paper_table import (
    NOTATIONS,
    PaperTable,
    add_up_all,
    add_up_phases,
    find_cheapest,
    list_rows,
    page_markdown,
    take_blocks,
    take_ends,
    take_prepared_parts,
)
from entropy_gpt.evaluation.private_inference.parties.engine import check_engine
from entropy_gpt.evaluation.private_inference.program.cost import MEGA, InferenceCost
from entropy_gpt.evaluation.private_inference.program.networks import LAN, WAN, Network, parse_network
from entropy_gpt.training.claims import claimed
from entropy_gpt.training.files import written_whole
from entropy_gpt.training.progress import SILENT, Progress, Stage

from .options import as_tuple, check_positive, with_argument_names
from .output_folder import BENCHMARK
from .private_answer import show_event
from .private_cost import count_heads


MEASURED, TABLE, PICTURE = BENCHMARK.record, "table.md", "costs.png"
DEFAULT_TIMEOUT = 1200


@with_argument_names
def private_table(
    notations: Sequence[str] | None = None,
    *,
    output: str | Path,
    n_layer: int = 12,
    n_embd: int = 768,
    n_head: int | None = None,
    vocab_size: int = 50257,
    context: int = 128,
    networks: Sequence[str] = (),
    whole: bool = False,
    prepared: bool = False,
    timeout: int = DEFAULT_TIMEOUT,
    progress: Progress = SILENT,
) -> PaperTable:
    """
    Measures the cost of architectures between two processes, as `entropy-gpt private benchmark` does.

    The first and the last block, one block of each kind in between, the embedding and the head are measured and added
    up. An interrupted measurement continues when it is called again with the same arguments.

    Args:
        notations (`Sequence[str]`, *optional*): Architectures, in the paper's notation. Default: the paper's four.
        output (`str` or `Path`): Folder for measurements, table and picture.
        n_layer, n_embd, vocab_size (`int`): The sizes of all models.
        n_head (`int`, *optional*): Heads. Default: heads of about 64 dimensions.
        context (`int`): Tokens of the prompt.
        networks (`Sequence[str]`): Networks besides LAN and WAN to estimate seconds for, such as "300Mbps,20ms".
            Operations take their forms for the first one, or for a WAN.
        whole (`bool`): Also run the cheapest architecture as a whole, to verify the sum of its parts.
        prepared (`bool`): Also measure each architecture in two phases.
        timeout (`int`): Seconds without any event after which a measurement fails.
        progress (`Progress`): Receives a stage for each measurement.

    Returns:
        [`PaperTable`]: The table; the folder has it as `table.md`, with a picture if matplotlib is there.

    Raises:
        `UserError`: If an architecture or a network is not known, the engine is missing or fails, or the folder holds
            something else.

    Example:

    ```python
    from entropy_gpt.workflows.private_table import private_table

    table = private_table(["SM+LN+G", "SM+ScFuFFN"], output="runs/private", n_layer=2, n_embd=64, context=16)
    print(table.headings, *table.rows)
    ```
    """
    plan = plan_table(
        notations,
        output=output,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        vocab_size=vocab_size,
        context=context,
        networks=networks,
        whole=whole,
        prepared=prepared,
        timeout=timeout,
    )
    return measure_table(plan, progress)


@dataclass(frozen=True)
class TablePlan:
    """
    A table that was checked and can be measured.

    Args:
        rows (`list[Inference]`): The whole models, the baseline first.
        whole (`bool`): Whether the cheapest architecture is also run as a whole.
        prepared (`bool`): Whether each architecture is measured in two phases too.
        networks (`tuple[Network, ...]`): Networks to estimate seconds for.
        output (`Path`): Folder for measurements, table and picture.
        timeout (`int`): Seconds without any event after which a measurement fails.
    """

    rows: list[Inference]
    whole: bool
    prepared: bool
    networks: tuple[Network, ...]
    output: Path
    timeout: int

    @property
    def parts(self) -> list[Inference]:
        """What is measured of each row, and at the end the embedding and the head; then the same in two phases."""
        parts = [*map(take_blocks, self.rows), take_ends(self.rows[0])]
        return [*parts, *(take_prepared_parts(self.rows[1:]) if self.prepared else ())]

    @property
    def predicted_bytes(self) -> dict[str, float]:
        """The predicted bytes of each row, by its title."""
        return {row.title: row.predict_bytes() for row in self.rows}

    @property
    def missing(self) -> list[Inference]:
        """What is not measured yet."""
        inferences = [*self.parts, *([self.find_whole(self.predicted_bytes)] if self.whole else ())]
        return [inference for inference in inferences if self.load(inference) is None]

    def find_whole(self, total_bytes: dict[str, float]) -> Inference:
        """The cheapest architecture by these bytes, titled as a whole model."""
        return _name_whole(find_cheapest(self.rows, total_bytes))

    def load(self, inference: Inference) -> InferenceCost | None:
        """
        The saved measurement, or `None`.

        Raises:
            `ValueError`: If it is damaged, or was made under other conditions.
        """
        return inference.load_measured(self.place(inference))

    def place(self, inference: Inference) -> Path:
        """The file of a measurement."""
        name = re.sub(r"[^a-z0-9]+", "-", inference.title.lower()).strip("-")
        return self.output / MEASURED / f"{name}.json"


def predict_duration(plan: TablePlan) -> float:
    """About how many seconds the missing measurements take on two cores."""
    return sum(step.seconds for inference in plan.missing for step in inference.predict())


def plan_table(
    notations: Sequence[str] | None,
    *,
    output: str | Path,
    n_layer: int,
    n_embd: int,
    n_head: int | None,
    vocab_size: int,
    context: int,
    networks: Sequence[str],
    whole: bool,
    prepared: bool,
    timeout: int,
) -> TablePlan:
    """
    Checks the arguments of [`private_table`] and the measurements in the folder; writes nothing.

    Raises:
        `UserError`: If an architecture or a network is not known, or the folder holds something else.
    """
    check_positive(n_layer=n_layer, n_embd=n_embd, vocab_size=vocab_size, seq=context, timeout=timeout)
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head or count_heads(n_embd), "vocab_size": vocab_size}
    try:
        shown = tuple(dict.fromkeys((LAN, WAN, *map(parse_network, networks))))
        chosen_for = networks[0] if networks else WAN.name
        rows = list_rows(list(as_tuple(notations or NOTATIONS)), context, chosen_for, **sizes)
        plan = TablePlan(rows, whole, prepared, shown, Path(expanded(output)), timeout)
        BENCHMARK.is_in(plan.output)
        for inference in (*plan.parts, *(map(_name_whole, rows[1:]) if whole else ())):
            plan.load(inference)
    except (PrivateInferenceError, ValueError) as error:
        raise UserError(str(error)) from error
    return plan


def measure_table(plan: TablePlan, progress: Progress) -> PaperTable:
    """
    Measures what is not measured yet, and writes the table and its picture.

    Args:
        plan ([`TablePlan`]): The plan.
        progress (`Progress`): Receives a stage for each measurement.

    Raises:
        `UserError`: If the engine is missing or fails.
    """
    check_engine()
    measured = plan.output / MEASURED
    with claimed(plan.output, lambda: measured.exists() and any(measured.iterdir())):
        return _measure_table(plan, progress)


def _measure_table(plan: TablePlan, progress: Progress) -> PaperTable:
    count = len(plan.parts) + plan.whole

    def obtain(inference: Inference, number: int) -> InferenceCost:
        with progress.stage(f"{number} of {count}: {inference.title}") as line:
            cost = plan.load(inference)
            if cost is None:
                return _measure(inference, plan, line)
            line.say("measured before")
            return cost

    costs = {part.title: obtain(part, number) for number, part in enumerate(plan.parts, 1)}
    ends = costs[take_ends(plan.rows[0]).title]
    sums = add_up_all(plan.rows, costs, ends)
    phases = add_up_phases(plan.rows[1:], costs) if plan.prepared else {}
    whole = None
    if plan.whole:
        whole = obtain(plan.find_whole({title: total.total_bytes for title, total in sums.items()}), count)
    table = PaperTable(sums, ends, whole, plan.networks, phases)
    can_draw = find_spec("matplotlib") is not None
    with written_whole(plan.output / TABLE) as path:
        path.write_text(page_markdown(table, PICTURE if can_draw else None), encoding="utf-8")
    if can_draw:
        from entropy_gpt.evaluation.private_inference.costs.cost_plots import draw_costs

        with written_whole(plan.output / PICTURE) as path:
            draw_costs(table.sums).savefig(path, format="png")
    return table


def _name_whole(row: Inference) -> Inference:
    """The same inference, with a title that differs from the one of its blocks."""
    return replace(row, title=f"{row.title}, whole")


def _measure(inference: Inference, plan: TablePlan, line: Stage) -> InferenceCost:
    cost = inference.measure(timeout_seconds=plan.timeout, on_event=lambda event: show_event(event, line))
    with written_whole(plan.place(inference)) as path:
        cost.save(path)
    line.say(f"{cost.total_bytes / MEGA:,.1f} MB")
    return cost
