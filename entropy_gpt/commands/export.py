"""`entropy-gpt export`: a model for other runtimes, checked there."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A GPT-2 or EntropyGPT: a folder, a repository on the Hub, or a nanoGPT file."
        ),
    ],
    onnx: Annotated[bool, typer.Option("--onnx", help="Write an ONNX graph. Required: it is the only format so far.")],
    output: Annotated[Path, typer.Option(help="Folder for the graph and all that goes with it.")] = Path(
        "exported_model"
    ),
    cached: Annotated[
        bool,
        typer.Option(
            "--cache/--no-cache",
            help="Make the keys and values of each layer inputs and outputs of the graph, to generate token by token.",
        ),
    ] = False,
    tokenizer: Annotated[str | None, typer.Option(help="Where the tokenizer is, if not with the model.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Export and check it, show what comes out, and keep nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in --output.")] = False,
):
    """
    Export a model as an ONNX graph, folded for inference, and check it in onnxruntime.

    The graph is in float32 and takes any number of sequences of any length, padded on the left: input_ids,
    attention_mask and position_ids. The command lists the graph's operators and says which are not linear. The graph
    is kept only if its logits match those of the model in torch; otherwise the command fails and leaves nothing
    behind.

    Example: entropy-gpt export runs/python-stdlib-small/model --onnx --cache --output my_onnx_model
    """
    from entropy_gpt.workflows.export import Job, run

    run(Job(source, output.resolve(), cached, tokenizer, dry_run, overwrite))
