"""Options of `entropy-gpt train`, which trains a model by a recipe."""

import os
from pathlib import Path
from typing import Annotated

import typer

from entropy_gpt.training.recipe_file import list_recipes, read_override, read_settings


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A YAML file, or the name of a recipe that comes with the package. Without one: list them.",
            autocompletion=list_recipes,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the recipe, such as n_layer=6."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the architecture, the text and the amount of training; write nothing."),
    ] = False,
    show_settings: Annotated[
        bool, typer.Option("--settings", help="List every setting that a recipe can have, with its default.")
    ] = False,
):
    """
    Train a model by a recipe, and draw what its attention heads do during training.

    A recipe names the architecture (or a model to start from), the text, and any of HuggingFace's TrainingArguments.
    The run's folder (output_dir, by default runs/RECIPE) holds training_log.jsonl, its pictures, checkpoints, and at
    the end the model, ready for the Hub. A run that was killed continues with the same command, to the same result.

    To train on several processes: accelerate launch $(which entropy-gpt) train RECIPE, or torchrun instead.

    Example: entropy-gpt train python-stdlib-small notation='SM+ScFuFFN' max_steps=500
    """
    if recipe is not None and not show_settings:
        from entropy_gpt.training.claims import refuse_claimed
        from entropy_gpt.training.storage import check_folder

        overrides = dict(map(read_override, settings or []))
        # Refused before the imports, which take seconds.
        output = read_settings(recipe, overrides)["output_dir"]
        check_folder(Path(str(output)), "output_dir")
        if not dry_run and os.environ.get("RANK", "0") == "0":  # the first of several processes claims it for all
            refuse_claimed(Path(str(output)))
    from entropy_gpt.terminal.train import print_recipes, print_settings, run

    if show_settings:
        print_settings()
    elif recipe is None:
        print_recipes()
    else:
        run(recipe, overrides, dry_run)
