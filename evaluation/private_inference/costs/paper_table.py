"""
The paper's table of private inference (arXiv 2501.03489, table 2), measured between two processes.

Blocks of one kind cost the same: those with an FFN, and those without one or with one that is absorbed. So a model
that has the first block, in which memory is taken for the first time, one of each kind that lies between, and the last
one, shows what all blocks of an architecture take; the embedding and the head are the same for all architectures.
"""

import statistics
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from entropy_gpt.evaluation.private_inference.parties.preparations import measure_half, pass_spans
from entropy_gpt.evaluation.private_inference.program.cost import MEGA, InferenceCost, StepCost, project
from entropy_gpt.evaluation.private_inference.program.demands import NUMBERS, SQUARES
from entropy_gpt.evaluation.private_inference.program.first_phase import ROWS
from entropy_gpt.evaluation.private_inference.program.networks import LAN, WAN, Network
from entropy_gpt.evaluation.private_inference.program.program import tables_bytes
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.records.conditions import describe_origin
from entropy_gpt.evaluation.showing.markdown import markdown_table
from modeling_entropy_gpt import EntropyGPTConfig

from .cost_model import SET_UP_BYTES, program_config
from .measured_inference import Inference, make_config


NOTATIONS = ("SM+LN+G", "SM+LN+R", "SM+ScFuFFN", "EReg(SM(t)+ScFuFFN)")
# What all are compared with: GELU by tanh, and a softmax of all scores with one reciprocal a row.
TODAY = "SM+LN+G, as it is run today"
TODAY_SETTINGS = PrivateSettings(softmax="tuned", gelu="tanh")
# Table 2 of the paper: GB and minutes of GPT-2 small at T=128.
PAPER_BASELINE = "SM+LN+G"
PAPER_COSTS = {
    "SM+LN+G": (25.32, 8.21),
    "SM+LN+R": (9.44, 6.06),
    "SM+ScFuFFN": (6.43, 4.76),
    "EReg(SM(t)+ScFuFFN)": (6.43, 4.76),
}
PAPER_SIZES = {"n_layer": 12, "n_embd": 768, "n_head": 12, "context": 128}

EMBEDDING, HEAD, CHECK = "embedding", "head", "check"
# What a first phase makes for all blocks together.
POOLS = (SQUARES, NUMBERS, ROWS)
# For the blocks the vocabulary is of no account; around the ends is the smallest block that there is.
BLOCK_VOCABULARY = 64
SMALLEST_BLOCK = "SM+FFNi1"


def list_rows(notations: list[str], context: int, network: str = WAN.name, **sizes) -> list[Inference]:
    """
    The rows of the table as inferences of whole models: what is run today, then each architecture with the economies
    of this package, in the forms for a network.

    Raises:
        As [`make_config`].
    """
    settings = replace(TODAY_SETTINGS, network=network)
    today = Inference(TODAY, make_config(PAPER_BASELINE, context, **sizes), settings, context)
    configs = {config.notation: config for config in (make_config(text, context, **sizes) for text in notations)}
    rows = [
        Inference(notation, config, PrivateSettings(network=network), context) for notation, config in configs.items()
    ]
    return [today, *rows]


def take_blocks(whole: Inference) -> Inference:
    """A model that has the first block of the whole model, one of each kind after it, and the last one."""
    pruned, _ = _choose_blocks(whole.config)
    layers = {"n_layer": len(pruned), "pruned_ffn_layers": np.flatnonzero(pruned).tolist()}
    config = EntropyGPTConfig.from_dict(whole.config.to_dict() | layers | {"vocab_size": BLOCK_VOCABULARY})
    return replace(whole, config=config)


def choose_typical_block(whole: Inference) -> int:
    """The layer of [`take_blocks`] that stands for most of the model's."""
    return statistics.mode(_choose_blocks(whole.config)[1])


def take_typical_block(whole: Inference, blocks: InferenceCost) -> InferenceCost:
    """That block, of a measurement of [`take_blocks`]."""
    typical = choose_typical_block(whole)
    steps = [step for step in blocks.steps if step.layer == typical]
    return replace(blocks, n_layer=1, steps=steps, seconds=sum(step.seconds for step in steps))


def take_ends(whole: Inference) -> Inference:
    """The embedding, the head and the check of all numbers, with as little as can be between."""
    sizes = {"n_embd": whole.config.n_embd, "vocab_size": whole.config.vocab_size}
    config = make_config(SMALLEST_BLOCK, whole.context, n_layer=1, n_head=1, **sizes)
    ends = Inference("embedding and head", config, PrivateSettings(network=whole.settings.network), whole.context)
    return take_prepared(ends) if whole.is_prepared else ends


def _choose_blocks(config: EntropyGPTConfig) -> tuple[list[bool], list[int]]:
    """
    Whether the blocks to measure lack an FFN, with those that are absorbed, and by which of them each block of the
    model is measured.
    """
    pruned, last = program_config(config).pruned_ffn_layers, config.n_layer - 1
    kinds = [(layer == 0, layer == last, layer in pruned) for layer in range(config.n_layer)]
    chosen = list(dict.fromkeys(kinds))
    return [lacks for *_, lacks in chosen], [chosen.index(kind) for kind in kinds]


def add_up(whole: Inference, blocks: InferenceCost, ends: InferenceCost) -> InferenceCost:
    """
    What the whole model takes.

    Args:
        whole ([`Inference`]): One of [`list_rows`].
        blocks ([`InferenceCost`]): Cost of [`take_blocks`].
        ends ([`InferenceCost`]): Cost of [`take_ends`].
    """
    config = whole.config
    steps = _add_up_steps(whole, blocks.steps, ends.steps)
    before = _add_up_steps(whole, blocks.before, ends.before)
    sizes = {"notation": config.notation, "n_layer": config.n_layer, "vocab_size": config.vocab_size}
    return replace(blocks, **sizes, steps=steps, before=before, seconds=sum(step.seconds for step in steps))


def _add_up_steps(whole: Inference, blocks: list[StepCost], ends: list[StepCost]) -> list[StepCost]:
    """Products of masks of numbers are made for all blocks together: they grow as predicted."""
    _, measured = _choose_blocks(whole.config)
    steps = [step for step in ends if step.operation == EMBEDDING]
    for layer, block in enumerate(measured):
        steps += [replace(step, layer=layer) for step in blocks if step.layer == block]
    around = [step for step in blocks if step.layer is None and step.operation not in (EMBEDDING, HEAD, CHECK)]
    growth = _predict_growth(whole) if any(step.operation in POOLS for step in around) else 1.0
    steps += [_scale(step, growth) if step.operation in POOLS else step for step in around]
    return [*steps, *(step for step in ends if step.layer is None and step.operation in (HEAD, CHECK))]


def _predict_growth(whole: Inference) -> float:
    """How many times as many bytes all blocks send as those that are measured, for products of masks of numbers."""
    one, all_blocks = (
        sum(step.total_bytes for step in inference.predict() if step.operation in POOLS)
        for inference in (take_blocks(whole), whole)
    )
    return all_blocks / one


def _scale(step: StepCost, factor: float) -> StepCost:
    names = ("sent_bytes", "received_bytes", "sent_messages", "received_messages")
    counted = {name: round(factor * getattr(step, name)) for name in names}
    return replace(step, **counted, seconds=factor * step.seconds)


def add_up_all(
    rows: list[Inference], blocks: dict[str, InferenceCost], ends: InferenceCost
) -> dict[str, InferenceCost]:
    """As [`add_up`], of each row by its title."""
    return {row.title: add_up(row, blocks[row.title], ends) for row in rows}


def take_prepared(row: Inference) -> Inference:
    """The same inference in two phases."""
    return replace(row, title=f"{row.title}, prepared", is_prepared=True)


def take_prepared_parts(rows: list[Inference]) -> list[Inference]:
    """What is measured of these models in two phases: blocks of each, and the ends."""
    prepared = [take_prepared(row) for row in rows]
    return [*map(take_blocks, prepared), take_ends(prepared[0])]


def add_up_phases(rows: list[Inference], costs: dict[str, InferenceCost]) -> dict[str, "TwoPhases"]:
    """
    What whole models take in two phases, by their titles in one.

    Args:
        rows (`list[Inference]`): In one phase.
        costs (`dict[str, InferenceCost]`): Costs of [`take_prepared_parts`], by their titles.
    """
    prepared = {row.title: take_prepared(row) for row in rows}
    return {
        title: TwoPhases.of(row, add_up(row, costs[row.title], costs[take_ends(row).title]))
        for title, row in prepared.items()
    }


def find_cheapest(rows: list[Inference], total_bytes: dict[str, float]) -> Inference:
    """The optimised row that sends the fewest bytes (`total_bytes` is keyed by row title)."""
    return min(rows[1:], key=lambda row: total_bytes[row.title])


def steps_of(cost: InferenceCost, operation: str) -> list[StepCost]:
    """The steps of one operation, in all layers."""
    return [step for step in cost.steps if step.operation == operation]


def paper_ratios(cost: InferenceCost) -> tuple[float, float] | None:
    """How many times fewer bytes and less time than SM+LN+G the paper has; `None` where it has no such model."""
    sizes = {name: getattr(cost, name) for name in PAPER_SIZES}
    if cost.notation not in PAPER_COSTS or sizes != PAPER_SIZES:
        return None
    (gigabytes, minutes), (base_gigabytes, base_minutes) = PAPER_COSTS[cost.notation], PAPER_COSTS[PAPER_BASELINE]
    return base_gigabytes / gigabytes, base_minutes / minutes


@dataclass(frozen=True)
class TwoPhases:
    """
    An inference in two phases.

    Args:
        cost ([`InferenceCost`]): What it took, before the prompt and after it.
        half_bytes (`int`): That each side keeps meanwhile, about.
    """

    cost: InferenceCost
    half_bytes: int

    @classmethod
    def of(cls, row: Inference, cost: InferenceCost) -> Self:
        """
        Args:
            row ([`Inference`]): The whole model.
            cost ([`InferenceCost`]): Result of [`add_up`].
        """
        size, _ = measure_half(program_config(row.config), row.settings, pass_spans(row.context, 1, 1))
        return cls(cost, size)


@dataclass(frozen=True)
class PaperTable:
    """
    The table, measured.

    Args:
        sums (`dict[str, InferenceCost]`): Result of [`add_up_all`]; the others are compared with the first.
        ends ([`InferenceCost`]): The embedding and the head.
        whole ([`InferenceCost`], *optional*): A whole run of one of the architectures.
        networks (`tuple[Network, ...]`): Networks for which seconds are shown.
        phases (`dict[str, TwoPhases]`): Those that were measured in two phases, by their titles in one.
    """

    sums: dict[str, InferenceCost]
    ends: InferenceCost
    whole: InferenceCost | None = None
    networks: tuple[Network, ...] = (LAN, WAN)
    phases: dict[str, TwoPhases] = field(default_factory=dict)

    @property
    def baseline(self) -> InferenceCost:
        """What others are compared with."""
        return next(iter(self.sums.values()))

    @property
    def headings(self) -> list[str]:
        """The headings of the columns."""
        measured = ("MB", "times\nfewer", "in the\npaper", "s", "times\nfaster", "in the\npaper")
        return ["architecture", *measured, *(f"s on\n{network.name}" for network in self.networks)]

    @property
    def rows(self) -> list[list[str]]:
        """The cells of each architecture."""
        return [self._row(title, cost) for title, cost in self.sums.items()]

    def _row(self, title: str, cost: InferenceCost) -> list[str]:
        ratios = paper_ratios(cost)
        fewer, faster = [f"{ratio:.2f}" for ratio in ratios] if ratios else ["-", "-"]
        return [
            title,
            f"{cost.total_bytes / MEGA:,.1f}",
            f"{self.baseline.total_bytes / cost.total_bytes:.2f}",
            fewer,
            f"{cost.seconds:,.1f}",
            f"{self.baseline.seconds / cost.seconds:.2f}",
            faster,
            *(f"{project(cost, network):,.0f}" for network in self.networks),
        ]

    @property
    def phase_headings(self) -> list[str]:
        """The headings of the columns for two phases."""
        two = ("MB\nbefore", "MB\nafter", "s\nbefore", "s\nafter", "MB on\ndisk")
        return ["in two phases", *two, *(f"s after,\n{network.name}" for network in self.networks)]

    @property
    def phase_rows(self) -> list[list[str]]:
        """The cells of each architecture that was measured in two phases."""
        return [self._phase_row(title, phases) for title, phases in self.phases.items()]

    def _phase_row(self, title: str, phases: TwoPhases) -> list[str]:
        before, after = phases.cost.first_phase(), phases.cost
        return [
            title,
            *(f"{cost.total_bytes / MEGA:,.1f}" for cost in (before, after)),
            *(f"{cost.seconds:,.1f}" for cost in (before, after)),
            f"{phases.half_bytes / MEGA:,.1f}",
            *(f"{project(after, network):,.0f}" for network in self.networks),
        ]

    @property
    def notes(self) -> list[str]:
        """What there is to say about it, a paragraph each."""
        notes = [self._describe_sums(), self._describe_ends(), self._compare_alike(), self._describe_paper()]
        return [note for note in (*notes, self._compare_whole(), self._describe_phases()) if note]

    def _describe_sums(self) -> str:
        return (
            "MB are 10^6 bytes, sent by both parties together, for the logits of one token after "
            f"{self.baseline.context}. The set-up of a connection, {SET_UP_BYTES / MEGA:.0f} MB, is not counted. A "
            "model is the sum of its blocks, the norm before the head, the embedding and the head. The first block, "
            "one of each kind between and the last were measured. Seconds on a network are estimates: those "
            "measured, and those that bytes and round trips take there."
        )

    def _describe_ends(self) -> str:
        embedding, head = (_describe_steps(self.ends, operation) for operation in (EMBEDDING, HEAD))
        table = tables_bytes(self.ends.vocab_size, self.ends.context, self.ends.n_embd) / MEGA
        return (
            f"Every sum has a vocabulary of {self.ends.vocab_size:,}: the embedding by one-hot rows takes "
            f"{embedding}, and the head {head}. Instead of one-hot rows, client_table sends the tables to the client: "
            f"{table:,.1f} MB once per connection, for {self.ends.context} positions."
        )

    def _compare_alike(self) -> str | None:
        if PAPER_BASELINE not in self.sums:
            return None
        alike = self.sums[PAPER_BASELINE]
        ratios = [
            f"{title} {alike.total_bytes / cost.total_bytes:.2f}"
            for title, cost in self.sums.items()
            if title not in (TODAY, PAPER_BASELINE)
        ]
        if not ratios:
            return None
        return f"Times fewer bytes than {PAPER_BASELINE} with the same economies: {', '.join(ratios)}."

    def _describe_paper(self) -> str | None:
        if paper_ratios(self.baseline) is None:
            return None
        gigabytes, minutes = PAPER_COSTS[PAPER_BASELINE]
        return (
            "The paper's ratios are those of arXiv 2501.03489, table 2: GPT-2 small at T=128 on two servers of 32 "
            f"cores, where {PAPER_BASELINE} takes {gigabytes} GB and {minutes} minutes."
        )

    def _describe_phases(self) -> str | None:
        if not self.phases:
            return None
        return (
            "In two phases, what needs no prompt is done before it comes. Products of masks of numbers are made for "
            "all blocks together, and are taken to grow as predicted. Each side keeps its half on disk until it is "
            "used, once. Its size follows from the shapes."
        )

    def _compare_whole(self) -> str | None:
        if self.whole is None:
            return None
        total = self.sums[self.whole.notation]
        return (
            f"A whole run of {self.whole.notation}, {self.whole.n_layer} blocks: "
            f"{self.whole.total_bytes / MEGA:,.1f} MB and {self.whole.seconds:,.1f} s measured; by the sum "
            f"{total.total_bytes / MEGA:,.1f} MB ({total.total_bytes / self.whole.total_bytes - 1:+.2%}) and "
            f"{total.seconds:,.1f} s ({total.seconds / self.whole.seconds - 1:+.1%})."
        )


def _describe_steps(cost: InferenceCost, operation: str) -> str:
    steps = steps_of(cost, operation)
    total = cost.all_parties(sum(step.total_bytes for step in steps))
    return f"{total / MEGA:,.1f} MB and {sum(step.seconds for step in steps):,.1f} s"


def table_markdown(table: PaperTable) -> str:
    """The table itself, and that of two phases, if they were measured."""
    tables = [(table.headings, table.rows), (table.phase_headings, table.phase_rows)]
    return "\n\n".join(
        markdown_table([heading.replace("\n", " ") for heading in headings], rows) for headings, rows in tables if rows
    )


def page_markdown(table: PaperTable, picture: str | None) -> str:
    """
    A page with the table, its notes, its picture if there is one, and where it comes from.

    Args:
        table ([`PaperTable`]): What was measured.
        picture (`str`, *optional*): The address of its picture.
    """
    cost = table.baseline
    notes = "\n\n".join(table.notes)
    shown = "" if picture is None else f"![Where the bytes go]({picture})\n\n"
    return f"""# What private inference takes

{cost.n_layer} blocks at T={cost.context}, width {cost.n_embd}, {cost.n_head} heads, with random weights, between two
processes over TCP on one machine's loopback, under {cost.settings.protocol}.

{table_markdown(table)}

{notes}

{shown}Measured with {describe_origin(cost)}.
"""
