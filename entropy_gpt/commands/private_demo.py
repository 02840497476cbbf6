"""`entropy-gpt private demo`: runs both sides on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from .paths import read_file
from .private_connection import ProtocolOption, Timeout
from .private_options import (
    AnswerOption,
    AuditedText,
    ChosenFor,
    EmbeddingOption,
    FractionBits,
    NewTokens,
    OfferedModel,
    PublicCheckpoint,
    TokenizerPlace,
)


def demo(
    model: OfferedModel,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "def main(",
    new_tokens: NewTokens = 1,
    protocol: ProtocolOption = "cheetah",
    embedding: EmbeddingOption = "one_hot",
    public_checkpoint: PublicCheckpoint = None,
    answer: AnswerOption = "logits",
    fraction_bits: FractionBits = 18,
    text: AuditedText = None,
    tokenizer: TokenizerPlace = None,
    prepared: Annotated[
        bool, typer.Option("--prepared", help="Do first what needs no prompt, and show both phases.")
    ] = False,
    networks: ChosenFor = (),
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", callback=read_file, help="Write the cost of each step to this file, as JSON."),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            callback=read_file, help="Write the total cost to this file, as a result for report, card and push."
        ),
    ] = None,
    timeout: Timeout = 600,
):
    """
    Run a server and a client on this machine, and compare their answer with the model's own in the clear.

    Example: entropy-gpt private demo model_cards/models/converted --max-new-tokens 3
    """
    options = dict(locals())
    from entropy_gpt.terminal.private import demo as run

    run(**options)
