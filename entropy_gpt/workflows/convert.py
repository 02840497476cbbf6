"""The stages of a conversion: plan, simplify, heal, finish, save. What is interrupted goes on from its last stage."""

import copy
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from datasets import disable_progress_bars
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from entropy_gpt.conversion.calibration import Calibration, calibrate, fingerprint
from entropy_gpt.conversion.divergence import Divergence, Reference
from entropy_gpt.conversion.errors import ConversionError, NotFiniteError
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.conversion.simplification import (
    Plan,
    Step,
    measure_pruning_damage,
    plan_conversion,
    set_training_fields,
)
from entropy_gpt.conversion.tokenizer_files import save_tokenizer
from entropy_gpt.evaluation.measuring.operation_counts import count_operations
from entropy_gpt.evaluation.measuring.perplexity import Windows
from entropy_gpt.evaluation.origin import git_revision, machine_name, peak_memory, recorded_versions
from entropy_gpt.evaluation.records.conversion_report import ConversionReport, StepRecord
from entropy_gpt.evaluation.records.measurement import describe_model
from entropy_gpt.evaluation.records.results import RESULTS, Conditions, ModelResult, TrainingResult, save_results
from entropy_gpt.evaluation.showing.conversion_page import (
    PICTURE,
    format_perplexity,
    operation_rows,
    report_markdown,
    step_rows,
)
from entropy_gpt.evaluation.showing.plots import plot_healing
from entropy_gpt.terminal.progress import progress_display
from entropy_gpt.terminal.tables import make_table
from entropy_gpt.training.errors import DivergedError
from entropy_gpt.training.files import delete, written_whole
from entropy_gpt.training.progress import Progress
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .convert_inputs import (
    LONGEST_CONTEXT,
    REPORT,
    Job,
    Text,
    check_amount,
    check_options,
    check_output,
    find_base_model,
    find_target,
    name_source,
    read_text,
)
from .heal import heal


# The columns of the report's table, for a terminal of 80 characters.
HEADINGS = ("step", "KL to the\noriginal", "ppl per\ntoken", "naive\nKL", "naive\nppl", "para-\nmeters", "sec-\nonds")

console = Console()


def run(job: Job, dry_run: bool):
    """
    Runs all stages.

    Args:
        job ([`Job`]): What is wanted.
        dry_run (`bool`): Whether to show the plan and write nothing.

    Raises:
        `UserError`: If the source, the text, the target or the output can't be used, or healing runs away.
    """
    disable_progress_bars()
    logging.disable_progress_bar()
    try:
        check_options(job)
        check_output(job)
        with progress_display(console) as progress:
            with progress.stage("loading the model") as line:
                original = load_language_model(job.source).float()
                original.to("cuda" if torch.cuda.is_available() else "cpu")
                line.say(f"{original.config.notation}, {original.num_parameters():,} parameters")
            target = find_target(original.config, job)
            plan = plan_conversion(original.config, target)
            if not dry_run:
                report = convert(job, original, target, read_text(job, original.config, progress), progress)
    except NotFiniteError as error:
        raise DivergedError(str(error)) from error
    if dry_run:
        _show_plan(original, target, plan, job)
    else:
        _print_report(report, job)


def convert(
    job: Job, original: EntropyGPTForCausalLM, target: EntropyGPTConfig, text: Text, progress: Progress
) -> ConversionReport:
    """
    Runs the plan from a model to a target, heals, and puts the whole folder in its place.

    Raises:
        `ConversionError`: If no steps lead to the target, or there is too little text.
        `UserError`: If healing runs away.
    """
    check_amount(text, original, plan_conversion(original.config, target))
    _begin_work(job, original, text)
    try:
        report = _convert(job, original, target, text, progress)
    except ConversionError:  # it would come again
        delete(job.work)
        raise
    return report


def _convert(
    job: Job, original: EntropyGPTForCausalLM, target: EntropyGPTConfig, text: Text, progress: Progress
) -> ConversionReport:
    started = time.perf_counter()
    measure = _Measurement(original, text, progress)
    calibrator = _Calibrator(text, job.calibration_folder or job.work / "calibration", progress)
    original_nats = measure(original, "the original")[0].nats

    damage = {}
    if job.prune_by_damage:
        target, damage = _choose_ffns(original, target, calibrator, text, progress)
    plan = plan_conversion(original.config, target)
    records: list[StepRecord] = []
    model = original
    for step in plan.simplifications:
        model = _take(step, model, calibrator, measure, records, job.naive)
    model = set_training_fields(model, target)
    healing = None
    if job.heal_steps:
        model, healing = heal(job, original, model, calibrator(original), text, progress)
        divergence, *_ = measure(model, "healing")
        records.append(_record(f"healed, {job.heal_steps:,} steps", model, [divergence], healing.seconds))
    for step in plan.finish:
        model = _take(step, model, calibrator, measure, records, job.naive)

    report = ConversionReport(
        source=job.source,
        source_notation=original.config.notation,
        target_notation=model.config.notation,
        source_final_normalization=original.config.final_normalization,
        target_final_normalization=model.config.final_normalization,
        original_nats=original_nats,
        original_parameters=original.num_parameters(),
        source_operations=count_operations(original.config, text.context),
        target_operations=count_operations(model.config, text.context),
        pruning_damage={str(layer): kl for layer, kl in damage.items()},
        naive=job.naive,
        calibration_tokens=text.calibration_tokens,
        steps=records,
        healing=healing,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory(),
        conditions=Conditions(
            corpus=text.name,
            corpus_revision=text.revision,
            vocab_size=len(text.tokenizer),
            context=text.context,
            evaluated_tokens=sum(batch.numel() - len(batch) for batch in text.validation),
            dtype=str(model.dtype).removeprefix("torch."),
            seed=job.seed,
            versions=recorded_versions(),
            git_revision=git_revision(),
            machine=machine_name(model.device),
        ),
    )
    _save(job, model.cpu(), text.tokenizer, report)
    return report


def _begin_work(job: Job, original: EntropyGPTForCausalLM, text: Text):
    """Makes the folder of unfinished work, or empties it if it is that of another job."""
    settings = {
        **{name: str(value) for name, value in vars(job).items()},
        "original": fingerprint(original, text.calibration, None),
        "corpus": text.revision,
        "versions": recorded_versions(),
        "git_revision": git_revision(),
    }
    notes = job.work / "settings.json"
    if notes.exists() and notes.read_text(encoding="utf-8") == json.dumps(settings):
        console.print(f"going on with what is in {job.work}", markup=False, soft_wrap=True)
        return
    delete(job.work)
    with written_whole(notes) as path:
        path.write_text(json.dumps(settings), encoding="utf-8")


class _Measurement:
    """Holds models against the original on validation text."""

    def __init__(self, original: EntropyGPTForCausalLM, text: Text, progress: Progress):
        self.reference, self.progress = Reference(original, text.validation), progress

    def __call__(self, model: EntropyGPTForCausalLM, after: str, *others: EntropyGPTForCausalLM) -> list[Divergence]:
        with self.progress.stage(f"measuring {after}", sum(map(len, self.reference.batches))) as line:
            found = self.reference.compare([model, *others], line.advance)
            line.say(f"KL {found[0].kl:.4f}, perplexity {format_perplexity(found[0].nats)}")
        if not found[0].is_finite:
            raise NotFiniteError(f"After {after}, the model's predictions are not finite: it can't be converted so.")
        return found


class _Calibrator:
    """Takes statistics, or finds them where they were kept."""

    def __init__(self, text: Text, folder: Path, progress: Progress):
        self.batches, self.folder, self.progress = text.calibration, folder, progress

    def __call__(self, model: EntropyGPTForCausalLM, hidden_activation: str | None = None) -> Calibration:
        path = self.folder / f"{fingerprint(model, self.batches, hidden_activation)}.safetensors"
        if not path.exists():
            with self.progress.stage("calibrating", sum(map(len, self.batches))) as line:
                calibration = calibrate(model, self.batches, hidden_activation, line.advance)
            with written_whole(path) as temporary:
                calibration.save(temporary)
        return Calibration.load(path)


def _take(
    step: Step,
    model: EntropyGPTForCausalLM,
    calibrator: _Calibrator,
    measure: _Measurement,
    records: list,
    naive: bool,
):
    """A step, beside its naive version; or what is fitted otherwise in its naive version alone."""
    started = time.perf_counter()
    alone = _is_naive(step, naive)
    if alone:
        simpler = step.naive(model)
    else:
        calibration = calibrator(model, step.hidden_activation) if step.calibrated else None
        simpler = step.apply(model, calibration)
    seconds = time.perf_counter() - started
    others = [] if alone or step.naive is None else [step.naive(model)]
    divergences = measure(simpler, step.title, *others)
    records.append(_record(step.title, simpler, divergences, seconds))
    return simpler


def _is_naive(step: Step, wanted: bool) -> bool:
    """Where nothing is fitted; thresholds always are, which change no prediction."""
    return wanted and step.calibrated and step.naive is not None


def _record(title: str, model: EntropyGPTForCausalLM, divergences: list[Divergence], seconds: float) -> StepRecord:
    found, *naive = divergences
    is_finite = bool(naive) and naive[0].is_finite
    return StepRecord(
        title=title,
        kl=found.kl,
        nats=found.nats,
        naive_kl=naive[0].kl if is_finite else None,
        naive_nats=naive[0].nats if is_finite else None,
        naive_diverged=bool(naive) and not is_finite,
        parameters=model.num_parameters(),
        seconds=seconds,
    )


def _choose_ffns(original, target: EntropyGPTConfig, calibrator: _Calibrator, text: Text, progress: Progress):
    """The target with those FFNs pruned that are missed least, and what each would be missed, on calibration text."""
    calibration = calibrator(original)
    batches = text.calibration[:: max(1, len(text.calibration) // len(text.validation))]
    with progress.stage("measuring each FFN", sum(map(len, batches))) as line:
        damage = measure_pruning_damage(original, batches, calibration, line.advance)
    gone = original.config.pruned_ffn_layers
    least = sorted(damage, key=damage.get)[: len(target.pruned_ffn_layers) - len(gone)]
    target = copy.deepcopy(target)
    target.pruned_ffn_layers = sorted([*gone, *least])
    return target, damage


def _save(job: Job, model: EntropyGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, report: ConversionReport):
    whole = job.work / "whole"
    with written_whole(whole) as folder:
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        report.save(folder / f"{REPORT}.json")
        save_results([_describe(job, model, report)], folder / RESULTS)
        (folder / f"{REPORT}.md").write_text(report_markdown(report), encoding="utf-8")
        if report.healing is not None:
            plot_healing(report, folder / PICTURE)
    delete(job.output)
    whole.replace(job.output)
    delete(job.work)


def _describe(job: Job, model: EntropyGPTForCausalLM, report: ConversionReport) -> ModelResult:
    """What is known of the model before anybody evaluates it."""
    conditions, healing = report.conditions, report.healing
    training = TrainingResult(
        steps=healing.steps if healing else 0,
        tokens=healing.tokens if healing else 0,
        seconds=healing.seconds if healing else 0.0,
        hyperparameters={**(healing.settings if healing else {}), **({"fitted": False} if report.naive else {})},
        converted_from=report.source_notation,
        text=f"{conditions.corpus} ({conditions.corpus_revision})",
        started_from=name_source(job.source),
        base_model=find_base_model(job.source),
    )
    windows = Windows(conditions.context - 1, conditions.context - 1, separate=False, bos=False)
    return replace(describe_model(model, job.output.name, windows), training=training)


def _show_plan(original: EntropyGPTForCausalLM, target: EntropyGPTConfig, plan: Plan, job: Job):
    with torch.device("meta"):
        parameters = EntropyGPTForCausalLM(target).num_parameters()
    context = job.context or min(target.n_positions, LONGEST_CONTEXT)
    console.print(f"[bold]{escape(original.config.notation)}[/] to [bold]{escape(target.notation)}[/]")
    for number, step in enumerate(plan.steps, 1):
        if step in plan.finish[:1] and job.heal_steps:
            console.print(f"    healing, {job.heal_steps:,} steps")
        console.print(f"{number:3d} {step.title} ({_describe_step(step, job.naive)})")
    if job.heal_steps and not plan.finish:
        console.print(f"    healing, {job.heal_steps:,} steps")
    table = Table("", "before", "after", box=SIMPLE_HEAD, pad_edge=False)
    before, after = (count_operations(config, context) for config in (original.config, target))
    rows = [("parameters", f"{original.num_parameters():,}", f"{parameters:,}"), *operation_rows(before, after)]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"of a sequence of {context} tokens. Nothing was written.")
    if job.prune_by_damage:
        console.print("Which FFNs go is decided by how much each is missed; here the deepest stand for them.")


def _describe_step(step: Step, naive: bool) -> str:
    if not step.calibrated:
        return "exact"
    return "naive" if _is_naive(step, naive) else "fitted to text"


def _print_report(report: ConversionReport, job: Job):
    console.print(make_table(HEADINGS, step_rows(report)))
    console.print(
        f"{report.seconds:.0f} s, at most {report.peak_memory_bytes / 2**30:.2f} GiB; measured on "
        f"{report.conditions.evaluated_tokens:,} tokens that nothing was fitted to",
        style="dim",
    )
    console.print(f"the model, ready for the Hub: {job.output}", markup=False, soft_wrap=True)
    console.print(f"the report: {job.output / REPORT}.md", markup=False, soft_wrap=True)
