"""`entropy-gpt push`: a trained model to the Hub, looked through before anything is sent."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Folded(StrEnum):
    beside = "beside"
    instead = "instead"


Model = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="Folder of a trained model with its tokenizer, as train and convert leave it."),
]
Results = Annotated[
    list[Path] | None,
    typer.Option(
        "--results",
        help="Results of the model beside those in its folder (files, or folders with a results.json); can be "
        "repeated. Those of other models in them are passed over.",
    ),
]
Licence = Annotated[
    str | None,
    typer.Option("--license", help="Licence of the weights, by the Hub's name for it, such as apache-2.0."),
]


def push(
    folder: Model,
    repository: Annotated[str, typer.Argument(metavar="REPO_ID", help="Where to, such as my-name/my-model.")],
    results: Results = None,
    licence: Licence = None,
    folded: Annotated[
        Folded | None,
        typer.Option(
            help="Send the model folded for inference: beside it, in a folder of its own, or instead of it.",
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="If the repository is new, let nobody else see it.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch that gets the commit; made if it is not there (default: main).")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Propose the commit as a pull request to a repository that is there.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="The most that one file of weights holds.")
    ] = "5GB",
    timeout: Annotated[
        int, typer.Option(min=1, help="Seconds for which the Hub may be silent before it is asked again.")
    ] = 60,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Put all together and check it, and send nothing. Needs no token.")
    ] = False,
):
    """
    Send a trained model to the Hub, with its code, its tokenizer, and a card made from its results.

    Before anything is sent, the folder has to load in a fresh process without this package and give the same logits;
    its card has to be readable; and it is searched for what is private, such as tokens and paths of this machine. All
    goes in one commit, or nothing does; a repository or branch that was made for it may stay, empty. Files of an
    earlier push that this one does not have are deleted, the card is replaced, and what else lies there stays.

    The Hub is the one HF_ENDPOINT names, the token that of `hf auth login` or HF_TOKEN.

    Example: entropy-gpt push runs/python-stdlib-small/model my-name/my-model --license apache-2.0 --folded beside
    """
    from entropy_gpt.workflows.publish import Target, run

    run(
        folder,
        Target(repository, private, revision, create_pr, message),
        results or [],
        licence,
        folded and folded.value,
        shard_size,
        timeout,
        dry_run,
    )
