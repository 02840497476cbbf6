"""The stages of a training run: text, model, training, measurement, pictures. What is interrupted goes on."""

import dataclasses
import functools
from contextlib import ExitStack
from pathlib import Path

from datasets import disable_progress_bars
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.conversion.tokenizer_files import save_tokenizer
from entropy_gpt.evaluation.origin import git_revision, machine_name, recorded_versions
from entropy_gpt.evaluation.records.measurement import KEPT_APART, describe_config, measure_model, read_text
from entropy_gpt.evaluation.records.results import RESULTS, TrainingResult, load_results, save_results
from entropy_gpt.evaluation.showing.model_card import model_card
from entropy_gpt.terminal import plot as plot_job
from entropy_gpt.terminal.progress import progress_display
from entropy_gpt.training.adapters import attach_lora, merge_adapter
from entropy_gpt.training.callbacks import StepObserver, Stopwatch, find_callback
from entropy_gpt.training.entropy_callback import EntropyCallback
from entropy_gpt.training.files import UNFINISHED, delete
from entropy_gpt.training.packing import collate_blocks
from entropy_gpt.training.preparation import PreparedData, prepare_data
from entropy_gpt.training.progress import Progress, Stage
from entropy_gpt.training.recipe import ARGUMENT_FIELDS, CONFIG_FIELDS, Recipe, read_recipe
from entropy_gpt.training.recipe_file import RECIPES, list_recipes
from entropy_gpt.training.run_folder import ADAPTER, MODEL, check_architecture, check_folder, check_text, take_folder
from entropy_gpt.training.start import Start, find_start, fit_vocabulary, make_model
from entropy_gpt.training.trainer import EntropyTrainer
from modeling_entropy_gpt import EntropyGPTForCausalLM

from .convert import convert
from .convert_inputs import Job, Text, find_base_model, name_source, spread


# Sequences of validation text on which the heads are measured in the course of training.
MOST_PROBED = 8
# What a result tells of how its model was trained.
TOLD = ("learning_rate", "weight_decay", "max_grad_norm", "lr_scheduler_type", "warmup_steps")


def print_recipes():
    """The recipes that come along, with the first line of each."""
    console = Console()
    for name in list_recipes():
        title = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        console.print(f"[bold]{name}[/]: {escape(title)}")
    console.print("entropy-gpt train RECIPE, or your own YAML file in its place. --help tells more.")


def print_settings():
    """Every setting, with its default and what it does."""
    for name, field in sorted({**CONFIG_FIELDS, **ARGUMENT_FIELDS}.items()):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        text = " ".join(str(field.metadata.get("help", "See EntropyGPTConfig.")).split())
        print(f"{name} (default: {default}): {text}")


def run(source: str, settings: list[str], dry_run: bool):
    """
    Trains by a recipe, from the last whole checkpoint on, measures, draws and saves.

    Args:
        source (`str`): The recipe: a file, or a name.
        settings (`list[str]`): `key=value` settings that replace those of the recipe.
        dry_run (`bool`): Whether to show what would be done and write nothing.

    Raises:
        `UserError`: If recipe, text, model, folder or checkpoint can't be used.
    """
    disable_progress_bars()
    logging.disable_progress_bar()
    recipe = read_recipe(source, settings)
    start = find_start(recipe)
    console = Console(quiet=not recipe.training.should_save)
    _show_plan(recipe, start, console)
    checkpoint = check_folder(recipe, start.config)
    if dry_run:
        return
    if not (folder := Path(recipe.training.output_dir, MODEL)).exists():
        with progress_display(console) as progress:
            trainer, data = _train(recipe, start, checkpoint, progress)
            _finish(trainer, start, data, recipe, progress)
        if recipe.training.should_save and (reason := trainer.guard.diverged) is not None:
            _tell_divergence(start.config.notation, trainer, reason, console)
    if recipe.training.should_save:
        _show_results(folder, console)


def _show_plan(recipe: Recipe, start: Start, console: Console):
    """What is going to be trained, before anything is."""
    training, config = recipe.training, start.config
    sequences = training.sequences_per_step
    amount = f"{training.max_steps:,} steps" if training.max_steps > 0 else f"{training.num_train_epochs:g} epochs"
    rows = {
        "architecture": f"{config.notation}, final norm: {config.final_normalization}",
        "sizes": f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context {start.context}",
        "starts from": recipe.model.model_name_or_path or f"new weights, seed {training.seed}",
        "text": recipe.data.dataset + (", streamed" if recipe.data.streaming else ""),
        "training": f"{amount} of {sequences} sequences, {sequences * start.context:,} tokens; learning rate "
        f"{training.learning_rate:g}, {training.world_size} process(es) on {training.device.type}",
        "folder": training.output_dir,
    }
    if start.converts:
        rows["starts from"] += f" ({start.source.config.notation}), converted first"
    if recipe.lora.lora_r is not None:
        rows["adapters"] = f"rank {recipe.lora.lora_r} on {', '.join(recipe.lora.lora_target_modules)}"
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)


def _train(
    recipe: Recipe, start: Start, checkpoint: Path | None, progress: Progress
) -> tuple[EntropyTrainer, PreparedData]:
    """Trains to the end, or to where the run diverges."""
    training = recipe.training
    with training.main_process_first(desc="preparing the text"):
        data = _prepare(recipe, start, progress)
    text = f"{data.name} ({data.revision})"
    check_text(recipe, text)
    fit_vocabulary(start.config, recipe, data.tokenizer)
    if checkpoint is not None:
        check_architecture(checkpoint, recipe, start.config, "vocab_size")
        training.eval_on_start = False  # it was done
    take = functools.partial(take_folder, recipe, checkpoint, text) if training.should_save else lambda: None
    if start.converts:
        take()
        with training.main_process_first(desc="converting"):
            model = _convert(recipe, start, data, progress)
    else:
        model = make_model(start, training.seed)
    if recipe.lora.lora_r is not None:
        set_seed(training.seed)
        model = attach_lora(model, recipe.lora)
    training.prediction_loss_only = True
    with progress.stage(f"training {start.config.notation}") as line:
        observer = StepObserver(line.reach, lambda loss: line.say(f"loss {loss:.3f}"))
        try:
            trainer = EntropyTrainer(
                model=model,
                args=training,
                train_dataset=data.training,
                eval_dataset=data.validation,
                data_collator=collate_blocks,
                callbacks=[Stopwatch(), _watch_heads(recipe, data), observer],
            )
            # Made here only to see whether their arguments will do.
            trainer.create_scheduler(2, trainer.create_optimizer())
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            if not any(Path(training.output_dir).iterdir()):  # the Trainer makes it
                Path(training.output_dir).rmdir()
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
    about = {
        "corpus": f"{data.name} ({data.revision})",
        "versions": recorded_versions(),
        "git_revision": git_revision(),
        "machine": machine_name(recipe.training.device),
    }
    return EntropyCallback(probe, recipe.training.entropy_logging_steps, about)


def _convert(recipe: Recipe, start: Start, data: PreparedData, progress: Progress) -> EntropyGPTForCausalLM:
    """The source in the architecture wanted, fitted to the training text step by step; done once a run."""
    output = Path(recipe.training.output_dir, "converted")
    if not output.exists():
        job = Job(source=recipe.model.model_name_or_path, notation=start.config.notation, output=output)
        calibration, validation = (
            spread(blocks, tokens)
            for blocks, tokens in ((data.training, job.calibration_tokens), (data.validation, job.evaluation_tokens))
        )
        text = Text(data.name, data.revision, data.tokenizer, data.training, calibration, validation)
        convert(job, start.source, start.config, text, progress)
    return load_language_model(output)


def _finish(trainer: EntropyTrainer, start: Start, data: PreparedData, recipe: Recipe, progress: Progress):
    """Leaves the trained model, measured, in the run's folder; nothing of a run that diverged."""
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
    save_tokenizer(data.tokenizer, unfinished)
    model = load_language_model(unfinished).to(recipe.training.device)
    steps = trainer.state.global_step
    batch_size = recipe.training.sequences_per_step
    origin = recipe.model.model_name_or_path
    training = TrainingResult(
        steps=steps,
        tokens=steps * batch_size * data.context,
        seconds=find_callback(trainer, Stopwatch).seconds,
        hyperparameters={
            **{name: recipe.settings[name] for name in TOLD if name in recipe.settings},
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
    unfinished.replace(output / MODEL)


def _tell_divergence(notation: str, trainer: EntropyTrainer, reason: str, console: Console):
    step, _ = trainer.guard.events[-1]
    console.print(f"[bold]{escape(notation)} diverged at step {step:,}[/], and was {escape(reason)}.")
    console.print("That is this run's result: it leaves no model but those of its checkpoints.")


def _show_results(folder: Path, console: Console):
    """Pictures, the figures of the trained model if there is one, and where everything lies."""
    plot_job.run([folder.parent], None, None)
    if folder.exists():
        (result,) = load_results(folder / RESULTS)
        likelihood = result.likelihood.likelihood
        console.print(
            f"[bold]{escape(result.title)}[/]: perplexity {likelihood.perplexity:.2f} per token, "
            f"{likelihood.bits_per_byte:.3f} bits per byte, on {likelihood.tokens:,} tokens kept out of training"
        )
        console.print(f"model, ready for the Hub: {folder}", markup=False, soft_wrap=True)
