"""`entropy-gpt private prepare`: does what needs no prompt."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .paths import read_path
from .private_connection import with_connection
from .private_options import NewTokens


@with_connection
def prepare(
    connection: dict[str, Any],
    prepared: Annotated[
        Path,
        typer.Option("--prepared", callback=read_path, help="Folder for this side's halves. They are secret."),
    ],
    tokens: Annotated[int, typer.Option(min=1, help="The most tokens of a prompt.")] = 128,
    new_tokens: NewTokens = 1,
    count: Annotated[int, typer.Option(min=1, help="How many to make; each serves one prompt.")] = 1,
):
    """
    Do with a server all of later answers that needs no prompt, so that `ask --prepared` takes less time.

    The server has to run with --prepared. What is whole stays if it is interrupted.

    Example: entropy-gpt private prepare --connect example.org:9000 --tokenizer DIR --prepared prepared --count 4
    --cert c.pem --key c.key --ca ca.pem
    """
    from entropy_gpt.terminal.private import prepare as run

    run(tokens, new_tokens, count, prepared=prepared, **connection)
