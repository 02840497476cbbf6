"""Inputs of a conversion: options, target and text. All of them are checked before anything is written."""

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
import torch
from pydantic import AfterValidator, BeforeValidator, Field
from transformers import PreTrainedTokenizerFast

from entropy_gpt.conversion.calibration import HELD_OUT_EVERY, least_rows
from entropy_gpt.conversion.errors import ConversionError, UserError, missing_package
from entropy_gpt.conversion.planning import Plan, target_config
from entropy_gpt.conversion.simplification import ENTROPY_FIELDS, TRAINING_FIELDS
from entropy_gpt.evaluation.records.measurement import KEPT_APART, MeasuredText
from entropy_gpt.evaluation.records.measurement import read_text as read_measured_text
from entropy_gpt.training.arguments import STANDARD_LIBRARY, DataArguments
from entropy_gpt.training.files import is_finished
from entropy_gpt.training.model_tokenizer import load_model_tokenizer
from entropy_gpt.training.packing import Witness, pack, spread_blocks
from entropy_gpt.training.progress import Progress
from entropy_gpt.training.storage import check_folder
from entropy_gpt.training.tokenizer import check_end_of_text
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .options import LocalPath, Place, option_name
from .output_folder import CONVERSION, refuse_to_delete


if TYPE_CHECKING:
    from datasets import Dataset


# Folders in that of unfinished work: statistics of models, and checkpoints of healing.
KEPT_STATISTICS, CHECKPOINTS = "calibration", "checkpoints"
# The name of the report, without suffix.
REPORT = Path(CONVERSION.record).stem
LONGEST_CONTEXT = 1024
# Tokens in one forward pass.
BATCH_TOKENS = 4096


@pydantic.dataclasses.dataclass(frozen=True)
class ConversionOptions:
    """The options of a conversion. [`~entropy_gpt.convert`] takes them as keyword arguments and describes each."""

    source: Place
    to: str
    output: Annotated[LocalPath, AfterValidator(Path.resolve)]
    text: Place | None = None
    split: str = "train"
    config: str | None = None
    text_column: str = "text"
    tokenizer: Place | None = None
    eos_token: str | None = None
    activation: Literal["gelu", "gelu_new"] | None = None
    final_norm: Literal["layernorm", "static", "none"] | None = None
    settings: Annotated[dict[str, Any], BeforeValidator(lambda settings: settings or {})] = field(default_factory=dict)
    prune_by_damage: bool = False
    naive: bool = False
    context: Annotated[int, Field(ge=2)] | None = None
    calibration_tokens: Annotated[int, Field(ge=1)] = 65536
    evaluation_tokens: Annotated[int, Field(ge=1)] = 16384
    calibration: LocalPath | None = None
    heal_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["none", "gate", "staircase"] = "none"
    distill: bool = False
    distill_temperature: Annotated[float, Field(ge=0.01)] = 1.0
    hidden_state_weight: Annotated[float, Field(ge=0)] = 0.0
    residual_scale_weight: Annotated[float, Field(ge=0)] = 0.0
    freeze_embeddings: bool = False
    learning_rate: Annotated[float, Field(ge=1e-9)] = 1e-3
    batch_size: Annotated[int, Field(ge=1)] = 8
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    overwrite: bool = False

    @property
    def work(self) -> Path:
        """The folder of unfinished work."""
        return CONVERSION.work(self.output)


@dataclass(frozen=True)
class Text:
    """
    The text, tokenised for one model.

    Args:
        name (`str`): The name of the corpus.
        revision (`str`): What identifies its content, such as a hash.
        tokenizer (`PreTrainedTokenizerFast`): The model's tokenizer.
        training (`Dataset`): Blocks for healing: column `input_ids`, `context` tokens each.
        calibration (`tuple[torch.Tensor, ...]`): Batches of training text to fit to, each `(rows, context)`.
        validation (`tuple[torch.Tensor, ...]`): Batches of validation text to measure on, each `(rows, context)`.
        evaluated ([`MeasuredText`], *optional*): What the converted model is evaluated on, if it is.
    """

    name: str
    revision: str
    tokenizer: PreTrainedTokenizerFast
    training: "Dataset"
    calibration: tuple[torch.Tensor, ...]
    validation: tuple[torch.Tensor, ...]
    evaluated: MeasuredText | None = None

    @property
    def calibration_tokens(self) -> int:
        return sum(batch.numel() for batch in self.calibration)

    @property
    def context(self) -> int:
        return self.validation[0].shape[1]


def check_options(options: ConversionOptions):
    """
    Refuses options that would have no effect or contradict each other.

    Raises:
        `UserError`: If there is such an option.
    """
    for name, value in options.settings.items():
        if name not in TRAINING_FIELDS:
            raise UserError(
                f"--set {name}={value}: only {', '.join(TRAINING_FIELDS)} can be set. Choose the architecture with "
                "--to and --final-norm; sizes are those of the source."
            )
    defaults = {field.name: field.default for field in dataclasses.fields(ConversionOptions)}
    without_healing = ("schedule", "distill", "hidden_state_weight", "residual_scale_weight", "freeze_embeddings")
    needs = [(name, "heal_steps") for name in without_healing] + [("distill_temperature", "distill")]
    for name, other in needs:
        if getattr(options, name) != defaults[name] and not getattr(options, other):
            option, needed = option_name(name), option_name(other)
            raise UserError(f"{option} has no effect without {needed}: add {needed}, or leave out {option}.")
    if options.naive and options.prune_by_damage:
        raise UserError("--prune-by-damage needs fitted FFNs, and --naive fits none: leave out one of them.")
    if options.heal_steps and (devices := torch.cuda.device_count()) > 1:
        raise UserError(f"Healing uses one GPU, and {devices} are visible: set CUDA_VISIBLE_DEVICES=0.")


def check_output(options: ConversionOptions):
    """
    Refuses an output that can't be written, holds something else, or holds a conversion that is not to be replaced.

    Raises:
        `UserError`: If the output folder or the folder of statistics can't be used.
    """
    folder = options.calibration
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UserError(f"--calibration {folder} is not a folder: give a folder, or a new name.")
    if folder is not None:
        check_folder(folder, "--calibration")
    if CONVERSION.is_replaced_in(options.output, options.overwrite):
        folders = {path for path in options.output.iterdir() if path.is_dir() and is_finished(path)}
        refuse_to_delete({*_inputs_inside(options), *folders}, CONVERSION)


def name_source(source: str) -> str:
    """How records name a source: a local path keeps its last two parts, so that nothing else of it is published."""
    if not Path(source).exists():
        return source
    path = Path(source).resolve()
    return f"{path.parent.name}/{path.name}"


def find_base_model(source: str) -> str | None:
    """The repository of a source on the Hub, or `None` for a local folder or file."""
    return None if Path(source).exists() else source


def find_target(config: EntropyGPTConfig, options: ConversionOptions) -> EntropyGPTConfig:
    """
    The configuration of the converted model. With `prune_by_damage`, only the number of its pruned FFNs is final: the
    deepest ones stand in for those that will be chosen.

    Args:
        config ([`EntropyGPTConfig`]): The source's configuration.
        options ([`ConversionOptions`]): The target's notation, final norm and training fields.

    Raises:
        `ConversionError`: If no steps lead from the source to the target.
        `UserError`: If an option does not suit the target.
    """
    final_norm = options.final_norm or config.final_normalization
    target = target_config(config, options.to, final_normalization=final_norm, **options.settings)
    if not target.entropy_regularization and (without := sorted(options.settings.keys() & {*ENTROPY_FIELDS})):
        raise UserError(f"--set {without[0]} needs the entropy penalty: --to 'EReg({options.to})'.")
    if options.residual_scale_weight and target.final_normalization == "layernorm":
        raise UserError(
            "--residual-scale-weight has no effect with a LayerNorm before the head: add --final-norm static or none."
        )
    if options.prune_by_damage:
        pruned = config.pruned_ffn_layers
        left = [layer for layer in range(config.n_layer) if layer not in pruned]
        if (more := len(target.pruned_ffn_layers) - len(pruned)) < 1:
            raise UserError(
                f"--prune-by-damage: {options.to} prunes no more FFNs than the source. Add FFNi<k> to --to, where k "
                f"is the number of pruned FFNs, such as FFNi{len(pruned) + 1}."
            )
        target.pruned_ffn_layers = sorted([*pruned, *left[-more:]])
    return target


def read_text(options: ConversionOptions, config: EntropyGPTConfig, progress: Progress) -> Text:
    """
    Reads and tokenises the text.

    Args:
        options ([`ConversionOptions`]): Where text and tokenizer are, and how many tokens are used.
        config ([`EntropyGPTConfig`]): The source's configuration.
        progress (`Progress`): Shows both stages.

    Raises:
        `CorpusError`: If the text or the tokenizer can't be used.
        `UserError`: If the context is longer than the model allows, or the packages that read text are missing.
    """
    try:
        from entropy_gpt.training.sources import open_source  # conversions that fit nothing read no text
    except ModuleNotFoundError as missing:
        wanted = "Reading the text that this conversion is fitted to and measured on"
        raise UserError(missing_package(wanted, missing, "train")) from missing

    tokenizer = load_model_tokenizer(options.tokenizer, options.source, config.vocab_size, options.eos_token)
    check_end_of_text(tokenizer)
    context = find_context(options, config)
    arguments = DataArguments(
        dataset=options.text or STANDARD_LIBRARY,
        dataset_config=options.config,
        dataset_split=options.split,
        text_column=options.text_column,
    )
    with progress.stage("reading the text"):
        source = open_source(arguments, without=options.output)
    digest = hashlib.sha256()
    with progress.stage("tokenising", source.documents) as line:
        training, validation = (
            pack(Witness(texts, digest), tokenizer, context, line.advance)
            for texts in (source.training, source.validation)
        )
        line.say(f"{len(training) + len(validation):,} blocks of {context} tokens")
    revision = source.revision or f"{source.version} sha256:{digest.hexdigest()[:16]}".strip()
    return Text(
        source.name,
        revision,
        tokenizer,
        training,
        spread(training, options.calibration_tokens),
        spread(validation, options.evaluation_tokens),
        read_measured_text(
            source.name + KEPT_APART, revision, source.validation, tokenizer, context, options.evaluation_tokens
        ),
    )


def find_context(options: ConversionOptions, config: EntropyGPTConfig) -> int:
    """
    Tokens of a sequence.

    Raises:
        `UserError`: If the context is longer than the model allows.
    """
    context = options.context or min(config.n_positions, LONGEST_CONTEXT)
    if context > config.n_positions:
        raise UserError(f"--context {context}: the model has {config.n_positions} positions. Lower it.")
    return context


def spread(blocks: "Dataset", tokens: int) -> tuple[torch.Tensor, ...]:
    """Batches of about `tokens` tokens in all, at least one block, spread evenly over the data set."""
    context = len(blocks[0]["input_ids"])
    chosen = spread_blocks(blocks, max(1, tokens // context)).with_format("torch")
    return chosen[:]["input_ids"].split(max(1, BATCH_TOKENS // context))


def check_amount(text: Text, model: EntropyGPTForCausalLM, plan: Plan):
    """
    Refuses too little calibration text before the work begins.

    Raises:
        `ConversionError`: If a step of the plan needs more tokens than there are.
    """
    fitted = [step for step in plan.steps if step.calibrated]
    needed = [least_rows(model, step.hidden_activation) for step in fitted] + [HELD_OUT_EVERY * text.context]
    if fitted and text.calibration_tokens < max(needed):
        raise ConversionError(
            f"Too little calibration text: {text.calibration_tokens:,} tokens, and fitting this model takes "
            f"{max(needed):,}. Give more text, or a larger --calibration-tokens."
        )


def _inputs_inside(options: ConversionOptions) -> Iterator[Path]:
    """Inputs of the conversion that lie in the output folder."""
    for place in (options.source, options.text, options.tokenizer, options.calibration):
        if place is not None and options.output in (path := Path(place).resolve()).parents:
            yield path
