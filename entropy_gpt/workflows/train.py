"""Training by a recipe: text, model, training, measurement, pictures. An interrupted run continues."""

import functools
import json
import os
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.trainer import TRAINING_ARGS_NAME

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.conversion.tokenizer_files import save_tokenizer
from entropy_gpt.evaluation.origin import collect_origin
from entropy_gpt.evaluation.records.measurement import KEPT_APART, describe_config, measure_model, read_text
from entropy_gpt.evaluation.records.results import RESULTS, ModelResult, TrainingResult, load_results, save_results
from entropy_gpt.evaluation.records.run_log import Divergence, RunLog
from entropy_gpt.evaluation.showing.model_card import model_card
from entropy_gpt.evaluation.showing.run_pictures import PICTURES, Drawing, draw_pictures
from entropy_gpt.training.adapters import attach_lora, merge_adapter
from entropy_gpt.training.callbacks import StepObserver, Stopwatch, find_callback
from entropy_gpt.training.claims import claimed
from entropy_gpt.training.entropy_callback import EntropyCallback
from entropy_gpt.training.errors import RecipeError
from entropy_gpt.training.files import UNFINISHED, delete, give_usual_mode
from entropy_gpt.training.library_bars import library_bars_hidden
from entropy_gpt.training.packing import collate_blocks
from entropy_gpt.training.preparation import PreparedData, prepare_data
from entropy_gpt.training.progress import SILENT, Progress, Stage
from entropy_gpt.training.recipe import Recipe, read_recipe
from entropy_gpt.training.run_folder import (
    ADAPTER,
    CONVERTED,
    MODEL,
    can_go_on,
    check_architecture,
    check_folder,
    check_text,
    take_folder,
)
from entropy_gpt.training.start import Start, find_start, fit_vocabulary, make_model
from entropy_gpt.training.storage import StorageError, storing
from entropy_gpt.training.trainer import EntropyTrainer
from modeling_entropy_gpt import EntropyGPTForCausalLM

from .convert import Conversion, convert_with_text
from .convert_inputs import ConversionOptions, Text, find_base_model, name_source, spread
from .output_folder import CONVERSION


# Validation sequences on which the heads are measured during training.
MOST_PROBED = 8
# Hyperparameters that a result records, if the recipe sets them.
RECORDED = (
    *("learning_rate", "weight_decay", "max_grad_norm", "lr_scheduler_type", "warmup_steps"),
    "freeze_embeddings",
)


@dataclass(frozen=True)
class PlannedRun:
    """
    A training run that was checked and can begin, or continue.

    Args:
        recipe ([`Recipe`]): The settings.
        start ([`Start`]): The model to begin with.
        checkpoint (`Path`, *optional*): The checkpoint to continue from.
    """

    recipe: Recipe
    start: Start
    checkpoint: Path | None


@dataclass(frozen=True)
class TrainedRun:
    """
    A training run that has ended.

    Args:
        folder (`Path`): Its folder, with log, pictures, checkpoints and model.
        log ([`RunLog`]): Losses, entropies and alarms, step by step.
        drawings (`list[Drawing]`): The pictures of the log; none where matplotlib is not installed.
        result ([`ModelResult`], *optional*): The measurements of the trained model; `None` if the run diverged.
    """

    folder: Path
    log: RunLog
    drawings: list[Drawing]
    result: ModelResult | None

    @property
    def model(self) -> Path | None:
        """The model's folder, ready for the Hub; `None` if the run diverged."""
        return None if self.result is None else self.folder / MODEL

    @property
    def divergence(self) -> Divergence | None:
        """The divergence that stopped the run, if one did."""
        return self.log.divergences[-1] if self.result is None else None


def train(recipe: str | Path, *, progress: Progress = SILENT, **settings: Any) -> TrainedRun | None:
    """
    Trains a model by a recipe, measures it and draws pictures of the run, as `entropy-gpt train` does.

    An interrupted run continues from its last whole checkpoint when it is called again with the same arguments. A run
    whose model is there already is not trained again.

    Args:
        recipe (`str` or `Path`): A YAML file, or the name of a recipe that comes with the package.
        progress (`Progress`): Follows the stages of the work; by default nobody does.
        settings: Settings that replace those of the recipe, such as `n_layer=6`, `max_steps=500` or
            `output_dir="runs/mine"`. `entropy-gpt train --settings` lists them all.

    Returns:
        [`TrainedRun`]: The folder, the log and the measurements. `None` in all but the first of several processes.

    Raises:
        `UserError`: If the recipe, a setting, the text, the model, the folder or a checkpoint can't be used. A run
            that diverges raises nothing: that is its result.

    Example:

    ```python
    import entropy_gpt

    run = entropy_gpt.train("python-stdlib-small", notation="SM+ScFuFFN", max_steps=500, output_dir="runs/mine")
    print(run.model, run.result.likelihood.likelihood.perplexity)
    ```
    """
    plain = {name: _plain_value(name, value) for name, value in settings.items()}
    return perform(prepare(os.fspath(recipe), plain), progress)


def _plain_value(name: str, value: Any) -> Any:
    """A setting as a recipe could hold it: paths are text, tuples are lists."""
    try:
        return json.loads(json.dumps(value, default=os.fspath))
    except TypeError as error:
        raise RecipeError(f"{name}={value!r}: a setting is text, a number, a list or a dict of these.") from error


@library_bars_hidden()
def prepare(source: str, settings: dict[str, Any]) -> PlannedRun:
    """
    Reads a recipe, and checks what it starts from and the run's folder. Writes nothing.

    Args:
        source (`str`): A YAML file, or the name of a recipe.
        settings (`dict[str, Any]`): Settings that replace those of the recipe.

    Raises:
        `UserError`: If the recipe, a setting, the model, the folder or a checkpoint can't be used.
    """
    recipe = read_recipe(source, settings)
    start = find_start(recipe)
    return PlannedRun(recipe, start, check_folder(recipe, start.config))


@library_bars_hidden()
def perform(planned: PlannedRun, progress: Progress) -> TrainedRun | None:
    """
    Trains, measures, saves and draws; only draws if the model is there already.

    Returns:
        The run, or `None` in all but the first of several processes.

    Raises:
        `UserError`: If the text can't be used, or the Trainer refuses its arguments.
    """
    training, folder = planned.recipe.training, Path(planned.recipe.training.output_dir)
    with claimed(folder, lambda: can_go_on(folder)) if training.should_save else nullcontext():
        # Another command may have written there meanwhile.
        planned = replace(planned, checkpoint=check_folder(planned.recipe, planned.start.config))
        return _perform(planned, progress)


def _perform(planned: PlannedRun, progress: Progress) -> TrainedRun | None:
    training, folder = planned.recipe.training, Path(planned.recipe.training.output_dir)
    if not (folder / MODEL).exists():
        trainer, data = _train(planned, progress)
        try:
            with storing(folder / MODEL):
                _finish(trainer, planned, data, progress)
        except StorageError:  # the room that this takes is needed
            delete(folder / f"{UNFINISHED}{MODEL}")
            raise
    if not training.should_save:
        return None
    log = RunLog.load(folder)
    (result,) = load_results(folder / MODEL / RESULTS) if (folder / MODEL).exists() else [None]
    return TrainedRun(folder, log, _draw(log), result)


def _draw(log: RunLog) -> list[Drawing]:
    return draw_pictures([log], log.place / PICTURES) if find_spec("matplotlib") else []


def _train(planned: PlannedRun, progress: Progress) -> tuple[EntropyTrainer, PreparedData]:
    """Trains to the end, or until the run diverges."""
    recipe, start, checkpoint = planned.recipe, planned.start, planned.checkpoint
    training = recipe.training
    with training.main_process_first(desc="preparing the text"):
        data = _prepare(recipe, start, progress)
    text = f"{data.name} ({data.revision})"
    check_text(recipe, text)
    fit_vocabulary(start.config, recipe, data.tokenizer)
    if checkpoint is not None:
        check_architecture(checkpoint, recipe, start.config, "vocab_size")
        training.eval_on_start = False  # it was evaluated then
    take = functools.partial(take_folder, recipe, checkpoint, text) if training.should_save else lambda: None
    if start.converts:
        take()
        with training.main_process_first(desc="converting"):
            model = _convert(recipe, start, data, progress)
    else:
        model = make_model(start, training.seed)
    if recipe.lora.lora_r is not None:
        set_seed(training.seed)
        model = attach_lora(model, recipe.lora, _find_base(recipe, start))
    training.prediction_loss_only = True
    with progress.stage(f"training {start.config.notation}") as line:
        observer = StepObserver(line.reach, line.say)
        try:
            trainer = EntropyTrainer(
                model=model,
                args=training,
                train_dataset=data.training,
                eval_dataset=data.validation,
                data_collator=collate_blocks,
                callbacks=[Stopwatch(), _watch_heads(recipe, data), observer],
            )
            # A trial, to refuse wrong arguments before the run's folder is taken.
            trainer.create_scheduler(2, trainer.create_optimizer())
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise UserError(f"{recipe.name}: the Trainer refuses its arguments: {error}") from error
        trainer.optimizer = trainer.lr_scheduler = None
        take()
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, data


def _prepare(recipe: Recipe, start: Start, progress: Progress) -> PreparedData:
    with ExitStack() as stack:
        lines: list[Stage] = []

        def begin(description: str, documents: int | None):
            stack.close()  # the stage before
            lines.append(stack.enter_context(progress.stage(description, documents)))

        data = prepare_data(
            recipe.data,
            start.context,
            recipe.training.seed,
            default_tokenizer=recipe.model.model_name_or_path,
            without=Path(recipe.training.output_dir),
            on_stage=begin,
            on_documents=lambda count: lines[-1].advance(count),
        )
        tokens = "a stream" if data.training_tokens is None else f"{data.training_tokens:,} tokens"
        lines[-1].say(f"{tokens} to train on, {data.validation_tokens:,} to evaluate on")
    return data


def _watch_heads(recipe: Recipe, data: PreparedData) -> EntropyCallback:
    count = min(MOST_PROBED, recipe.training.per_device_train_batch_size, len(data.validation))
    probe = collate_blocks([data.validation[index] for index in range(count)])["input_ids"]
    about = {"corpus": f"{data.name} ({data.revision})", **collect_origin(recipe.training.device)}
    return EntropyCallback(probe, recipe.training.entropy_logging_steps, about)


def _convert(recipe: Recipe, start: Start, data: PreparedData, progress: Progress) -> EntropyGPTForCausalLM:
    """Converts the source to the architecture of the recipe, fitted to the training text; once in a run."""
    output = Path(recipe.training.output_dir, CONVERTED)
    if not (output / CONVERSION.record).exists():
        options = ConversionOptions(source=recipe.model.model_name_or_path, to=start.config.notation, output=output)
        calibration = spread(data.training, options.calibration_tokens)
        validation = spread(data.validation, options.evaluation_tokens)
        text = Text(data.name, data.revision, data.tokenizer, data.training, calibration, validation)
        convert_with_text(Conversion(options, start.source, start.config), text, progress)
    return load_language_model(output)


def _find_base(recipe: Recipe, start: Start) -> str | None:
    """The place of the model that an adapter belongs to, whatever folder it is loaded from."""
    origin = recipe.model.model_name_or_path
    if start.converts:
        return str(Path(recipe.training.output_dir, CONVERTED).resolve())
    return str(Path(origin).resolve()) if origin is not None and Path(origin).exists() else origin


def _finish(trainer: EntropyTrainer, planned: PlannedRun, data: PreparedData, progress: Progress):
    """Measures the trained model and saves it in the run's folder, unless the run diverged."""
    recipe, start = planned.recipe, planned.start
    output = Path(recipe.training.output_dir)
    unfinished = output / f"{UNFINISHED}{MODEL}"
    diverged = trainer.guard.diverged is not None
    if recipe.training.should_save:
        delete(unfinished)
    trainer.accelerator.wait_for_everyone()
    saved = output / ADAPTER if recipe.lora.lora_r else unfinished
    if not diverged:
        trainer.save_model(str(saved))
    if diverged or not recipe.training.should_save:
        return
    delete(saved / TRAINING_ARGS_NAME)  # a pickle, with paths of this machine
    if recipe.lora.lora_r:
        with trainer.given_configuration():
            merge_adapter(trainer.model).save_pretrained(unfinished)
        save_tokenizer(data.tokenizer, saved)
    save_tokenizer(data.tokenizer, unfinished)
    model = load_language_model(unfinished).to(recipe.training.device)
    steps = trainer.state.global_step
    batch_size = recipe.training.sequences_per_step
    origin = recipe.model.model_name_or_path
    stopwatch = find_callback(trainer, Stopwatch)
    training = TrainingResult(
        steps=steps,
        tokens=steps * batch_size * data.context,
        seconds=stopwatch.seconds,
        cpu_seconds=stopwatch.cpu_seconds,
        hyperparameters={
            **{name: recipe.settings[name] for name in RECORDED if name in recipe.settings},
            "batch_size": batch_size,
            **(vars(recipe.lora) if recipe.lora.lora_r else {}),
            **describe_config(model.config),
        },
        text=f"{data.name} ({data.revision})",
        converted_from=start.source.config.notation if start.converts else None,
        started_from=origin and name_source(origin),
        base_model=origin and find_base_model(origin),
    )
    most_tokens = recipe.data.validation_tokens
    text = read_text(
        data.name + KEPT_APART, data.revision, data.validation_texts, data.tokenizer, data.context, most_tokens
    )
    result = measure_model(model, output.name, text, training, recipe.training.seed, progress)
    save_results([result], unfinished / RESULTS)
    model_card(result).save(unfinished / "README.md")
    if recipe.lora.lora_r:
        model_card(result, adapter=True).save(saved / "README.md")
    give_usual_mode(saved)
    give_usual_mode(unfinished)
    unfinished.replace(output / MODEL)
