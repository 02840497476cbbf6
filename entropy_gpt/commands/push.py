"""`entropy-gpt push`: checks a trained model and sends it to the Hub."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from entropy_gpt.conversion.early_checks import check_model, check_path

from .paths import read_path, read_paths


Model = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        callback=read_path,
        help="Folder of a trained model with its tokenizer, as train and convert write it.",
    ),
]
Results = Annotated[
    list[Path] | None,
    typer.Option(
        "--results",
        callback=read_paths,
        help="Results of the model besides those in its folder: a file, or a folder with a results.json. Can be "
        "repeated. Results of other models are ignored.",
    ),
]
Licence = Annotated[
    str | None,
    typer.Option("--license", help="Licence of the weights, by the Hub's name for it, such as apache-2.0."),
]


def check_folder(folder: Path, results: list[Path] | None):
    """Refuses a wrong path or a folder without a model before the imports, which take seconds."""
    check_path(folder, "Give the folder of a trained model.")
    check_model(folder)
    for path in results or ():
        check_path(path)


def push(
    folder: Model,
    repository: Annotated[str, typer.Argument(metavar="REPO_ID", help="The repository, such as my-name/my-model.")],
    results: Results = None,
    licence: Licence = None,
    folded: Annotated[
        Literal["beside", "instead"] | None,
        typer.Option(
            help="Send the model folded for inference: next to the model, in a folder of its own, or instead of it.",
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create a new repository as private.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch of the commit, created if it does not exist. Default: main.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Propose the commit as a pull request to an existing repository.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest size of a file of weights.")] = "5GB",
    timeout: Annotated[
        int, typer.Option(min=1, help="Seconds without a reply after which the Hub is asked again.")
    ] = 60,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Put the folder together and check it, but send nothing. Needs no token.")
    ] = False,
):
    """
    Send a trained model to the Hub, with its code, its tokenizer, and a card made from its results.

    Before anything is sent, the folder must load in a fresh process without this package and give the same logits. Its
    card must be readable, and it must contain nothing private, such as tokens and paths of this machine. All files go
    in one commit. If sending fails, a repository or branch that was created for it may remain, empty. The commit
    replaces the card and deletes files of an earlier push that this one does not have; other files stay.

    The Hub is HF_ENDPOINT, and the token is that of `hf auth login` or HF_TOKEN.

    Example: entropy-gpt push runs/python-stdlib-small/model my-name/my-model --license apache-2.0 --folded beside
    """
    options = dict(locals())
    check_folder(folder, results)
    from entropy_gpt.terminal.publish import run

    run(**options)
