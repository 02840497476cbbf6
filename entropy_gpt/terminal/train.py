"""Shows training: recipes and settings, the plan of a run, its progress and its result."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.markup import escape

from entropy_gpt.training.recipe import ARGUMENT_FIELDS, CONFIG_FIELDS
from entropy_gpt.training.recipe_file import RECIPES, list_recipes
from entropy_gpt.workflows.train import PlannedRun, TrainedRun, perform, prepare

from . import plot
from .progress import progress_display


def print_recipes():
    """The recipes that come with the package, with the first line of each."""
    console = Console()
    for name in list_recipes():
        title = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        console.print(f"[bold]{name}[/]: {escape(title)}")
    console.print("Run one with: entropy-gpt train RECIPE, where RECIPE can also be your own YAML file.")


def print_settings():
    """Every setting, with its default and what it does."""
    for name, field in sorted({**CONFIG_FIELDS, **ARGUMENT_FIELDS}.items()):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        text = " ".join(str(field.metadata.get("help", "See EntropyGPTConfig.")).split())
        print(f"{name} (default: {default}): {text}")


def run(source: str, overrides: dict[str, Any], dry_run: bool):
    """
    Shows the plan of a run, trains, and shows the result.

    Args:
        source (`str`): The recipe: a YAML file, or a name.
        overrides (`dict[str, Any]`): Settings that replace those of the recipe.
        dry_run (`bool`): Whether to show the plan and write nothing.

    Raises:
        `UserError`: If the recipe, the text, the model, the folder or a checkpoint can't be used.
    """
    planned = prepare(source, overrides)
    console = Console(quiet=not planned.recipe.training.should_save)  # one of several processes speaks
    _show_plan(planned, console)
    if dry_run:
        return
    with progress_display(console) as progress:
        trained = perform(planned, progress)
    if trained is not None:
        _show_result(trained, console)


def _show_plan(planned: PlannedRun, console: Console):
    recipe, start = planned.recipe, planned.start
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
    for name, value in rows.items():
        console.print(f"{name:14}{value}", markup=False, highlight=False, soft_wrap=True)


def _show_result(trained: TrainedRun, console: Console):
    """The divergence, if there was one, the pictures, the measurements and where the model is."""
    if (divergence := trained.divergence) is not None:
        notation = escape(trained.log.description.notation)
        console.print(
            f"[bold]{notation} diverged at step {divergence.step:,}[/], and was {escape(divergence.text)}. The run "
            "leaves no model except its checkpoints."
        )
    plot.show([trained.log], trained.drawings)
    if trained.result is not None:
        likelihood = trained.result.likelihood.likelihood
        console.print(
            f"[bold]{escape(trained.result.title)}[/]: perplexity {likelihood.perplexity:.2f} per token, "
            f"{likelihood.bits_per_byte:.3f} bits per byte, on {likelihood.tokens:,} tokens kept out of training"
        )
        console.print(f"model, ready for the Hub: {trained.model}", markup=False, soft_wrap=True)
