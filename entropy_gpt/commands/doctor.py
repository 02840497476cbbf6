"""`entropy-gpt doctor`: checks what works on this machine and in this environment."""

from typing import Annotated

import typer

from entropy_gpt.terminal.extras import Part


def doctor(
    require: Annotated[
        list[Part] | None,
        typer.Option(help="Fail if this part is missing. Can be repeated."),
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Check also what make gpu needs; fail if it is missing.")] = False,
):
    """
    Check what works here, and show how to install or fix the rest.

    The command imports every package, and checks Python, the machine, the disk and the Hugging Face Hub (HF_ENDPOINT,
    HF_TOKEN and HF_HUB_OFFLINE are respected). Two processes then answer a tiny secret prompt. With --gpu, the GPU
    computes entropies too. Each line begins with a mark: ok, missing (a note), or failed (must be fixed).

    Exit status: 1 if something failed or a part of --require, or what --gpu needs, is missing, 0 otherwise.

    Example: entropy-gpt doctor --require train --require private
    """
    from entropy_gpt.terminal.doctor import run

    if not run(require or [], gpu):
        raise typer.Exit(1)
