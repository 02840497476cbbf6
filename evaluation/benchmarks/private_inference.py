"""What private inference takes: GPT-2 small in blocks and whole, softmax, decoding, and agreement.

python -m entropy_gpt.evaluation.benchmarks.private_inference --models DIR --models DIR --full  what is left
python -m entropy_gpt.evaluation.benchmarks.private_inference --models DIR --prepared  with two phases
python -m entropy_gpt.evaluation.benchmarks.private_inference --quick  small blocks, nothing written
python -m entropy_gpt.evaluation.benchmarks.private_inference --redraw  the page anew from the record
"""

from collections.abc import Callable
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import typer
from pydantic.dataclasses import dataclass
from rich.console import Console

from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.benchmarks._committed import clean_revision, describe_forms
from entropy_gpt.evaluation.json_records import RECORD as CONFIG
from entropy_gpt.evaluation.json_records import StoredRecord, load_record, save_record
from entropy_gpt.evaluation.origin import ROOT
from entropy_gpt.evaluation.private_inference.agreement import Agreement, measure_agreement
from entropy_gpt.evaluation.private_inference.costs.cost_model import SET_UP_BYTES
from entropy_gpt.evaluation.private_inference.costs.cost_plots import draw_costs
from entropy_gpt.evaluation.private_inference.costs.measured_inference import Inference, make_config, make_random_model
from entropy_gpt.evaluation.private_inference.costs.paper_table import (
    BLOCK_VOCABULARY,
    NOTATIONS,
    PAPER_BASELINE,
    TODAY,
    PaperTable,
    add_up_all,
    add_up_phases,
    choose_typical_block,
    find_cheapest,
    list_rows,
    table_markdown,
    take_blocks,
    take_ends,
    take_prepared_parts,
    take_typical_block,
)
from entropy_gpt.evaluation.private_inference.inference import IN_PROCESS, PLAINTEXT, PrivateModel
from entropy_gpt.evaluation.private_inference.program.cost import InferenceCost, mark_older_forms, project
from entropy_gpt.evaluation.private_inference.program.networks import LAN, WAN
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.records.conditions import list_settings
from entropy_gpt.evaluation.showing.markdown import fold_away, markdown_table
from entropy_gpt.training.files import written_whole


RECORD = ROOT / "model_cards" / "results" / "private_inference.json"
PAGE = ROOT / "docs" / "private_costs.md"
PICTURE = ROOT / "docs" / "private_costs.png"
# Parts of a record that is not whole yet.
PARTS = ROOT / "runs" / "private_inference"

PROPOSAL, FUSED = "EReg(SM(t)+ScFuFFN)", "SM+ScFuFFN"
SLOWED = (TODAY, FUSED, PROPOSAL)
LENGTH, QUICK_LENGTH, HEAD_SIZE = 128, 32, 64
SIZES = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}
QUICK_SIZES = {"n_layer": 3, "n_embd": 192, "n_head": 3, "vocab_size": BLOCK_VOCABULARY}
SOFTMAX_LENGTHS, SOFTMAX_WIDTH = (64, 128), 192
SOFTMAX_STEPS = ("softmax", "maximum", "exponential", "division")
SEQUENCE, RUNS = 16, 25

console = Console()


@dataclass(config=CONFIG)
class Softmax:
    """
    The engine's own softmax compared with ours, on the scores of one layer.

    Args:
        length (`int`): Tokens.
        stock_bytes, bytes (`int`): Bytes that both parties send.
        stock_error, error (`float`): Largest error of the logits.
    """

    length: int
    stock_bytes: int
    bytes: int
    stock_error: float
    error: float


@dataclass(config=CONFIG)
class Record(StoredRecord):
    """
    All that was measured, and where.

    Args:
        blocks (`dict[str, InferenceCost]`): [`take_blocks`] of each architecture, between two processes.
        ends ([`InferenceCost`]): The embedding and the head, between two processes.
        whole ([`InferenceCost`], *optional*): A whole run of one architecture, between two processes.
        slowed (`dict[str, InferenceCost]`): For some, the typical block over the loopback slowed to a WAN.
        decoding ([`InferenceCost`]): The typical block for one more token, keys and values kept.
        softmax (`list[Softmax]`): In threads.
        agreement (`list[Agreement]`): In threads.
        git_revision (`str`, *optional*): Commit of this project.
        remark (`str`, *optional*): What else is to be known, such as other work on the machine meanwhile.
        prepared (`dict[str, InferenceCost]`): The blocks and the ends in two phases, by their titles.
    """

    KIND: ClassVar[str] = "the benchmark of private inference"
    SCHEMA_VERSION: ClassVar[int] = 5

    blocks: dict[str, InferenceCost]
    ends: InferenceCost
    whole: InferenceCost | None
    slowed: dict[str, InferenceCost]
    decoding: InferenceCost
    softmax: list[Softmax]
    agreement: list[Agreement]
    git_revision: str | None
    remark: str | None = None
    prepared: dict[str, InferenceCost] = field(default_factory=dict)

    @classmethod
    def migrate(cls, content: dict, version: int) -> dict | None:
        """Version 3 had no `prepared`, and version 4 did not say that operations had other forms."""
        return mark_older_forms(content) if version in (3, 4) else None


def measure(inference: Inference) -> InferenceCost:
    cost = inference.measure()
    console.print(f"{inference.title}: {cost.total_bytes / 1e6:.1f} MB, {cost.seconds:.1f} s")
    return cost


def measure_decoding(rows: list[Inference]) -> InferenceCost:
    """What a block takes for the last of the positions, after all the others."""
    (row,) = (row for row in rows if row.title == FUSED)
    both = replace(take_blocks(row), context=row.context - 1).measure(new_tokens=2)
    second = replace(both, steps=both.steps[len(both.steps) // 2 :], context=row.context)
    cost = take_typical_block(row, second)
    console.print(f"decoding: {cost.total_bytes / 1e6:.1f} MB, {cost.seconds:.1f} s")
    return cost


def measure_softmax(length: int) -> Softmax:
    sizes = {"n_layer": 1, "n_embd": SOFTMAX_WIDTH, "n_head": SOFTMAX_WIDTH // HEAD_SIZE}
    model = make_random_model(make_config("SM", length, vocab_size=BLOCK_VOCABULARY, **sizes))
    prompts = np.random.default_rng(0).integers(0, BLOCK_VOCABULARY, (1, length))
    (clear,) = PrivateModel(model).infer(prompts, PLAINTEXT, length).answers
    totals, errors = {}, {}
    for form in ("stock", "efficient"):
        result = PrivateModel(model, PrivateSettings(softmax=form)).infer(prompts, IN_PROCESS, length)
        totals[form] = sum(step.total_bytes for step in result.costs[0].steps if step.operation in SOFTMAX_STEPS)
        errors[form] = float(np.abs(result.answers[0] - clear).max())
    result = Softmax(length, totals["stock"], totals["efficient"], errors["stock"], errors["efficient"])
    console.print(f"softmax, T={length}: {result.stock_bytes / result.bytes:.2f} times fewer bytes than stock")
    return result


def measure_folder(folder: Path, runs: int) -> Agreement:
    """Sequences of the held-out text that the model was not trained on, as far as its tokenizer reaches."""
    from entropy_gpt.training.corpus import load_standard_library
    from entropy_gpt.training.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    text = "".join(document.text for document in load_standard_library().validation)
    tokens = np.array(tokenizer(text[: 100 * runs * SEQUENCE])["input_ids"])
    prompts = tokens[: runs * SEQUENCE].reshape(runs, SEQUENCE)
    result = measure_agreement(load_language_model(folder).eval(), prompts, IN_PROCESS)
    console.print(result)
    return result


def measure_slowed(row: Inference) -> InferenceCost:
    """The block that a model has most of, over a WAN."""
    cost = take_blocks(row).measure_slowed(WAN, choose_typical_block(row))
    console.print(f"{row.title}, {WAN.name}: {take_typical_block(row, cost).seconds:.1f} s")
    return cost


def take_typical_blocks(costs: dict[str, InferenceCost]) -> dict[str, InferenceCost]:
    """Of each architecture, the block of which it has most."""
    rows = list_rows(NOTATIONS, LENGTH, **SIZES)
    return {row.title: take_typical_block(row, costs[row.title]) for row in rows if row.title in costs}


def sum_up(record: Record) -> PaperTable:
    """The paper's table out of the record."""
    rows = list_rows(NOTATIONS, LENGTH, **SIZES)
    phases = add_up_phases(rows[1:], record.prepared) if record.prepared else {}
    return PaperTable(add_up_all(rows, record.blocks, record.ends), record.ends, record.whole, phases=phases)


def page(record: Record) -> str:
    """The page of the documentation that shows the record."""
    blocks, slowed = take_typical_blocks(record.blocks), take_typical_blocks(record.slowed)
    today, alike, fused, proposal = (blocks[title] for title in (TODAY, PAPER_BASELINE, FUSED, PROPOSAL))
    rows = "\n".join(_block_row(title, cost, today) for title, cost in blocks.items())
    table = sum_up(record)
    softmax = "\n".join(
        f"| {entry.length} | {entry.stock_bytes / 1e6:.1f} | {entry.bytes / 1e6:.1f} | "
        f"{entry.stock_bytes / entry.bytes:.2f} | {entry.stock_error:.4f} | {entry.error:.4f} |"
        for entry in record.softmax
    )
    agreement = "\n".join(
        f"| {entry.name} | {entry.runs} | {entry.agreeing} of {entry.positions} "
        f"({entry.agreeing / entry.positions:.2%}) | {entry.largest_error:.4f} | {entry.largest_logit:.1f} | "
        f"{entry.perplexity:.3f} | {entry.private_perplexity:.3f} "
        f"({entry.private_perplexity / entry.perplexity - 1:+.3%}) | {entry.out_of_range} |"
        for entry in record.agreement
    )
    block_conditions = [
        f"One block at T={today.context}, width {today.n_embd}, {today.n_head} heads, with random weights.",
        f"Two processes over TCP on one machine's loopback, under {today.settings.protocol} with "
        f"{today.settings.fraction_bits} fractional bits.",
        "A block between the first and the last. The first takes its memory from the system, the last computes less, "
        "and linear FFNs between them are absorbed.",
        f"The set-up of a connection, {SET_UP_BYTES / 1e6:.0f} MB, is not counted.",
        "Seconds on a LAN (1 Gbps, 1 ms) and a WAN (100 Mbps, 80 ms) are estimates: those measured here, and those "
        "that bytes and round trips take.",
    ]
    return f"""# What private inference takes

Generated by `python -m entropy_gpt.evaluation.benchmarks.private_inference --models ... --full`; the figures are in
`{RECORD.relative_to(ROOT).as_posix()}`. MB are 10^6 bytes, sent by both parties together.
{_warn_of_forms(today)}
## A block of GPT-2 small

{fold_away("Conditions", block_conditions)}

| block | MB | times fewer | round trips | s | times faster | LAN, s | WAN, s | times faster |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

- Compared with "{TODAY}", the proposal sends **{today.total_bytes / proposal.total_bytes:.2f} times fewer bytes**.
- With the same economies on both sides, it sends
  **{alike.total_bytes / proposal.total_bytes:.2f} times fewer**: that is the architecture's part.
- With one temperature per head instead of one per position, the temperatures fold away. Then {FUSED} gives the cost:
  {alike.total_bytes / fused.total_bytes:.2f} times fewer bytes than LayerNorm and GELU with the same economies.

"{TODAY}" has GELU by tanh, and a softmax of all scores with one reciprocal per row. The others have the economies of
`program.py`:

- only the visible half of the scores;
- a polynomial exponential of two squares;
- division after the product with the values;
- GELU by ReLU and two squares.

Seconds measured over a link slowed to 100 Mbps in each direction and 80 ms there and back:

{_slowed_table(slowed)}

The estimates for a WAN are usually too high. They assume that both directions share the rate, and that nothing is
computed while bytes are under way.

![Where the bytes of a block go]({PICTURE.name})
{_where_temperatures_are(proposal)}
With keys and values kept, a block of {FUSED} takes for one more token at T={record.decoding.context}
{record.decoding.total_bytes / 1e6:.1f} MB and {record.decoding.seconds:.1f} s. Computing all positions again would
send {fused.total_bytes / record.decoding.total_bytes:.1f} times as much.

## GPT-2 small, whole

{table_markdown(table)}

{fold_away("Conditions and details", table.notes)}

## Softmax

The steps from scores to weights, for one layer of {SOFTMAX_WIDTH // HEAD_SIZE} heads. "Stock" is `jax.nn.softmax` of
masked scores, as the engine computes it. The errors are those of the model's logits.

| T | stock, MB | ours, MB | times fewer | stock, error | ours, error |
| ---: | ---: | ---: | ---: | ---: | ---: |
{softmax}

## Agreement

Trained models on held-out text, in sequences of {SEQUENCE} tokens, one after another over one connection (threads of
one process, the same protocol). A client would refuse answers that are out of range and have them computed again.

| model | runs | same token | largest error | largest logit | perplexity | private | out of range |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{agreement}

Measured with {list_settings(today.versions)}; commit {_commits(record)}; {today.machine}.
{describe_forms(today)}
{record.remark or ""}
"""


def _commits(record: Record) -> str:
    """Of the parts between two processes, in the order in which they were measured."""
    parts = [*record.blocks.values(), record.ends, record.whole, *record.slowed.values(), record.decoding]
    return ", ".join(dict.fromkeys(part.git_revision or "unknown" for part in parts if part is not None))


def _warn_of_forms(cost: InferenceCost) -> str:
    if not cost.has_older_forms:
        return ""
    return f"""
**Older forms.** These are measurements of commit {cost.git_revision},
before forms were chosen for a network. What the same architectures take in
[today's forms](economies.md#measured-and-predicted) is predicted.
"""


def _where_temperatures_are(cost: InferenceCost) -> str:
    """What is to be said of a record from before the product with temperatures was a step of its own."""
    if any(step.operation == "temperatures" for step in cost.steps):
        return ""
    return f"""
In these measurements, the product of {PROPOSAL} with its temperatures is counted as a part of "maximum".
"""


def _slowed_table(blocks: dict[str, InferenceCost]) -> str:
    today = blocks[TODAY].seconds
    rows = [(title, f"{cost.seconds:.0f}", f"{today / cost.seconds:.2f}") for title, cost in blocks.items()]
    return markdown_table(("block", "s", "times faster"), rows)


def _block_row(name: str, cost: InferenceCost, today: InferenceCost) -> str:
    wide, wide_today = project(cost, WAN), project(today, WAN)
    cells = [
        name,
        f"{cost.total_bytes / 1e6:.1f}",
        f"{today.total_bytes / cost.total_bytes:.2f}",
        f"{cost.round_trips:,.0f}",
        f"{cost.seconds:.1f}",
        f"{today.seconds / cost.seconds:.2f}",
        f"{project(cost, LAN):.0f}",
        f"{wide:.0f}",
        f"{wide_today / wide:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def write(record: Record):
    PAGE.write_text(page(record), encoding="utf-8")
    draw_costs(take_typical_blocks(record.blocks)).savefig(PICTURE, format="png")


def main(
    models: Annotated[list[Path] | None, typer.Option(help="Trained models, for the agreement.")] = None,
    quick: Annotated[bool, typer.Option(help="Small blocks; writes nothing.")] = False,
    runs: Annotated[int, typer.Option(min=1, help="Sequences of each model.")] = RUNS,
    whole: Annotated[bool, typer.Option("--full", help="Run the cheapest architecture whole too.")] = False,
    prepared: Annotated[bool, typer.Option("--prepared", help="Measure all in two phases too.")] = False,
    remark: Annotated[str | None, typer.Option(help="A sentence for the page: what else is to be known.")] = None,
    redraw: Annotated[bool, typer.Option(help="Measure nothing; the page anew from the record.")] = False,
):
    """Measure what private inference takes."""
    if redraw:
        record = Record.load(RECORD)
        record.remark = remark or record.remark
        record.save(RECORD)
        write(record)
        return
    if quick:
        for row in list_rows(NOTATIONS, QUICK_LENGTH, **QUICK_SIZES):
            measure(take_blocks(row))
        return
    record = replace(measure_all(models or [], runs, whole, prepared), remark=remark)
    record.save(RECORD)
    write(record)
    console.print(f"written: {RECORD}, {PAGE}, {PICTURE}")


def measure_all(models: list[Path], runs: int, whole: bool, prepared: bool) -> Record:
    """
    Part after part; those that an interrupted run of the same revision has measured are taken from there.

    Raises:
        `ValueError`: If the working tree has changes, so that no revision says what was measured.
    """
    revision = clean_revision()
    keep = partial(measure_once, PARTS / revision)
    rows = list_rows(NOTATIONS, LENGTH, **SIZES)
    blocks = {row.title: keep(row.title, InferenceCost, lambda row=row: measure(take_blocks(row))) for row in rows}
    ends = keep("ends", InferenceCost, lambda: measure(take_ends(rows[0])))
    totals = {title: total.total_bytes for title, total in add_up_all(rows, blocks, ends).items()}
    cheapest = find_cheapest(rows, totals)
    return Record(
        blocks=blocks,
        ends=ends,
        whole=keep("whole", InferenceCost, lambda: measure(cheapest)) if whole else None,
        slowed={
            row.title: keep(f"slowed {row.title}", InferenceCost, partial(measure_slowed, row))
            for row in rows
            if row.title in SLOWED
        },
        decoding=keep("decoding", InferenceCost, lambda: measure_decoding(rows)),
        softmax=[keep(f"softmax {each}", Softmax, partial(measure_softmax, each)) for each in SOFTMAX_LENGTHS],
        agreement=[
            keep(f"{folder.name}, {runs} runs", Agreement, partial(measure_folder, folder, runs)) for folder in models
        ],
        git_revision=revision,
        prepared={
            part.title: keep(part.title, InferenceCost, partial(measure, part))
            for part in (take_prepared_parts(rows[1:]) if prepared else ())
        },
    )


def measure_once(folder: Path, name: str, type_: type, measure: Callable):
    """A part of the record: what is in the folder, or else what is measured now and put there."""
    path = folder / f"{name}.json"
    if not path.exists():
        result = measure()
        with written_whole(path) as place:
            save_record(result, type_, name, Record.SCHEMA_VERSION, place)
    return load_record(type_, name, Record.SCHEMA_VERSION, path)


if __name__ == "__main__":
    typer.run(main)
