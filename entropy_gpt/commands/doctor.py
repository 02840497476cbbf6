"""`entropy-gpt doctor`: whether this machine and environment can do what the project offers."""

from typing import Annotated

import typer

from entropy_gpt.terminal.extras import Part


def doctor(
    require: Annotated[
        list[Part] | None,
        typer.Option(help="Fail if this is not there, in place of a note; as often as there are parts to name."),
    ] = None,
):
    """
    Tell what of this project works here, and what to install or do about the rest.

    Looks at Python and every package, each of which is imported, at the machine, the disk and the Hugging Face Hub
    (HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are respected), and has two processes answer a tiny secret prompt. Each
    line begins with one of three marks: ok; missing, which is a note; failed, which has to be mended.

    Exit status: 0 if all that is there works, 1 if something failed or --require names what is missing.

    Example: entropy-gpt doctor --require train --require private
    """
    from entropy_gpt.terminal.doctor import run

    if not run(require or []):
        raise typer.Exit(1)
