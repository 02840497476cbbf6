"""What each economy of private inference saves alone, by the cost model, and what it does to the numbers.

python -m entropy_gpt.evaluation.benchmarks.economies  minutes, without an engine; then the page
python -m entropy_gpt.evaluation.benchmarks.economies --redraw  the page anew from the record
"""

from collections.abc import Iterable
from typing import Annotated, ClassVar, Self

import numpy as np
import torch
import typer
from pydantic.dataclasses import dataclass
from rich.console import Console

from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.benchmarks import private_inference
from entropy_gpt.evaluation.benchmarks._committed import clean_revision
from entropy_gpt.evaluation.benchmarks.private_inference import FUSED, LENGTH, NOTATIONS, PROPOSAL, SIZES
from entropy_gpt.evaluation.benchmarks.ring import MODELS, choose_prompts
from entropy_gpt.evaluation.json_records import RECORD as CONFIG
from entropy_gpt.evaluation.json_records import StoredRecord
from entropy_gpt.evaluation.origin import ROOT, Origin, collect_origin
from entropy_gpt.evaluation.private_inference.costs.cost_model import PredictedStep, predict
from entropy_gpt.evaluation.private_inference.costs.economies import NONE, VARIANTS, emulate_variant, predict_variant
from entropy_gpt.evaluation.private_inference.costs.measured_inference import make_config
from entropy_gpt.evaluation.private_inference.costs.paper_table import (
    TODAY,
    choose_typical_block,
    list_rows,
    take_blocks,
)
from entropy_gpt.evaluation.private_inference.program.cost import MEGA, InferenceCost, project
from entropy_gpt.evaluation.private_inference.program.fixed_point import exact_logits
from entropy_gpt.evaluation.private_inference.program.networks import WAN
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from entropy_gpt.evaluation.records.conditions import describe_origin
from entropy_gpt.evaluation.showing.markdown import markdown_table


RECORD = ROOT / "model_cards" / "results" / "economies.json"
PAGE = ROOT / "docs" / "economies.md"
# The passes of each case, of which the last one counts.
CASES = {
    "A prompt of 16 tokens": (Span(0, 16),),
    "A prompt of 32 tokens": (Span(0, 32),),
    "A prompt of 128 tokens": (Span(0, 128),),
    "One more token after 127": (Span(0, 127), Span(127, 1)),
}
# The model whose numbers are emulated, and how many prompts each case has.
EMULATED, PROMPTS = "converted", 8

console = Console()


@dataclass(config=CONFIG)
class Prediction:
    """
    Args:
        total_bytes (`float`): Sent by both parties.
        round_trips (`float`): One after the other.
        wan_seconds (`float`): On a WAN, with a core for each party.
    """

    total_bytes: float
    round_trips: float
    wan_seconds: float

    @classmethod
    def of(cls, steps: Iterable[PredictedStep]) -> Self:
        steps = [*steps]
        sent, trips = (sum(getattr(step, name) for step in steps) for name in ("total_bytes", "round_trips"))
        return cls(sent, trips, WAN.seconds(sent, trips) + sum(step.seconds for step in steps))


@dataclass(config=CONFIG)
class Record(StoredRecord, Origin):
    """
    What the cost model predicts, and what the emulated ring does to numbers.

    Args:
        predicted (`dict[str, dict[str, Prediction]]`): GPT-2 small, by case and economy.
        errors (`dict[str, dict[str, float]]`): The largest of a small model's logits, by case and economy.
        largest_logit (`float`): That model's.
        blocks, models (`dict[str, Prediction]`): Those of the measured table, by title.
    """

    KIND: ClassVar[str] = "the benchmark of economies"
    SCHEMA_VERSION: ClassVar[int] = 1

    predicted: dict[str, dict[str, Prediction]]
    errors: dict[str, dict[str, float]]
    largest_logit: float
    blocks: dict[str, Prediction]
    models: dict[str, Prediction]


def predict_cases() -> dict[str, dict[str, Prediction]]:
    config = make_config(FUSED, LENGTH, **SIZES)
    return {
        case: {
            economy: Prediction.of(predict_variant(config, variant, spans[-1], WAN.name))
            for economy, variant in VARIANTS.items()
        }
        for case, spans in CASES.items()
    }


def emulate_cases(prompts: int) -> tuple[dict[str, dict[str, float]], float]:
    """Largest errors of logits, against float64 with the model's own functions, and the largest logit."""
    folder = MODELS / EMULATED
    config, weights = prepare_weights(load_language_model(folder).eval())
    texts = choose_prompts(folder, prompts, LENGTH)
    errors: dict[str, dict[str, float]] = {}
    largest = 0.0
    for case, spans in CASES.items():
        errors[case] = dict.fromkeys(VARIANTS, 0.0)
        for text in texts[:, : spans[-1].end]:
            (exact,) = exact_logits(config, weights, PrivateSettings(), text)
            largest = max(largest, float(np.abs(exact).max()))
            for economy, variant in VARIANTS.items():
                found = emulate_variant(config, weights, variant, spans, text, WAN.name)
                errors[case][economy] = max(errors[case][economy], float(np.abs(found - exact).max()))
        console.print(f"{case}: {max(errors[case].values()):.4f}")
    return errors, largest


def measure() -> Record:
    """
    Raises:
        `ValueError`: If the working tree has changes, so that no revision says what was counted.
    """
    clean_revision()
    errors, largest = emulate_cases(PROMPTS)
    rows = list_rows(NOTATIONS, LENGTH, **SIZES)
    blocks = {}
    for row in rows:
        typical = choose_typical_block(row)
        blocks[row.title] = Prediction.of(step for step in take_blocks(row).predict() if step.layer == typical)
    models = {row.title: Prediction.of(predict(row.config, row.settings, Span(0, LENGTH))) for row in rows}
    origin = collect_origin(torch.device("cpu"))
    return Record(predict_cases(), errors, largest, blocks, models, **origin)


def page(record: Record) -> str:
    """The page of the documentation that shows the record."""
    measured = private_inference.Record.load(private_inference.RECORD)
    tables = "\n\n".join(f"## {case}\n\n{_case_table(record, case)}" for case in record.predicted)
    return f"""# What each economy of private inference saves

Generated by `python -m entropy_gpt.evaluation.benchmarks.economies`; the figures are in
`{RECORD.relative_to(ROOT).as_posix()}`.
[How operations become cheap](private_inference.md#how-the-model-becomes-cheap).

**These are predictions**: bytes and round trips are counted from shapes, and nothing was measured. {FUSED} has the
sizes of GPT-2 small, and answers with the logits of its last token. MB are 10^6 bytes, sent by both parties together.
Seconds are those of a WAN (100 Mbps, 80 ms), with a core for each party.
[They are rough](private_inference.md#how-the-model-becomes-cheap).

- **None**: a product for each head, contests of pairs, division after the product with the values, reciprocals by
  comparisons, and embeddings by one-hot rows. All rows have the other economies.
- **Each row after it** has one economy alone, where the cost model finds it faster on a WAN. **All** has all of them.
- **The largest error** is that of the logits of `model_cards/models/{EMULATED}`, which are up to
  {record.largest_logit:.1f}, against float64 and the model's own functions. The ring is emulated, with {PROMPTS}
  prompts of held-out text. Truncations are random, so small differences mean nothing. The small model has the forms
  that are fastest for its own sizes. Heads as one product add zeros alone, which change no number.

{tables}

## Measured and predicted

The architectures of [the measured table](private_costs.md), at T={LENGTH}. "Then" are its measurements, of commit
{measured.git_revision}. "Today" are predictions for the forms of this page's commit,
with embeddings by one-hot rows. Seconds on a WAN were estimates then, too.

### A block

{_compare(private_inference.take_typical_blocks(measured.blocks), record.blocks)}

### The whole model

{_compare(private_inference.sum_up(measured).sums, record.models)}

Predicted with {describe_origin(record)}.
"""


def _case_table(record: Record, case: str) -> str:
    rows, errors = record.predicted[case], record.errors[case]
    none = rows[NONE]
    cells = [
        (
            economy,
            f"{row.total_bytes / MEGA:,.1f}",
            f"{row.total_bytes / none.total_bytes:.2f}",
            f"{row.round_trips:,.0f}",
            f"{row.round_trips / none.round_trips:.2f}",
            f"{row.wan_seconds:,.0f}",
            f"{row.wan_seconds / none.wan_seconds:.2f}",
            f"{errors[economy]:.4f}",
        )
        for economy, row in rows.items()
    ]
    share = "of none"
    return markdown_table(("economy", "MB", share, "round trips", share, "WAN, s", share, "largest error"), cells)


def _compare(then: dict[str, InferenceCost], today: dict[str, Prediction]) -> str:
    cells = [
        (
            title,
            f"{cost.total_bytes / MEGA:,.1f}",
            f"{today[title].total_bytes / MEGA:,.1f}",
            f"{cost.round_trips:,.0f}",
            f"{today[title].round_trips:,.0f}",
            f"{project(cost, WAN):,.0f}",
            f"{today[title].wan_seconds:,.0f}",
        )
        for title, cost in then.items()
    ]
    columns = ("MB", "round trips", "WAN, s")
    headings = ("architecture", *(f"{name}, {when}" for name in columns for when in ("then", "today")))
    return f"""{markdown_table(headings, cells)}

{_describe_ratio(then, today)}"""


def _describe_ratio(then: dict[str, InferenceCost], today: dict[str, Prediction]) -> str:
    before, now = (costs[TODAY].total_bytes / costs[PROPOSAL].total_bytes for costs in (then, today))
    return f"""{PROPOSAL} sent {before:.2f} times fewer bytes than "{TODAY}".
Today it sends {now:.2f} times fewer, by prediction."""


def main(redraw: Annotated[bool, typer.Option(help="Predict nothing; the page anew from the record.")] = False):
    """Predict what each economy saves, and emulate what it does to numbers."""
    record = Record.load(RECORD) if redraw else measure()
    record.save(RECORD)
    PAGE.write_text(page(record), encoding="utf-8")
    console.print(f"written: {RECORD}, {PAGE}")


if __name__ == "__main__":
    typer.run(main)
