"""Shows a conversion: its plan, its progress, and what each step cost."""

import json
import shlex
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.planning import Step
from entropy_gpt.evaluation.measuring.operation_counts import count_operations
from entropy_gpt.evaluation.records.conversion_report import ConversionReport
from entropy_gpt.evaluation.records.results import RESULTS, load_results
from entropy_gpt.evaluation.showing.conversion_page import STEP_COLUMNS, format_perplexity, operation_rows, step_rows
from entropy_gpt.workflows.convert import Conversion, perform, prepare
from entropy_gpt.workflows.convert_inputs import LONGEST_CONTEXT, REPORT, ConversionOptions
from entropy_gpt.workflows.convert_steps import is_naive
from entropy_gpt.workflows.options import read_options
from modeling_entropy_gpt import EntropyGPTForCausalLM

from .progress import progress_display
from .tables import make_table


console = Console()


def run(settings: list[str] | None, dry_run: bool, **options):
    """
    Converts a model and shows the report, or shows only the plan.

    Args:
        settings (`list[str]`, *optional*): `FIELD=VALUE` settings of the target; values are JSON, or else text.
        dry_run (`bool`): Whether to show the plan and write nothing.
        options: The other arguments of [`~entropy_gpt.convert`].

    Raises:
        `UserError`: If an option, the source, the text, the target or the output can't be used, or healing diverges.
    """
    checked = read_options(ConversionOptions, settings=_read_settings(settings or []), **options)
    with progress_display(console) as progress:
        conversion = prepare(checked, progress)
        report = None if dry_run else perform(conversion, progress)
    if report is None:
        _show_plan(conversion)
    else:
        _show_report(report, checked)


def _read_settings(settings: list[str]) -> dict:
    fields = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting} is not FIELD=VALUE. Give a field and its value, such as resid_pdrop=0.")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def _show_plan(conversion: Conversion):
    options, plan = conversion.options, conversion.plan
    original, target = conversion.original.config, conversion.target
    with torch.device("meta"):
        parameters = EntropyGPTForCausalLM(target).num_parameters()
    context = options.context or min(target.n_positions, LONGEST_CONTEXT)
    console.print(f"[bold]{escape(original.notation)}[/] to [bold]{escape(target.notation)}[/]")
    for number, step in enumerate(plan.steps, 1):
        if step in plan.finish[:1]:
            _show_healing(options)
        console.print(f"{number:3d} {step.title} ({_describe_step(step, options.naive)})")
    if not plan.finish:
        _show_healing(options)
    table = Table("", "before", "after", box=SIMPLE_HEAD, pad_edge=False)
    before, after = (count_operations(config, context) for config in (original, target))
    table.add_row("parameters", f"{conversion.original.num_parameters():,}", f"{parameters:,}")
    for row in operation_rows(before, after):
        table.add_row(*row)
    console.print(table)
    console.print(f"Counted for a sequence of {context} tokens. Nothing was written.")
    if options.prune_by_damage:
        console.print(
            "The conversion will choose the FFNs to prune by their damage; this plan shows the deepest ones."
        )


def _show_healing(options: ConversionOptions):
    if options.heal_steps:
        console.print(f"    healing, {options.heal_steps:,} steps")


def _describe_step(step: Step, naive: bool) -> str:
    if not step.calibrated:
        return "exact"
    return "naive" if is_naive(step, naive) else "fitted to text"


def show_evaluation(report: ConversionReport, output: Path):
    """The perplexity of the result and of the original, or how to measure it."""
    (result,) = load_results(output / RESULTS)
    if result.likelihood is None:
        remedy = shlex.join(["entropy-gpt", "evaluate", str(output)])
        lines = [f"not evaluated, because there was no text; do it with: {remedy}"]
    else:
        before, after = (format_perplexity(step) for step in (report.original_nats, report.final_nats))
        likelihood = result.likelihood.likelihood
        lines = [
            f"perplexity per token: {after}; the original has {before} on the same tokens",
            f"evaluated for card and push: perplexity {likelihood.perplexity:.2f} per token, "
            f"{likelihood.bits_per_byte:.3f} bits per byte, on {likelihood.tokens:,} tokens kept apart",
        ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _show_report(report: ConversionReport, options: ConversionOptions):
    console.print(make_table([*STEP_COLUMNS.values()], step_rows(report)))
    measured = f"measured on {report.conditions.evaluated_tokens:,} tokens that nothing was fitted to"
    if report.original_nats is None:
        measured = "nothing was measured, because there is no tokenizer"
    console.print(
        f"{report.seconds:.0f} s, at most {report.peak_memory_bytes / 2**30:.2f} GiB; {measured}", style="dim"
    )
    show_evaluation(report, options.output)
    console.print(f"the model, ready for the Hub: {options.output}", markup=False, soft_wrap=True)
    console.print(f"the report: {options.output / REPORT}.md", markup=False, soft_wrap=True)
