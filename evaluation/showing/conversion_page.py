"""The report of a conversion as a page, and its tables."""

import math

from entropy_gpt.evaluation.measuring.operation_counts import OperationCounts
from entropy_gpt.evaluation.records.conditions import list_settings
from entropy_gpt.evaluation.records.conversion_report import ConversionReport

from .markdown import markdown_table


PICTURE = "healing.png"
# Beyond this many nats, a figure is shown by its order of magnitude.
LARGEST_NATS = 10.0
# The columns of the steps' table: headings in documents, and in a terminal of 80 characters.
STEP_COLUMNS = {
    "step": "step",
    "KL (nats)": "KL to the\noriginal",
    "perplexity": "ppl per\ntoken",
    "naive KL": "naive\nKL",
    "naive perplexity": "naive\nppl",
    "parameters": "para-\nmeters",
    "seconds": "sec-\nonds",
}


def step_rows(report: ConversionReport) -> list[tuple[str, ...]]:
    """One row of text for the original and each step, in the order of `STEP_COLUMNS`."""
    measured = ("", "") if report.original_nats is None else ("0.0000", format_perplexity(report.original_nats))
    rows = [("original", *measured, "", "", f"{report.original_parameters:,}", "")]
    for step in report.steps:
        naive = ("not finite", "") if step.naive_diverged else ("", "")
        if step.naive_kl is not None:
            naive = (_format_kl(step.naive_kl), format_perplexity(step.naive_nats))
        kept = "= " if step.kept else ""
        figures = (kept + _format_kl(step.kl), kept + format_perplexity(step.nats), *naive, f"{step.parameters:,}")
        rows.append((step.title, *figures, f"{step.seconds:.1f}"))
    return rows


def format_perplexity(nats: float) -> str:
    """The perplexity, as a power of e where it says no more than that the model is broken."""
    return f"{math.exp(nats):.2f}" if nats < LARGEST_NATS else f"e^{nats:.3g}"


def _format_kl(kl: float) -> str:
    return f"{kl:.4f}" if kl < LARGEST_NATS else f"{kl:.3g}"


def operation_rows(before: OperationCounts, after: OperationCounts) -> list[tuple[str, str, str]]:
    """What each operation was and is: non-linear ones with their shapes, and FLOPs."""
    shapes = [
        {operation.name: operation.text for operation in (*counts.nonlinear, *counts.apart)}
        for counts in (before, after)
    ]
    rows = [(name, *(of.get(name, "none") for of in shapes)) for name in dict.fromkeys([*shapes[0], *shapes[1]])]
    for title, name in (("FLOPs of FFNs", "ffn_flops"), ("FLOPs of attention", "attention_flops")):
        rows.append((title, *(f"{getattr(counts, name):,}" for counts in (before, after))))
    return rows


def report_markdown(report: ConversionReport) -> str:
    """The report as a page; the picture of healing is expected next to it."""
    conditions = report.conditions
    fitted = "Nothing but thresholds fitted; these to" if report.naive else "Fitted to"
    text = (
        f"{fitted} {report.calibration_tokens:,} tokens of {conditions.corpus} ({conditions.corpus_revision}); "
        f"measured on {conditions.evaluated_tokens:,} tokens of text kept apart from it, in blocks of "
        f"{conditions.context} tokens without overlap."
    )
    if report.original_nats is None:
        text = "Nothing had to be fitted, and nothing was measured, because there is no tokenizer."
    lines = [
        f"# {report.source_notation} to {report.target_notation}",
        "",
        f"Source: `{report.source}` (final norm: {report.source_final_normalization}, now "
        f"{report.target_final_normalization}).",
        "",
        markdown_table([*STEP_COLUMNS], step_rows(report), text_columns=1),
        "",
        "KL: of the next token's distribution, original to converted. Naive: what the step alone would have given "
        "with weights copied and nothing fitted; empty where there is nothing to fit. After =, figures of the "
        "step before: this one keeps every prediction, as a check on a sample of the text found. Seconds: of the step "
        "with its calibration, without the measurement.",
        "",
        f"{text} All of it took {report.seconds:.0f} s and "
        f"{report.peak_memory_bytes / 2**30:.2f} GiB at most. Seed {conditions.seed}, {conditions.dtype}. Versions: "
        f"{list_settings(conditions.versions)}; commit {conditions.git_revision or 'unknown'}; {conditions.machine}.",
        "",
        f"## Operations of a sequence of {conditions.context} tokens",
        "",
        markdown_table(
            ("operation", "before", "after"),
            operation_rows(report.source_operations, report.target_operations),
            text_columns=1,
        ),
    ]
    if report.pruning_damage:
        damages = ", ".join(f"layer {layer} {damage:.4f}" for layer, damage in report.pruning_damage.items())
        lines += ["", f"KL that pruning each FFN of the original alone costs, in nats: {damages}."]
    if report.healing is not None:
        healing = report.healing
        lines += [
            "",
            "## Healing",
            "",
            f"{healing.steps:,} steps, {healing.tokens:,} tokens, {healing.seconds:.0f} s "
            f"({list_settings(healing.settings)}).",
            "",
            f"![Loss against step]({PICTURE})",
            "",
            *(f"- step {step}: {event}" for step, event in healing.events),
        ]
    return "\n".join(lines).rstrip() + "\n"
