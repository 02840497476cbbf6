"""What the check inside a private inference finds and costs: corrupted runs, honest runs, bytes and round trips.

python -m entropy_gpt.evaluation.benchmarks.range_check --models DIR --models DIR  minutes for each model
python -m entropy_gpt.evaluation.benchmarks.range_check --quick  few runs, nothing written
python -m entropy_gpt.evaluation.benchmarks.range_check --redraw  the page anew from the record
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
import typer
from pydantic.dataclasses import dataclass
from rich.console import Console

from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.json_records import RECORD as CONFIG
from entropy_gpt.evaluation.json_records import StoredRecord
from entropy_gpt.evaluation.origin import ROOT, Origin, collect_origin
from entropy_gpt.evaluation.private_inference.costs.cost_model import predict, program_config
from entropy_gpt.evaluation.private_inference.costs.measured_inference import make_config
from entropy_gpt.evaluation.private_inference.detection import (
    CORRUPTIONS,
    SHIFT,
    SHIFTED_BITS,
    Detection,
    FalseAlarms,
    measure_detection,
    measure_false_alarms,
)
from entropy_gpt.evaluation.private_inference.parties.engine import engine_versions
from entropy_gpt.evaluation.private_inference.program.counting import (
    TRUNCATED,
    CountingArithmetic,
    Stock,
    count_product,
)
from entropy_gpt.evaluation.private_inference.program.prices import load_prices, price_of
from entropy_gpt.evaluation.private_inference.program.program import build_steps
from entropy_gpt.evaluation.private_inference.program.range_audit import audit, choose_sequences
from entropy_gpt.evaluation.private_inference.program.range_report import LARGEST_MARGIN, tolerated_error
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span, run_steps
from entropy_gpt.evaluation.private_inference.program.variables import program_variables
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from entropy_gpt.evaluation.records.conditions import list_settings
from entropy_gpt.evaluation.records.results import RESULTS, load_results
from entropy_gpt.evaluation.showing.markdown import fold_away, markdown_table
from entropy_gpt.training.corpus import load_standard_library
from entropy_gpt.training.tokenizer import load_tokenizer
from modeling_entropy_gpt import EntropyGPTConfig


RECORD = ROOT / "model_cards" / "results" / "range_check.json"
PAGE = ROOT / "docs" / "range_check.md"
MODELS = [ROOT / "model_cards" / "models" / name for name in ("sm-ln-g", "converted")]

LENGTH, PROMPTS = 16, 20
RUNS, HONEST_RUNS = 30, 2_000
QUICK_RUNS, QUICK_HONEST_RUNS = 3, 200
# In addition, a twentieth as many honest runs are as long as the model allows.
LONG_SHARE = 20
# Without one event in n runs, its probability is below 3 / n with 95 % confidence.
RULE_OF_THREE = 3
# What costs are predicted for.
GPT2_SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}
COSTED, POSITIONS = ("SM+LN+G", "SM+LN+R", "SM+ScFuFFN"), 128

console = Console()


@dataclass(frozen=True)
class Share:
    """
    What the check takes of an inference of GPT-2 small, as predicted from shapes.

    Args:
        notation (`str`): The architecture.
        pass_of (`str`): The tokens.
        check_bytes, total_bytes (`float`):
            Bytes that both parties send; the check's are those of its steps and of the checksums' columns in products.
        check_round_trips, total_round_trips (`float`): One after the other.
    """

    notation: str
    pass_of: str
    check_bytes: float
    total_bytes: float
    check_round_trips: float
    total_round_trips: float


@dataclass(config=CONFIG)
class Record(StoredRecord, Origin):
    """
    All that was measured, and where.

    Args:
        length (`int`): Tokens of a prompt that is corrupted.
        margins (`dict[str, float]`): By architecture, the margin of its bounds.
        trained (`dict[str, int]`): By architecture, the tokens that its model was trained with, where that is known.
        detections (`list[Detection]`): For each model, corruption and block.
        honest (`list[FalseAlarms]`): For each model and length.
    """

    KIND: ClassVar[str] = "the benchmark of the check of private inferences"
    SCHEMA_VERSION: ClassVar[int] = 4

    length: int
    margins: dict[str, float]
    trained: dict[str, int]
    detections: list[Detection]
    honest: list[FalseAlarms]

    @classmethod
    def migrate(cls, content: dict, version: int) -> dict | None:
        """
        Version 1 had one length for all, and one margin; version 2 did not say how long models were trained; both,
        and version 3, had predicted costs, which the page has of today's program.
        """
        kept = {name: part for name, part in content.items() if name != "shares"}
        if version == 3:
            return kept
        if version == 2:
            return {**kept, "trained": {}}
        if version != 1:
            return None
        honest = [{**each, "length": content["length"]} for each in content["honest"]]
        margins = {each["notation"]: LARGEST_MARGIN for each in honest}
        return {**kept, "honest": honest, "margins": margins, "trained": {}}


@dataclass(config=CONFIG)
class Measured:
    """What was measured of one model; as of [`Record`]."""

    notation: str
    margin: float
    trained: int | None
    detections: list[Detection]
    honest: list[FalseAlarms]


def measure_model(folder: Path, runs: int, honest_runs: int) -> Measured:
    """
    Half of the prompts are held-out text, half of them random tokens. The audit sees neither.

    Args:
        folder (`Path`): A trained model with its tokenizer.
        runs (`int`): Runs of each gross corruption in each block.
        honest_runs (`int`): Runs without one.
    """
    model, tokenizer = load_language_model(folder).eval(), load_tokenizer(str(folder))
    notation = model.config.notation
    config, weights = prepare_weights(model)
    report = audit(config, weights, PrivateSettings(), choose_sequences(config, weights))
    weights |= report.bounds
    console.print(f"{notation}: {'; '.join(report.problems) or 'fits'}, margin {report.margin:.2f}")
    text = "".join(document.text for document in load_standard_library().validation)
    prompts = choose_prompts(tokenizer, text, config.vocab_size, honest_runs, LENGTH)
    longest = choose_prompts(tokenizer, text, config.vocab_size, max(2, honest_runs // LONG_SHARE), config.n_positions)
    honest = [measure_false_alarms(notation, config, weights, each) for each in (prompts, longest)]
    console.print(*honest)
    chosen = np.random.default_rng(1).permutation(prompts)[:PROMPTS]
    tolerated = tolerated_error(report.typical_logit)
    detections = []
    for detection in measure_detection(notation, config, weights, chosen, runs, tolerated):
        console.print(
            f"{detection.corruption}, block {detection.block}: {detection.returned} of {detection.runs} returned"
        )
        detections.append(detection)
    return Measured(notation, report.margin, _read_training(folder), detections, honest)


def _read_training(folder: Path) -> int | None:
    """The tokens that a model was trained with, by the results in its folder."""
    path = folder / RESULTS
    training = [result.training for result in load_results(path)] if path.is_file() else []
    return training[0].tokens if training and training[0] else None


def choose_prompts(tokenizer, text: str, vocab_size: int, runs: int, length: int) -> np.ndarray:
    """`(runs, length)`, half of them text as far as it reaches, and the rest random tokens."""
    tokens = np.array(tokenizer(text[: 4 * runs * length])["input_ids"])
    rows = tokens[: len(tokens) // length * length].reshape(-1, length)[: runs // 2]
    return np.concatenate([rows, np.random.default_rng(1).integers(0, vocab_size, (runs - len(rows), length))])


def predict_shares() -> list[Share]:
    """By today's program, whatever was measured with the record's."""
    shares = []
    for notation in COSTED:
        for pass_of, span in (
            (f"{POSITIONS} tokens", Span(0, POSITIONS)),
            (f"one token after {POSITIONS}", Span(POSITIONS, 1)),
        ):
            config = make_config(notation, 2 * POSITIONS, **GPT2_SMALL)
            steps = predict(config, PrivateSettings(), span)
            check = [step for step in steps if step.operation == "check"]
            shares.append(
                Share(
                    notation,
                    pass_of,
                    sum(step.total_bytes for step in check) + _predict_columns(config, span),
                    sum(step.total_bytes for step in steps),
                    sum(step.round_trips for step in check),
                    sum(step.round_trips for step in steps),
                )
            )
    return shares


def _predict_columns(config: EntropyGPTConfig, span: Span) -> float:
    """What the checksums' columns add to the bytes of products."""
    config, settings = program_config(config), PrivateSettings()
    ops = _ColumnCounting(settings, Stock())
    run_steps(build_steps(config, settings, span), ops, program_variables(config, settings, span))
    return price_of(ops.columns, load_prices().bytes)


class _ColumnCounting(CountingArithmetic):
    """Counts in `columns` what products have more by their last column, where that is a checksum."""

    def __init__(self, settings: PrivateSettings, stock: Stock):
        super().__init__(settings, stock)
        self.columns, self._matrices = Counter(), []

    def append_checksum(self, tensor):
        self._matrices.append(super().append_checksum(tensor))
        return self._matrices[-1]

    def ring_matmul(self, left, right):
        if any(right is matrix for matrix in self._matrices):
            rows, (inner, columns) = len(left), right.shape
            self.columns.update(count_product(rows, inner, columns))
            self.columns.subtract(count_product(rows, inner, columns - 1))
            self.columns[TRUNCATED] += rows
        return super().ring_matmul(left, right)


def page(record: Record) -> str:
    """The page of the documentation that shows the record."""
    gross, subtle = (
        [each for each in record.detections if CORRUPTIONS[each.corruption].is_gross is is_gross]
        for is_gross in (True, False)
    )
    corrupted, other_logits, other_token = (
        sum(getattr(detection, part) for detection in gross) for part in ("runs", "other_logits", "other_token")
    )
    honest = sum(alarms.runs for alarms in record.honest)
    stopped = sum(alarms.stopped for alarms in record.honest)
    conditions = [
        "The ring is emulated in numpy, with the truncations of Cheetah. A tensor is corrupted in a block, and the "
        "rest of the program runs on. Each block was corrupted in as many runs. The stream is corrupted after the "
        "block; keys, values and scores are corrupted within it.",
        "Uniform numbers are any of the ring. 2^28 is in units of the stream, or of its last bit. Errors of one "
        "number are of any order of magnitude in their range, and of both signs.",
        f"Prompts have {record.length} tokens, half held-out text and half random tokens. The audit has seen neither.",
        "A returned run has other logits if one of them differs from the honest run by more than the audit tolerates: "
        "0.05 and 1.5 % of a typical logit. Answers with tokens are the same program with one more comparison.",
        "Honest runs are emulated in the ring too. Half are text as far as there is enough of it.",
        "Of bounds: margin "
        + ", ".join(f"{margin:.2g} for {name}" for name, margin in record.margins.items())
        + " ([why](private_inference.md#never-silently-wrong)).",
    ]
    trained = ", ".join(f"{tokens:,} for {name}" for name, tokens in record.trained.items())
    conditions.append(
        f"Tokens in training: {trained}." if trained else "How long the models were trained was not recorded."
    )
    return f"""# What the check of a private inference finds

Generated by `python -m entropy_gpt.evaluation.benchmarks.range_check --models ...`; the figures are in
`{RECORD.relative_to(ROOT).as_posix()}`. [The check](private_inference.md#never-silently-wrong) compares the residual
stream, the scores and the logits with bounds, and stream and logits with checksums, inside the protocol.

- Of {corrupted:,} grossly corrupted runs, **{other_logits:,}** were returned with other logits, and
  **{other_token:,}** with another token{_bound(other_logits, corrupted)}.
- Of {honest:,} honest runs, **{stopped:,}** were stopped{_bound(stopped, honest)}.
- Errors inside attention that leave a plausible answer are not all found. The second table shows how many.

## Gross corruption

{fold_away("Conditions", conditions)}

{_corruption_table(gross)}

By architecture, over all of these and all blocks:

{_architecture_table(gross)}

## What is not gross

Checksums find errors of single numbers of the stream, from a few times the rounding error on. Bounds find numbers that
are too large, wherever they come from. Neither can find an answer that an honest run could have given.

- **Scores, keys and values** are computed before the product that has a checksum. With a wrong score, attention looks
  elsewhere. What comes out is an average of values still.
- **A whole row times 2, or of other signs**, has a checksum that changes with it. Two numbers exchanged within a row
  may leave theirs.

To find these too, every share would have to be authenticated, which this engine does not do. Errors of the engine that
were seen so far were gross: the ring wraps around, or a truncation fails in its highest bits.

{_corruption_table([each for each in subtle if each.corruption not in SHIFTS])}

One number of the stream off by a power of 2, up or down:

{_shift_table(subtle)}

## Honest runs

The nearest sum is the largest in any run, as a share of its bound. "At most" is the share of runs stopped, with 95 %
confidence, where none was: 3 in as many runs. Each architecture is one model.

{_honest_table(record.honest)}

## Costs

Predicted for GPT-2 small and a WAN, as `entropy-gpt private cost` predicts them. They are those of today's program;
all else on this page was measured at the commit below.

{_share_table(predict_shares())}

Measured with {list_settings(record.versions)}; commit {record.git_revision}; {record.machine}.
"""


DETECTION_COLUMNS = ("runs", "returned", "other logits", "another token")
SHIFTS = {SHIFT.format(bit=bit): bit for bit in SHIFTED_BITS}
# Powers of 2 in one row of the table.
SHIFTS_A_ROW = 4


def _bound(found: int, runs: int) -> str:
    """What none among these runs says of the next."""
    return "" if found else f": at most 1 in {runs // RULE_OF_THREE:,}, with 95 % confidence"


def _corruption_table(detections: Sequence[Detection]) -> str:
    names = dict.fromkeys(detection.corruption for detection in detections)
    groups = {name: [each for each in detections if each.corruption == name] for name in names}
    return markdown_table(("corruption", *DETECTION_COLUMNS), [_sum_up(*group) for group in groups.items()])


def _architecture_table(detections: Sequence[Detection]) -> str:
    names = dict.fromkeys(detection.notation for detection in detections)
    groups = {name: [each for each in detections if each.notation == name] for name in names}
    return markdown_table(("architecture", *DETECTION_COLUMNS), [_sum_up(*group) for group in groups.items()])


def _shift_table(detections: Sequence[Detection]) -> str:
    rows = []
    for first in SHIFTED_BITS[::SHIFTS_A_ROW]:
        last = min(first + SHIFTS_A_ROW, SHIFTED_BITS.stop) - 1
        group = [each for each in detections if first <= SHIFTS.get(each.corruption, -1) <= last]
        one = 2.0 ** -PrivateSettings().fraction_bits
        rows.append(_sum_up(f"{2**first * one:.2g} to {2**last * one:.2g} (2^{first} to 2^{last} last bits)", group))
    return markdown_table(("off by", *DETECTION_COLUMNS), rows)


def _sum_up(name: str, detections: Sequence[Detection]) -> tuple[str, ...]:
    parts = ("runs", "returned", "other_logits", "other_token")
    return name, *(f"{sum(getattr(detection, part) for detection in detections):,}" for part in parts)


def _honest_table(honest: Sequence[FalseAlarms]) -> str:
    rows = [
        (
            each.notation,
            str(each.length),
            f"{each.runs:,}",
            f"{each.stopped:,}",
            "" if each.stopped else f"{RULE_OF_THREE / each.runs:.1e}",
            f"{each.nearest:.2f}",
        )
        for each in honest
    ]
    return markdown_table(("architecture", "tokens", "runs", "stopped", "at most", "nearest sum"), rows)


def _share_table(shares: Sequence[Share]) -> str:
    columns = ("architecture", "pass", "check, MB", "of all bytes", "round trips", "of all round trips")
    rows = [
        (
            share.notation,
            share.pass_of,
            f"{share.check_bytes / 1e6:.2f}",
            f"{share.check_bytes / share.total_bytes:.2%}",
            f"{share.check_round_trips:.0f}",
            f"{share.check_round_trips / share.total_round_trips:.2%}",
        )
        for share in shares
    ]
    return markdown_table(columns, rows)


def measure(folders: Sequence[Path], runs: int, honest_runs: int) -> Record:
    """Each model in a process of its own."""
    with ProcessPoolExecutor(len(folders)) as processes:
        results = list(processes.map(partial(measure_model, runs=runs, honest_runs=honest_runs), folders))
    return Record(
        length=LENGTH,
        margins={result.notation: result.margin for result in results},
        trained={result.notation: result.trained for result in results if result.trained is not None},
        detections=[detection for result in results for detection in result.detections],
        honest=[honest for result in results for honest in result.honest],
        **collect_origin(torch.device("cpu"), engine_versions()),
    )


def main(
    models: Annotated[
        list[Path] | None, typer.Option(help="Trained models. Default: the two of this project.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each gross corruption in each block.")] = RUNS,
    honest_runs: Annotated[int, typer.Option(min=2, help="Honest runs of each model.")] = HONEST_RUNS,
    quick: Annotated[bool, typer.Option(help="Few runs; writes nothing.")] = False,
    redraw: Annotated[bool, typer.Option(help="Measure nothing; the page anew from the record.")] = False,
):
    """Measure what the check of a private inference finds and costs."""
    if quick:
        measure(MODELS, QUICK_RUNS, QUICK_HONEST_RUNS)
        return
    record = Record.load(RECORD) if redraw else measure(models or MODELS, runs, honest_runs)
    record.save(RECORD)
    PAGE.write_text(page(record), encoding="utf-8")
    console.print(f"written: {RECORD}, {PAGE}")


if __name__ == "__main__":
    typer.run(main)
