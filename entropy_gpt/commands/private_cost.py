"""`entropy-gpt private cost`: predicts the cost from architecture and sizes."""

from typing import Annotated

import typer

from entropy_gpt.conversion.early_checks import check_model, check_notation, is_model

from .private_options import ChosenFor, DraftKeep, DraftTokens, EmbeddingOption, Heads, Length, NewTokens


def cost(
    architectures: Annotated[
        list[str],
        typer.Argument(
            metavar="NOTATION|MODEL...",
            help="Architectures, such as 'SM+LN+G' and 'SM+ScFuFFN', and models: folders, or on the Hub.",
        ),
    ],
    n_layer: Annotated[int | None, typer.Option(min=1, help="Blocks. Default: those of the model, or 12.")] = None,
    n_embd: Annotated[int | None, typer.Option(min=1, help="Width. Default: the model's, or 768.")] = None,
    n_head: Heads = None,
    length: Length = 128,
    vocab_size: Annotated[
        int | None, typer.Option(min=2, help="Tokens of the vocabulary. Default: the model's, or 50257.")
    ] = None,
    kept: Annotated[int, typer.Option(min=0, help="Earlier tokens, whose keys and values are cached.")] = 0,
    max_new_tokens: NewTokens = 1,
    draft_acceptance: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Predict an answer with drafts (private ask --draft): each is right with this probability, if those "
            "before it are. docs/drafts.md shows what was seen.",
        ),
    ] = None,
    draft_tokens: DraftTokens = None,
    draft_keep: DraftKeep = "accepted",
    all_positions: Annotated[
        bool, typer.Option("--all-positions", help="Compute the logits of every position, not only of the last one.")
    ] = False,
    embedding: EmbeddingOption = "one_hot",
    prepared: Annotated[
        bool, typer.Option("--prepared", help="Do before the prompt what needs none (private prepare).")
    ] = False,
    networks: ChosenFor = (),
):
    """
    Predict the traffic, the round trips and the time of a private inference, from architecture and sizes alone.

    The prices of Cheetah's primitives were measured once. docs/private_inference.md compares predictions with
    measurements. With drafts, they are of the answer to be expected, and also of a pass and of a token.

    Example: entropy-gpt private cost SM+LN+G SM+LN+R 'EReg(SM(t)+ScFuFFN)' --seq 256 --network 100Mbps,80ms

    Example: entropy-gpt private cost SM+ScFuFFN --max-new-tokens 16 --draft-acceptance 0.8
    """
    options = dict(locals())
    for architecture in architectures:
        (check_model if is_model(architecture) else check_notation)(architecture)
    from entropy_gpt.terminal.private_cost import run

    run(**options)
