"""Shows training: recipes and settings, the plan of a run, its progress and its result."""

import dataclasses
import sys
import textwrap
from typing import Any

from rich.console import Console
from rich.markup import escape

from entropy_gpt.training.estimate import estimate
from entropy_gpt.training.recipe import describe_setting, group_settings
from entropy_gpt.training.recipe_file import RECIPES, list_recipes
from entropy_gpt.workflows.train import PlannedRun, TrainedRun, perform, prepare

from . import plot
from .progress import format_bytes, format_count, format_seconds, progress_display
from .tables import make_table


# The second line of a recipe, if the paper has trained such models; and the architectures that it gives.
IN_THE_PAPER = "# Perplexity in arXiv 2501.03489: "
USUAL_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
SHORT = {"SM+LN+G": "GPT-2", "SM+ScFuFFN": "softmax\nonly", "EReg(SM(t)+ScFuFFN)": "pro-\nposal"}


def print_recipes():
    """A table of the recipes that come with the package, with the perplexities that the paper reports."""
    console = Console()
    rows = []
    for name in list_recipes():
        first, second, *_ = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        given = second.partition(IN_THE_PAPER)[2].rstrip(".")
        known = dict(architecture.split(" ") for architecture in given.split(", ") if architecture)
        rows.append((name, first.strip("# ."), *(known.get(notation, "") for notation in SHORT)))
    headings = ("recipe", "what it trains", *(f"in the\npaper:\n{title}" for title in SHORT.values()))
    console.print(make_table(headings, rows, text_columns=2, folded={1}))
    console.print(
        "Perplexities per token are those that the paper reports (arXiv 2501.03489) for these models: GPT-2, softmax "
        "only (SM+ScFuFFN), and the proposal (EReg(SM(t)+ScFuFFN)). They were not measured with this package.",
        highlight=False,
    )
    console.print("Run one with: entropy-gpt train RECIPE, where RECIPE can also be your own YAML file.")


def print_settings():
    """Every setting in its group, with its default and what it does."""
    console = Console()
    width = console.width if console.is_terminal else sys.maxsize  # a line each for grep
    for title, fields in group_settings().items():
        console.print(f"\n[bold]{escape(title)}[/]")
        for name, field in fields.items():
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            line = f"{name} (default: {default}): {describe_setting(field)}"
            print(textwrap.fill(line, width, initial_indent="  ", subsequent_indent="      "))


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
        _show_estimate(planned, console)
        return
    with progress_display(console) as progress:
        trained = perform(planned, progress)
    if trained is not None:
        _show_result(trained, console)


def _show_plan(planned: PlannedRun, console: Console):
    recipe, start = planned.recipe, planned.start
    training, config = recipe.training, start.config
    sequences = format_count(training.sequences_per_step, "sequence")
    tokens = training.sequences_per_step * start.context
    epochs = format_count(training.num_train_epochs, "epoch")
    amount = format_count(training.max_steps, "step") if training.max_steps > 0 else epochs
    layers, heads = format_count(config.n_layer, "layer"), format_count(config.n_head, "head")
    processes = format_count(training.world_size, "process", "processes")
    rows = {
        "architecture": f"{config.notation}, final norm: {config.final_normalization}",
        "sizes": f"{layers}, {heads}, width {config.n_embd}, context {start.context}",
        "starts from": recipe.model.model_name_or_path or f"new weights, seed {training.seed}",
        "text": recipe.data.dataset + (", streamed" if recipe.data.streaming else ""),
        "training": f"{amount} of {sequences}, {tokens:,} tokens; learning rate {training.learning_rate:g}, "
        f"{processes} on {training.device.type}",
        "folder": training.output_dir,
    }
    if start.converts:
        rows["starts from"] += f" ({start.source.config.notation}), converted first"
    if recipe.lora.lora_r is not None:
        rows["adapters"] = f"rank {recipe.lora.lora_r} on {', '.join(recipe.lora.lora_target_modules)}"
    for name, value in rows.items():
        console.print(f"{name:14}{value}", markup=False, highlight=False, soft_wrap=True)


def _show_estimate(planned: PlannedRun, console: Console):
    """Memory, hours and what is written, and how that is known."""
    training, found = planned.recipe.training, estimate(planned.recipe, planned.start)
    speed = f"at {found.speed / 1e9:,.0f} billion operations a second (a probe)"
    if found.seconds is None:
        time = f"not known before the text is read: it sets the number of steps; matrix products {speed}"
    else:
        time = f"at least {format_seconds(found.seconds)} of matrix products, {speed}"
    kept = f", the last {training.save_total_limit} kept" if training.save_total_limit else ""
    written = f"the model, {format_bytes(found.model)}; log and pictures"
    if training.save_strategy != "no":
        written = f"checkpoints of {format_bytes(found.checkpoint)}{kept}; {written}"
    optimizer = "AdamW" if training.optim in USUAL_OPTIMIZERS else f"AdamW in place of {training.optim.value}"
    rows = {
        "memory": f"about {format_bytes(found.memory)} a process (an estimate: weights, gradients, {optimizer}, "
        "activations)",
        "time": time,
        "writes": written,
    }
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
    if not trained.drawings:
        console.print(
            f"no pictures, since matplotlib is not installed: pip install 'entropy-gpt[eval]', then entropy-gpt plot "
            f"{trained.folder}",
            markup=False,
            soft_wrap=True,
        )
    if trained.result is not None:
        likelihood = trained.result.likelihood.likelihood
        console.print(
            f"[bold]{escape(trained.result.title)}[/]: perplexity {likelihood.perplexity:.2f} per token, "
            f"{likelihood.bits_per_byte:.3f} bits per byte, on {likelihood.tokens:,} tokens kept out of training"
        )
        console.print(f"model, ready for the Hub: {trained.model}", markup=False, soft_wrap=True)
