"""The stages of a conversion: plan, simplify, heal, finish, save. What is interrupted goes on from its last stage."""

import copy
import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerFast, PrinterCallback, TrainingArguments, set_seed
from transformers.utils import logging

from conversion.calibration import Calibration, calibrate, fingerprint, least_rows
from conversion.divergence import measure_divergence
from conversion.errors import ConversionError
from conversion.gpt2_checkpoint import load_language_model
from conversion.simplification import Plan, Step, measure_pruning_damage, plan_conversion, target_config
from evaluation.conversion_report import (
    PICTURE,
    ConversionReport,
    HealingRecord,
    StepRecord,
    operation_rows,
    report_markdown,
    step_rows,
)
from evaluation.operation_counts import count_nonlinear_operations
from evaluation.plots import plot_healing
from evaluation.results import Conditions, git_revision, machine_name, peak_memory, recorded_versions
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM
from training.callbacks import StepObserver
from training.data import Corpus, CorpusError, collate_blocks, load_corpus, load_standard_library, pack
from training.healing import HealingLoss, HealingTrainer
from training.removal_schedule import RemovalSchedule, insert_gates, remove_gates
from training.trainer import last_checkpoint

from .errors import CommandError
from .files import delete, written_whole
from .progress import progress_display, stage


REPORT = "conversion_report"
LONGEST_CONTEXT = 1024
# Tokens of a forward pass, and sequences to evaluate healing on, so many times in its course.
BATCH_TOKENS = 4096
HEALING_EVALUATIONS = 15
CHECKPOINTS = 10
HYPERPARAMETERS = {"weight_decay": 0.1, "max_grad_norm": 1.0, "lr_scheduler_type": "linear"}
WARMUP_SHARE = 0.05
# The schedule removes in this part of healing; the rest is without what was removed.
REMOVAL_SHARE = 0.6
DISTILLATION_WEIGHT = 0.5

# The columns of the report's table, for a terminal of 80 characters.
HEADINGS = ("step", "KL to the\noriginal", "ppl per\ntoken", "naive\nKL", "naive\nppl", "para-\nmeters", "sec-\nonds")

console = Console()


@dataclass(frozen=True)
class Job:
    """What the command was asked to do; the fields are its options."""

    source: str
    notation: str
    output: Path
    text: Path | None = None
    tokenizer: str | None = None
    fields: dict = field(default_factory=dict)
    prune_by_damage: bool = False
    context: int | None = None
    calibration_tokens: int = 65536
    evaluation_tokens: int = 16384
    calibration_folder: Path | None = None
    heal_steps: int = 0
    schedule: str = "none"
    distill: bool = False
    distill_temperature: float = 1.0
    hidden_state_weight: float = 0.0
    residual_scale_weight: float = 0.0
    learning_rate: float = 1e-3
    batch_size: int = 8
    seed: int = 0
    overwrite: bool = False

    @property
    def work(self) -> Path:
        """Where everything lies until it is whole."""
        return self.output.with_name(f".converting-{self.output.name}")


@dataclass(frozen=True)
class Text:
    """The text as the model sees it."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    training: Dataset
    calibration: tuple[torch.Tensor, ...]
    validation: tuple[torch.Tensor, ...]

    @property
    def calibration_tokens(self) -> int:
        return sum(batch.numel() for batch in self.calibration)

    @property
    def context(self) -> int:
        return self.validation[0].shape[1]


def read_fields(settings: list[str], final_norm: str | None) -> dict:
    """
    Reads `FIELD=VALUE` settings of a configuration; values are JSON, or else text.

    Raises:
        `CommandError`: If there is no such field, or one is no setting at all.
    """
    names = {field.name for field in dataclasses.fields(EntropyGPTConfig)}
    fields = {} if final_norm is None else {"final_normalization": str(final_norm)}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in names:
            raise CommandError(f"--set {setting} is not FIELD=VALUE with a field of EntropyGPTConfig.")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def run(job: Job, dry_run: bool):
    """
    Runs all stages.

    Args:
        job ([`Job`]): What is wanted.
        dry_run (`bool`): Whether to show the plan and write nothing.

    Raises:
        `CommandError`: If the source, the text, the target or the output can't be used, or healing runs away.
    """
    disable_progress_bars()
    logging.disable_progress_bar()
    try:
        _check_output(job)
        with progress_display(console) as progress:
            with stage(progress, "loading the model") as line:
                original = load_language_model(job.source).float()
                original.to("cuda" if torch.cuda.is_available() else "cpu")
                line.say(f"{original.config.notation}, {original.num_parameters():,} parameters")
            target = _find_target(original.config, job)
            plan = plan_conversion(original.config, target)
            if not dry_run:
                report = convert(job, original, target, _read_text(job, original.config, progress), progress)
    except (ConversionError, CorpusError) as error:
        raise CommandError(str(error)) from error
    if dry_run:
        _show_plan(original, target, plan, job)
    else:
        _print_report(report, job)


def _check_output(job: Job):
    """Refuses to replace what is no earlier conversion, or one without being told to."""
    output = job.output
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / f"{REPORT}.json").exists():
        raise CommandError(f"{output} is there already and holds no conversion: give another --output, or delete it.")
    if not job.overwrite:
        raise CommandError(f"{output} holds a conversion already: give another --output, or --overwrite.")


def _find_target(config: EntropyGPTConfig, job: Job) -> EntropyGPTConfig:
    fields = {"final_normalization": config.final_normalization, **job.fields}
    if clashes := sorted(fields.keys() & {"n_layer", "n_embd", "n_head", "n_positions", "vocab_size", "n_inner"}):
        raise CommandError(f"--set {clashes[0]}: a conversion does not change sizes.")
    return target_config(config, job.notation, **fields)


def convert(
    job: Job, original: EntropyGPTForCausalLM, target: EntropyGPTConfig, text: Text, progress: Progress
) -> ConversionReport:
    """
    Runs the plan from a model to a target, heals, and puts the whole folder in its place.

    Raises:
        `ConversionError`: If no steps lead to the target, or there is too little text.
        `CommandError`: If healing runs away.
    """
    started = time.perf_counter()
    _begin_work(job, text)
    measure = _Measurement(original, text, progress)
    calibrator = _Calibrator(text, job.calibration_folder or job.work / "calibration", progress)
    original_perplexity = measure(original, "the original")[0].perplexity

    damage = {}
    if job.prune_by_damage:
        target, damage = _choose_ffns(original, target, calibrator, text, progress)
    plan = plan_conversion(original.config, target)
    records: list[StepRecord] = []
    model = original
    for step in plan.simplifications:
        model = _take(step, model, calibrator, measure, records)
    healing = None
    if job.heal_steps:
        model, healing = _heal(job, original, model, calibrator, text, progress)
        divergence, *_ = measure(model, "healing")
        records.append(_record(f"healed, {job.heal_steps:,} steps", model, [divergence], healing.seconds))
    for step in plan.finish:
        model = _take(step, model, calibrator, measure, records)

    report = ConversionReport(
        source=job.source,
        source_notation=original.config.notation,
        target_notation=model.config.notation,
        source_final_normalization=original.config.final_normalization,
        target_final_normalization=model.config.final_normalization,
        original_perplexity=original_perplexity,
        original_parameters=original.num_parameters(),
        source_operations=count_nonlinear_operations(original.config, text.context),
        target_operations=count_nonlinear_operations(model.config, text.context),
        pruning_damage={str(layer): kl for layer, kl in damage.items()},
        calibration_tokens=text.calibration_tokens,
        steps=records,
        healing=healing,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory(),
        conditions=Conditions(
            corpus=text.corpus.name,
            corpus_revision=text.corpus.revision,
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


def _read_text(job: Job, config: EntropyGPTConfig, progress: Progress) -> Text:
    tokenizer = _load_tokenizer(job, config)
    context = job.context or min(config.n_positions, LONGEST_CONTEXT)
    if context > config.n_positions:
        raise CommandError(f"--context {context}: the model has {config.n_positions} positions.")
    with stage(progress, "reading the text") as line:
        corpus = load_standard_library() if job.text is None else load_corpus(job.text, without=job.output)
        line.say(f"{corpus.characters:,} characters")
    with stage(progress, "tokenising", len(corpus.training) + len(corpus.validation)) as line:
        training = pack(corpus.training, tokenizer, context, lambda _: line.advance())
        validation = pack(corpus.validation, tokenizer, context, lambda _: line.advance())
        line.say(f"{len(training) + len(validation):,} blocks of {context} tokens")
    return Text(
        corpus,
        tokenizer,
        training,
        spread(training, job.calibration_tokens),
        spread(validation, job.evaluation_tokens),
    )


def _load_tokenizer(job: Job, config: EntropyGPTConfig) -> PreTrainedTokenizerFast:
    place = job.tokenizer or job.source
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise CommandError(
            f"{place} has no tokenizer that can be loaded; say where it is with --tokenizer."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token_id is None:
        raise CommandError(f"The tokenizer of {place} is no fast one with an end-of-text token; give --tokenizer.")
    if not tokenizer.backend_tokenizer.encode("a").ids:  # transformers makes one without tokens where files lack
        raise CommandError(f"{place} has no tokenizer files; say where the tokenizer is with --tokenizer.")
    if len(tokenizer) > config.vocab_size:
        raise CommandError(
            f"The tokenizer of {place} has {len(tokenizer):,} tokens, and the model {config.vocab_size:,}: give the "
            "model's own with --tokenizer."
        )
    return tokenizer


def spread(blocks: Dataset, tokens: int) -> tuple[torch.Tensor, ...]:
    """As many blocks as make up the tokens, at least one, evenly over all of them, in batches."""
    context = len(blocks[0]["input_ids"])
    count = min(len(blocks), max(1, tokens // context))
    chosen = blocks.select([index * len(blocks) // count for index in range(count)])
    return torch.tensor(chosen["input_ids"]).split(max(1, BATCH_TOKENS // context))


def _begin_work(job: Job, text: Text):
    """Makes the folder of unfinished work, or empties it if it is that of another job."""
    settings = {
        **{name: str(value) for name, value in vars(job).items()},
        "corpus": text.corpus.revision,
        "versions": recorded_versions(),
        "git_revision": git_revision(),
    }
    notes = job.work / "settings.json"
    if notes.exists() and notes.read_text(encoding="utf-8") == json.dumps(settings):
        console.print(f"going on with what is in {job.work}")
        return
    delete(job.work)
    with written_whole(notes) as path:
        path.write_text(json.dumps(settings), encoding="utf-8")


class _Measurement:
    """Holds models against the original on validation text."""

    def __init__(self, original: EntropyGPTForCausalLM, text: Text, progress: Progress):
        self.original, self.batches, self.progress = original, text.validation, progress

    def __call__(self, model, after: str, *others):
        with stage(self.progress, f"measuring {after}", sum(map(len, self.batches))) as line:
            found = measure_divergence(self.original, [model, *others], self.batches, line.advance)
            line.say(f"KL {found[0].kl:.4f}, perplexity {found[0].perplexity:.2f}")
        return found


class _Calibrator:
    """Takes statistics, or finds them where they were kept."""

    def __init__(self, text: Text, folder: Path, progress: Progress):
        self.batches, self.folder, self.progress = text.calibration, folder, progress

    def __call__(self, model: EntropyGPTForCausalLM, hidden_activation: str | None = None) -> Calibration:
        needed, tokens = least_rows(model, hidden_activation), sum(batch.numel() for batch in self.batches)
        if tokens < needed:
            raise ConversionError(
                f"Too little calibration text: {tokens:,} tokens, and a fit to this model takes {needed:,}. Give more "
                "text, or a larger --calibration-tokens."
            )
        path = self.folder / f"{fingerprint(model, self.batches, hidden_activation)}.safetensors"
        if not path.exists():
            with stage(self.progress, "calibrating", sum(map(len, self.batches))) as line:
                calibration = calibrate(model, self.batches, hidden_activation, line.advance)
            with written_whole(path) as temporary:
                calibration.save(temporary)
        return Calibration.load(path)


def _take(step: Step, model: EntropyGPTForCausalLM, calibrator: _Calibrator, measure: _Measurement, records: list):
    started = time.perf_counter()
    calibration = calibrator(model, step.hidden_activation) if step.calibrated else None
    simpler = step.apply(model, calibration)
    seconds = time.perf_counter() - started
    divergences = measure(simpler, step.title, *([] if step.naive is None else [step.naive(model)]))
    records.append(_record(step.title, simpler, divergences, seconds))
    return simpler


def _record(title: str, model: EntropyGPTForCausalLM, divergences: list, seconds: float) -> StepRecord:
    found, *naive = divergences
    return StepRecord(
        title=title,
        kl=found.kl,
        perplexity=found.perplexity,
        naive_kl=naive[0].kl if naive else None,
        naive_perplexity=naive[0].perplexity if naive else None,
        parameters=model.num_parameters(),
        seconds=seconds,
    )


def _choose_ffns(original, target: EntropyGPTConfig, calibrator: _Calibrator, text: Text, progress: Progress):
    """The target with those FFNs pruned that are missed least, and what each would be missed."""
    calibration = calibrator(original)
    with stage(progress, "measuring each FFN", sum(map(len, text.validation))) as line:
        damage = measure_pruning_damage(original, text.validation, calibration, line.advance)
    gone = original.config.pruned_ffn_layers
    least = sorted(damage, key=damage.get)[: len(target.pruned_ffn_layers) - len(gone)]
    target = copy.deepcopy(target)
    target.pruned_ffn_layers = sorted([*gone, *least])
    return target, damage


def _heal(job: Job, original, simplified, calibrator: _Calibrator, text: Text, progress: Progress):
    """Trains the simplified model, from its last checkpoint on, and removes what the schedule says on the way."""
    calibration = calibrator(original)
    set_seed(job.seed)
    with_gates = job.schedule != "none"
    model = insert_gates(original, simplified, calibration) if with_gates else copy.deepcopy(simplified)
    steps = job.heal_steps
    hyperparameters = {"learning_rate": job.learning_rate, **HYPERPARAMETERS}
    loss = HealingLoss(
        logits=DISTILLATION_WEIGHT * job.distill,
        temperature=job.distill_temperature,
        hidden_states=job.hidden_state_weight,
        residual_scale=job.residual_scale_weight * (simplified.config.final_normalization != "layernorm"),
    )
    arguments = TrainingArguments(
        output_dir=job.work / "checkpoints",
        max_steps=steps,
        per_device_train_batch_size=job.batch_size,
        per_device_eval_batch_size=job.batch_size,
        warmup_steps=round(WARMUP_SHARE * steps),
        **hyperparameters,
        seed=job.seed,
        eval_strategy="steps",
        eval_steps=max(1, steps // HEALING_EVALUATIONS),
        eval_on_start=True,
        prediction_loss_only=True,
        logging_steps=max(1, steps // 100),
        save_steps=max(1, steps // CHECKPOINTS),
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    started = time.perf_counter()
    with stage(progress, "healing", steps) as line:
        trainer = HealingTrainer(
            model=model,
            args=arguments,
            train_dataset=text.training,
            eval_dataset=Dataset.from_dict({"input_ids": torch.cat(text.validation).tolist()}),
            data_collator=collate_blocks,
            callbacks=[StepObserver(line.reach, lambda loss: line.say(f"loss {loss:.3f}"))],
            healing_loss=loss,
            original=original,
            residual_scale=calibration.norm_constant("transformer.ln_f"),
            removal_steps=max(1, round(REMOVAL_SHARE * steps)),
            schedule=RemovalSchedule(model, job.schedule) if with_gates else None,
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=last_checkpoint(job.work / "checkpoints"))
        except FloatingPointError as error:
            raise CommandError(f"{simplified.config.notation}: {error}") from error
    record = HealingRecord(
        steps=steps,
        tokens=steps * job.batch_size * text.context,
        seconds=time.perf_counter() - started,
        settings={
            **hyperparameters,
            "warmup_share": WARMUP_SHARE,
            "batch_size": job.batch_size,
            "schedule": job.schedule,
            "kl_weight": loss.logits,
            "kl_temperature": loss.temperature,
            "hidden_state_weight": loss.hidden_states,
            "residual_scale_weight": loss.residual_scale,
        },
        validation_nats=[
            [float(entry["step"]), entry["eval_loss"]] for entry in trainer.state.log_history if "eval_loss" in entry
        ],
        events=trainer.progress.events,
    )
    return remove_gates(model, simplified) if with_gates else model.eval(), record


def _save(job: Job, model: EntropyGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, report: ConversionReport):
    whole = job.work / "whole"
    with written_whole(whole) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        report.save(folder / f"{REPORT}.json")
        (folder / f"{REPORT}.md").write_text(report_markdown(report), encoding="utf-8")
        if report.healing is not None:
            plot_healing(report, folder / PICTURE)
    delete(job.output)
    whole.replace(job.output)
    delete(job.work)


def _show_plan(original: EntropyGPTForCausalLM, target: EntropyGPTConfig, plan: Plan, job: Job):
    with torch.device("meta"):
        parameters = EntropyGPTForCausalLM(target).num_parameters()
    context = job.context or min(target.n_positions, LONGEST_CONTEXT)
    console.print(f"[bold]{escape(original.config.notation)}[/] to [bold]{escape(target.notation)}[/]")
    for number, step in enumerate(plan.steps, 1):
        if step in plan.finish[:1] and job.heal_steps:
            console.print(f"    healing, {job.heal_steps:,} steps")
        console.print(f"{number:3d} {step.title} ({'fitted to text' if step.calibrated else 'exact'})")
    if job.heal_steps and not plan.finish:
        console.print(f"    healing, {job.heal_steps:,} steps")
    table = Table("", "before", "after", box=SIMPLE_HEAD, pad_edge=False)
    before, after = (count_nonlinear_operations(config, context) for config in (original.config, target))
    rows = [("parameters", f"{original.num_parameters():,}", f"{parameters:,}"), *operation_rows(before, after)]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"of a sequence of {context} tokens. Nothing was written.")


def _print_report(report: ConversionReport, job: Job):
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in step_rows(report):
        table.add_row(*map(escape, row))
    console.print(table)
    console.print(
        f"{report.seconds:.0f} s, at most {report.peak_memory_bytes / 2**30:.2f} GiB; measured on "
        f"{report.conditions.evaluated_tokens:,} tokens that nothing was fitted to",
        style="dim",
    )
    console.print(f"the model, ready for the Hub: {job.output}")
    console.print(f"the report: {job.output / REPORT}.md")
