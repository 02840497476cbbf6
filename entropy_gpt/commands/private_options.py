"""Options that several commands of `entropy-gpt private` have, one by one and in groups."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .paths import read_model, read_path, read_place


OfferedModel = Annotated[
    str,
    typer.Argument(metavar="MODEL", callback=read_model, help="An EntropyGPT or GPT-2: a folder, or on the Hub."),
]
NewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Tokens of the answer; their number is public.")
]
ChosenFor = Annotated[
    list[str],
    typer.Option(
        "--network",
        help="Estimate seconds for this network, not for LAN and WAN: loopback, or bandwidth and round trip, such as "
        "300Mbps,20ms. Operations take the forms that are fastest on the first one named, or on a WAN.",
    ),
]
Heads = Annotated[int | None, typer.Option("--n-head", min=1, help="Heads. Default: heads of about 64 dimensions.")]
Length = Annotated[int, typer.Option("--seq", min=1, help="Tokens of the prompt.")]
TokenizerPlace = Annotated[
    str | None,
    typer.Option(callback=read_place, help="The tokenizer's folder or repository. Default: the model's."),
]
EmbeddingOption = Annotated[
    Literal["one_hot", "client_table", "public"],
    typer.Option(
        help="one_hot: neither side learns anything, at the cost of a product with the whole vocabulary. "
        "client_table: the client gets the embeddings, weights of the model (and of its head, if tied). "
        "public: the client has them already, since they are those of --public-checkpoint, to the last bit."
    ),
]
PublicCheckpoint = Annotated[
    str | None,
    typer.Option(
        "--public-checkpoint",
        metavar="MODEL",
        callback=read_place,
        help="With --embedding public: the checkpoint that the embeddings come from, a folder or a repository on the "
        "Hub.",
    ),
]
DraftTokens = Annotated[int | None, typer.Option(min=1, help="The most drafts that are verified at once. Default: 8.")]
DraftKeep = Annotated[
    Literal["accepted", "prompt"],
    typer.Option(
        help="accepted: what is computed of right drafts stays, so the server learns how many were right. "
        "prompt: only what is computed of the prompt stays, and each pass computes the whole answer. The server "
        "learns the number of passes alone."
    ),
]
AnswerOption = Annotated[
    Literal["logits", "token", "sampled"],
    typer.Option(
        help="What the client learns of each new token: its logits; only the token that is most likely, by secure "
        "comparisons; or only a token that is sampled, by noise that the client adds before. Logits reveal more about "
        "the weights with each question. So does a client's noise, if it is chosen for that."
    ),
]
FractionBits = Annotated[
    int,
    typer.Option(
        help="Bits of a number behind the point, from 12 to 22, of 64. Fewer leave room for larger numbers, more for "
        "smaller ones."
    ),
]
AuditedText = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="A text that the audit of the model's numbers looks at too. It always looks at random tokens and at "
        "those with the largest and the smallest embeddings, at every position.",
    ),
]
LongestWait = Annotated[
    int,
    typer.Option(
        "--max-waiting-seconds", min=1, max=604_800, help="For how long each may wait; after that, it is refused."
    ),
]
PreparedFolder = Annotated[
    Path | None,
    typer.Option(
        "--prepared",
        callback=read_path,
        help="Folder of this side's halves of preparations (private prepare). They are secret.",
    ),
]


def with_options(argument: str, read: Callable[..., dict[str, Any]]) -> Callable[[Callable], Callable]:
    """
    Gives a command the options of a group, after its own.

    Args:
        argument (`str`): The command's argument that they become.
        read (`Callable`): Has the options as its parameters, and returns the argument.
    """
    shared = inspect.signature(read).parameters

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command).parameters
        options = [option for name, option in (own | shared).items() if name != argument]
        options.sort(key=lambda option: option.default is not option.empty)  # those that have to be given come first

        @functools.wraps(command)
        def run(**values):
            command(**{argument: read(**{name: values.pop(name) for name in shared})}, **values)

        run.__signature__ = inspect.Signature(
            [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options], return_annotation=None
        )
        run.__annotations__ = {option.name: option.annotation for option in options}
        return run

    return decorate
