"""What the check inside a private inference finds and costs: corrupted runs, honest runs, bytes and round trips.

python -m entropy_gpt.evaluation.benchmarks.range_check --models DIR --models DIR  minutes for each model
python -m entropy_gpt.evaluation.benchmarks.range_check --quick  few runs, nothing written
python -m entropy_gpt.evaluation.benchmarks.range_check --redraw  the page anew from the record
"""

from collections.abc import Sequence
from dataclasses import replace
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
from entropy_gpt.evaluation.private_inference.costs.cost_model import predict
from entropy_gpt.evaluation.private_inference.costs.measured_inference import make_config
from entropy_gpt.evaluation.private_inference.detection import (
    CORRUPTIONS,
    Detection,
    FalseAlarms,
    measure_detection,
    measure_false_alarms,
)
from entropy_gpt.evaluation.private_inference.parties.engine import engine_versions
from entropy_gpt.evaluation.private_inference.program.program import Span
from entropy_gpt.evaluation.private_inference.program.range_audit import audit, choose_sequences, tolerated_error
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from entropy_gpt.evaluation.records.conditions import list_settings
from entropy_gpt.evaluation.showing.markdown import fold_away, markdown_table
from entropy_gpt.training.corpus import load_standard_library
from entropy_gpt.training.tokenizer import load_tokenizer


RECORD = ROOT / "model_cards" / "results" / "range_check.json"
PAGE = ROOT / "docs" / "range_check.md"
MODELS = [ROOT / "model_cards" / "models" / name for name in ("sm-ln-g", "converted")]

LENGTH, PROMPTS = 16, 20
RUNS, HONEST_RUNS = 50, 10_000
QUICK_RUNS, QUICK_HONEST_RUNS = 3, 200
# What costs are predicted for.
GPT2_SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}
COSTED, POSITIONS = ("SM+LN+G", "SM+LN+R", "SM+ScFuFFN"), 128

console = Console()


@dataclass(config=CONFIG)
class Share:
    """
    What the check takes of an inference of GPT-2 small, as predicted from shapes.

    Args:
        notation (`str`): The architecture.
        pass_of (`str`): The tokens.
        check_bytes, total_bytes (`float`): Bytes that both parties send.
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
        length (`int`): Tokens of a prompt.
        detections (`list[Detection]`): For each model, corruption and block.
        honest (`list[FalseAlarms]`): For each model.
        shares (`list[Share]`): Predicted costs.
    """

    KIND: ClassVar[str] = "the benchmark of the check of private inferences"
    SCHEMA_VERSION: ClassVar[int] = 1

    length: int
    detections: list[Detection]
    honest: list[FalseAlarms]
    shares: list[Share]


def measure_model(folder: Path, runs: int, honest_runs: int) -> tuple[list[Detection], FalseAlarms]:
    """
    Half of the prompts are held-out text, half of them random tokens. The audit sees neither.

    Args:
        folder (`Path`): A trained model with its tokenizer.
        runs (`int`): Runs of each corruption after each block.
        honest_runs (`int`): Runs without one.
    """
    model, tokenizer, random = (
        load_language_model(folder).eval(),
        load_tokenizer(str(folder)),
        np.random.default_rng(1),
    )
    config, weights = prepare_weights(model)
    report = audit(config, weights, PrivateSettings(), choose_sequences(config, weights))
    console.print(f"{model.config.notation}: {'; '.join(report.problems) or 'fits'}")
    text = "".join(document.text for document in load_standard_library().validation)
    rows = honest_runs // 2
    tokens = np.array(tokenizer(text[: 8 * rows * LENGTH])["input_ids"])
    tokens = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)[:rows]
    prompts = np.concatenate([tokens, random.integers(0, config.vocab_size, (honest_runs - len(tokens), LENGTH))])
    honest = measure_false_alarms(model, report.bounds, prompts)
    console.print(honest)
    chosen = random.permutation(prompts)[:PROMPTS]
    detections = []
    for detection in measure_detection(
        model.config.notation, config, weights | report.bounds, chosen, runs, tolerated_error(report.typical_logit)
    ):
        console.print(
            f"{detection.corruption}, block {detection.block}: {detection.returned} of {detection.runs} returned"
        )
        detections.append(detection)
    return detections, honest


def predict_shares() -> list[Share]:
    shares = []
    for notation in COSTED:
        for pass_of, span in (
            (f"{POSITIONS} tokens", Span(0, POSITIONS)),
            (f"one token after {POSITIONS}", Span(POSITIONS, 1)),
        ):
            steps = predict(make_config(notation, 2 * POSITIONS, **GPT2_SMALL), PrivateSettings(), span)
            check = [step for step in steps if step.operation == "check"]
            shares.append(
                Share(
                    notation,
                    pass_of,
                    sum(step.total_bytes for step in check),
                    sum(step.total_bytes for step in steps),
                    sum(step.round_trips for step in check),
                    sum(step.round_trips for step in steps),
                )
            )
    return shares


def page(record: Record) -> str:
    """The page of the documentation that shows the record."""
    corrupted = sum(detection.runs for detection in record.detections)
    other_logits = sum(detection.other_logits for detection in record.detections)
    other_token = sum(detection.other_token for detection in record.detections)
    honest = sum(alarms.runs for alarms in record.honest)
    stopped = sum(alarms.stopped for alarms in record.honest)
    conditions = [
        "The ring is emulated in numpy, with the truncations of Cheetah. The stream is corrupted after a block, and "
        "the rest of the program runs on. Each block was corrupted in as many runs.",
        "Uniform numbers are any of the ring. 2^28 is in units of the stream, or of its last bit. Errors of one "
        "number are of any order of magnitude in their range, and of both signs.",
        f"Prompts have {record.length} tokens, half held-out text and half random tokens. The audit has seen neither.",
        "A returned run has other logits if one of them differs from the honest run by more than the audit tolerates: "
        "0.05 and 1.5 % of a typical logit. Answers with tokens are the same program with one more comparison.",
        "Honest runs are computed by torch, in floating point. Rounding is far below the bounds.",
    ]
    return f"""# What the check of a private inference finds

Generated by `python -m entropy_gpt.evaluation.benchmarks.range_check --models ...`; the figures are in
`{RECORD.relative_to(ROOT).as_posix()}`. [The check](private_inference.md#never-silently-wrong) compares the residual
stream and the logits with bounds, inside the protocol.

- Of {corrupted:,} corrupted runs, **{other_logits:,}** were returned with other logits, and **{other_token:,}** with
  another token.
- Of {honest:,} honest runs, **{stopped:,}** were stopped.

## Corrupted runs

{fold_away("Conditions", conditions)}

{_corruption_table(record.detections)}

By architecture, over all corruptions and blocks:

{_architecture_table(record.detections)}

## Honest runs

The nearest sum is the largest in any run, as a share of its bound.

{_honest_table(record.honest)}

## Costs

Predicted for GPT-2 small, as `entropy-gpt private cost` predicts them.

{_share_table(record.shares)}

Measured with {list_settings(record.versions)}; commit {record.git_revision}; {record.machine}.
"""


DETECTION_COLUMNS = ("runs", "returned", "other logits", "another token")


def _corruption_table(detections: Sequence[Detection]) -> str:
    groups = {name: [each for each in detections if each.corruption == name] for name in CORRUPTIONS}
    return markdown_table(("corruption", *DETECTION_COLUMNS), [_sum_up(*group) for group in groups.items()])


def _architecture_table(detections: Sequence[Detection]) -> str:
    names = dict.fromkeys(detection.notation for detection in detections)
    groups = {name: [each for each in detections if each.notation == name] for name in names}
    return markdown_table(("architecture", *DETECTION_COLUMNS), [_sum_up(*group) for group in groups.items()])


def _sum_up(name: str, detections: Sequence[Detection]) -> tuple[str, ...]:
    parts = ("runs", "returned", "other_logits", "other_token")
    return name, *(f"{sum(getattr(detection, part) for detection in detections):,}" for part in parts)


def _honest_table(honest: Sequence[FalseAlarms]) -> str:
    rows = [(each.notation, f"{each.runs:,}", f"{each.stopped:,}", f"{each.nearest:.2f}") for each in honest]
    return markdown_table(("architecture", "runs", "stopped", "nearest sum"), rows)


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
    """Each model after the other, and the predicted costs."""
    results = [measure_model(folder, runs, honest_runs) for folder in folders]
    return Record(
        length=LENGTH,
        detections=[detection for detections, _ in results for detection in detections],
        honest=[honest for _, honest in results],
        shares=predict_shares(),
        **collect_origin(torch.device("cpu"), engine_versions()),
    )


def main(
    models: Annotated[
        list[Path] | None, typer.Option(help="Trained models. Default: the two of this project.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each corruption after each block.")] = RUNS,
    honest_runs: Annotated[int, typer.Option(min=2, help="Honest runs of each model.")] = HONEST_RUNS,
    quick: Annotated[bool, typer.Option(help="Few runs; writes nothing.")] = False,
    redraw: Annotated[bool, typer.Option(help="Measure nothing; the page anew from the record.")] = False,
):
    """Measure what the check of a private inference finds and costs."""
    if quick:
        measure(MODELS, QUICK_RUNS, QUICK_HONEST_RUNS)
        return
    if redraw:
        record = replace(Record.load(RECORD), shares=predict_shares())
    else:
        record = measure(models or MODELS, runs, honest_runs)
    record.save(RECORD)
    PAGE.write_text(page(record), encoding="utf-8")
    console.print(f"written: {RECORD}, {PAGE}")


if __name__ == "__main__":
    typer.run(main)
