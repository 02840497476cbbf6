"""Options of a text and its tokenizer, which several commands have."""

from typing import Annotated

import typer


Split = Annotated[str, typer.Option(help="The split of a data set.")]
DataConfig = Annotated[str | None, typer.Option(help="The configuration of a data set.")]
TextColumn = Annotated[str, typer.Option(help="The column of a data set that holds the text.")]
EndOfText = Annotated[
    str | None,
    typer.Option(metavar="TOKEN", help="The tokenizer's token for the end of a text. Default: what it names."),
]
