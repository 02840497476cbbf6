"""`entropy-gpt private ask`: holds the prompt, and asks a server to continue it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .paths import read_file, read_model
from .private_connection import with_connection
from .private_options import DraftKeep, DraftTokens, NewTokens, PreparedFolder, with_options


def _read_generation(
    max_new_tokens: NewTokens = 1,
    temperature: Annotated[
        float, typer.Option(min=0, help="Draw tokens at this temperature; at 0, take the most likely ones.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Draw among this number of the most likely tokens. Needs logits.")
    ] = None,
    top_p: Annotated[
        float,
        typer.Option(min=0, max=1, help="Draw among the most likely tokens with this share alone. Needs logits."),
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of what is drawn.")] = None,
) -> dict[str, Any]:
    """The arguments of `PrivateClient.generate` that these options are."""
    return locals()


def _read_drafts(
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            callback=read_model,
            help="A causal language model of one's own, with the server's tokenizer: a folder, or on the Hub. It "
            "drafts tokens, and the server's model verifies several at once. The answer is the same.",
        ),
    ] = None,
    draft_tokens: DraftTokens = None,
    draft_keep: DraftKeep = "accepted",
) -> dict[str, Any]:
    """The arguments of `PrivateClient` that these options are."""
    return locals()


@with_connection
@with_options("drafts", _read_drafts)
@with_options("generation", _read_generation)
def ask(
    connection: dict[str, Any],
    drafts: dict[str, Any],
    generation: dict[str, Any],
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The text to continue, or - to read it from standard input. It stays on this machine, but other "
            "users of the machine can see a command line (ps) while the command runs: give a secret one by - or "
            "--prompt-file.",
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read the prompt from this file, in UTF-8.")
    ] = None,
    prepared: PreparedFolder = None,
    require_prepared: Annotated[
        bool, typer.Option("--require-prepared", help="Fail at once if no preparation fits.")
    ] = False,
    networks: Annotated[
        list[str],
        typer.Option(
            "--network",
            help="Estimate seconds for this network, not for LAN and WAN: loopback, or bandwidth and round trip, such "
            "as 300Mbps,20ms.",
        ),
    ] = (),
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", callback=read_file, help="Write the cost to this file, as JSON."),
    ] = None,
):
    """
    Hold the prompt, and ask a server to continue it. The server does not learn how tokens are chosen.

    Example: entropy-gpt private ask - --connect example.org:9000 --tokenizer DIR --cert c.pem --key c.key --ca ca.pem
    < prompt.txt
    """
    from entropy_gpt.terminal.private import ask as run

    run(
        prompt,
        prompt_file,
        networks,
        output,
        generation,
        prepared=prepared,
        require_prepared=require_prepared,
        **drafts,
        **connection,
    )
