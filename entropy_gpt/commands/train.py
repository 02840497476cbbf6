"""`entropy-gpt train`: train a model of the family by a recipe."""

from typing import Annotated

import typer


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file, or the name of a recipe that comes along. Without: their list.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the recipe, such as n_layer=6."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be trained, on what and how; write nothing.")
    ] = False,
    show_settings: Annotated[
        bool, typer.Option("--settings", help="List every setting that a recipe can have, with its default.")
    ] = False,
):
    """
    Train a model by a recipe, and show what its attention heads do meanwhile.

    A recipe names the architecture (or a model to start from), the text, and any of HuggingFace's TrainingArguments.
    The run's folder (output_dir, else runs/RECIPE) holds training_log.jsonl, pictures drawn from it, checkpoints, and
    at the end the model, ready for the Hub. Killed at any moment, the same command goes on to the same result.

    On several processes: accelerate launch $(which entropy-gpt) train RECIPE, or torchrun in its place.

    Example: entropy-gpt train python-stdlib-small notation='SM+ScFuFFN' max_steps=500
    """
    if recipe is not None:  # refused before the imports, which take seconds
        from entropy_gpt.training.recipe_file import read_override, read_settings

        read_settings(recipe, dict(map(read_override, settings or [])))
    from entropy_gpt.workflows import train as train_job

    if show_settings:
        train_job.print_settings()
    elif recipe is None:
        train_job.print_recipes()
    else:
        train_job.run(recipe, settings or [], dry_run)
