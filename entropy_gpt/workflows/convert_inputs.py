"""What a conversion is asked to do and works on: options, target and text, refused before anything is written."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from entropy_gpt.conversion.calibration import HELD_OUT_EVERY, least_rows
from entropy_gpt.conversion.errors import ConversionError, UserError
from entropy_gpt.conversion.simplification import ENTROPY_FIELDS, TRAINING_FIELDS, Plan, target_config
from entropy_gpt.training.corpus import load_corpus, load_standard_library
from entropy_gpt.training.model_tokenizer import load_model_tokenizer
from entropy_gpt.training.packing import pack, spread_blocks
from entropy_gpt.training.progress import Progress
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .output_folder import holds_earlier_output, refuse_to_delete


REPORT = "conversion_report"
LONGEST_CONTEXT = 1024
# Tokens of a forward pass.
BATCH_TOKENS = 4096


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
    naive: bool = False
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
    """The text as the model sees it; name and revision as those of a corpus."""

    name: str
    revision: str
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
    Reads `FIELD=VALUE` settings of a target; values are JSON, or else text.

    Raises:
        `UserError`: If it is no setting, or not of a field that can be set.
    """
    fields = {} if final_norm is None else {"final_normalization": str(final_norm)}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in TRAINING_FIELDS:
            raise UserError(
                f"--set {setting} is not FIELD=VALUE with one of {', '.join(TRAINING_FIELDS)}. The architecture is "
                "told by --to and --final-norm, and sizes are those of the source."
            )
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def check_options(job: Job):
    """
    Refuses options that would do nothing, and what can't be done here.

    Raises:
        `UserError`: If there is such an option.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(Job)}
    without_healing = ("schedule", "distill", "hidden_state_weight", "residual_scale_weight")
    needs = [(name, "heal_steps") for name in without_healing] + [("distill_temperature", "distill")]
    for name, other in needs:
        if getattr(job, name) != defaults[name] and not getattr(job, other):
            option, needed = (f"--{word.replace('_', '-')}" for word in (name, other))
            raise UserError(f"{option} does nothing without {needed}: give that too, or leave it out.")
    if job.naive and job.prune_by_damage:
        raise UserError("--prune-by-damage fits what --naive does not: leave out one of them.")
    if job.heal_steps and (devices := torch.cuda.device_count()) > 1:
        raise UserError(f"Healing takes one device, and there are {devices}: set CUDA_VISIBLE_DEVICES=0.")


def check_output(job: Job):
    """
    Refuses to replace what is no earlier conversion, or one without being told to, and a place that can't be written.

    Raises:
        `UserError`: If the output, or the folder of statistics, can't be used.
    """
    if job.calibration_folder is not None and job.calibration_folder.exists() and not job.calibration_folder.is_dir():
        raise UserError(f"--calibration {job.calibration_folder} is no folder: give one, or a new name.")
    if holds_earlier_output(job.output, f"{REPORT}.json", "conversion", job.overwrite):
        folders = {path for path in job.output.iterdir() if path.is_dir()}
        refuse_to_delete({*_inputs_inside(job), *folders}, "conversion")


def name_source(source: str) -> str:
    """What a source is called elsewhere: without the place of a folder here."""
    if not Path(source).exists():
        return source
    path = Path(source).resolve()
    return f"{path.parent.name}/{path.name}"


def find_base_model(source: str) -> str | None:
    """A source as the Hub knows it, or nothing for a folder or a file here."""
    return None if Path(source).exists() else source


def find_target(config: EntropyGPTConfig, job: Job) -> EntropyGPTConfig:
    """
    The configuration that the model is to have. Where FFNs are pruned by damage, those named stand for as many others.

    Raises:
        `UserError`, `ConversionError`: If it can't be had.
    """
    target = target_config(config, job.notation, **{"final_normalization": config.final_normalization, **job.fields})
    if not target.entropy_regularization and (without := sorted(job.fields.keys() & {*ENTROPY_FIELDS})):
        raise UserError(f"--set {without[0]} needs the entropy penalty: --to 'EReg({job.notation})'.")
    if job.residual_scale_weight and target.final_normalization == "layernorm":
        raise UserError("--residual-scale-weight does nothing for a LayerNorm before the head: give --final-norm.")
    if job.prune_by_damage:
        gone = config.pruned_ffn_layers
        left = [layer for layer in range(config.n_layer) if layer not in gone]
        if (more := len(target.pruned_ffn_layers) - len(gone)) < 1:
            raise UserError(
                f"--prune-by-damage: {job.notation} prunes no FFN more than the source. Say how many with FFNi<k>, "
                f"such as FFNi{len(gone) + 1}."
            )
        target.pruned_ffn_layers = sorted([*gone, *left[-more:]])
    return target


def read_text(job: Job, config: EntropyGPTConfig, progress: Progress) -> Text:
    """
    Reads and tokenises the text.

    Raises:
        `UserError`, `CorpusError`: If text or tokenizer can't be used.
    """
    tokenizer = load_model_tokenizer(job.tokenizer, job.source, config.vocab_size)
    context = job.context or min(config.n_positions, LONGEST_CONTEXT)
    if context > config.n_positions:
        raise UserError(f"--context {context}: the model has {config.n_positions} positions.")
    with progress.stage("reading the text") as line:
        corpus = load_standard_library() if job.text is None else load_corpus(job.text, without=job.output)
        line.say(f"{corpus.characters:,} characters")
    with progress.stage("tokenising", len(corpus.training) + len(corpus.validation)) as line:
        training, validation = (
            pack((document.text for document in documents), tokenizer, context, line.advance)
            for documents in (corpus.training, corpus.validation)
        )
        line.say(f"{len(training) + len(validation):,} blocks of {context} tokens")
    return Text(
        corpus.name,
        corpus.revision,
        tokenizer,
        training,
        spread(training, job.calibration_tokens),
        spread(validation, job.evaluation_tokens),
    )


def spread(blocks: Dataset, tokens: int) -> tuple[torch.Tensor, ...]:
    """As many blocks as make up the tokens, at least one, evenly over all of them, in batches."""
    context = len(blocks[0]["input_ids"])
    chosen = spread_blocks(blocks, max(1, tokens // context)).with_format("torch")
    return chosen[:]["input_ids"].split(max(1, BATCH_TOKENS // context))


def check_amount(text: Text, model: EntropyGPTForCausalLM, plan: Plan):
    """
    Refuses too little text before the work begins.

    Raises:
        `ConversionError`: If a step of the plan can't be fitted to it.
    """
    fitted = [step for step in plan.steps if step.calibrated]
    needed = [least_rows(model, step.hidden_activation) for step in fitted] + [HELD_OUT_EVERY * text.context]
    if fitted and text.calibration_tokens < max(needed):
        raise ConversionError(
            f"Too little calibration text: {text.calibration_tokens:,} tokens, and a fit to this model takes "
            f"{max(needed):,}. Give more text, or a larger --calibration-tokens."
        )


def _inputs_inside(job: Job) -> Iterator[Path]:
    """What the conversion reads, as far as it lies in the output folder."""
    for place in (job.source, job.text, job.tokenizer, job.calibration_folder):
        if place is not None and job.output in (path := Path(place).resolve()).parents:
            yield path
