"""`entropy-gpt diagnose`: draws what attention heads do on one text."""

from pathlib import Path
from typing import Annotated

import typer

from entropy_gpt.conversion.early_checks import check_head, check_model, check_place
from entropy_gpt.training.storage import check_folder

from .paths import read_path


def diagnose(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="An EntropyGPT or a GPT-2: a folder, or a repository on the Hub.")
    ],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text, at most as long as the model can see.")],
    head: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER,HEAD",
            help="The head whose attention is drawn, from 0. Default: the one with the lowest mean entropy.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or repository of the tokenizer. Default: the model's.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", callback=read_path, help="Folder for the pictures.")
    ] = Path("attention"),
):
    """
    Draw one text: the entropy of every head at every token, and what the tokens attend to in one head.

    Works for any GPT-2 that transformers loads. The report of `entropy-gpt evaluate --prompt TEXT` has the same
    pictures.

    Example: entropy-gpt diagnose model_cards/models/converted "def main(args):" --head 3,2
    """
    check_model(model)
    if tokenizer is not None:
        check_place(tokenizer)
    check_head(head)
    check_folder(output)
    from entropy_gpt.terminal.diagnose import run

    run(model, text, head, tokenizer, output)
