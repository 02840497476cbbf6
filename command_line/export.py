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
    onnx: Annotated[bool, typer.Option("--onnx", help="As an ONNX graph, which is the one format so far.")],
    output: Annotated[Path, typer.Option(help="Folder for the graph and all that goes with it.")] = Path(
        "exported_model"
    ),
    cached: Annotated[
        bool,
        typer.Option(
            "--cache/--no-cache",
            help="Let the graph take and give the keys and values of each layer, to generate token by token.",
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
    attention_mask and position_ids. What it holds is told: operators, and which of them are not linear. It is there
    once its logits are those of the model in torch; else the command fails, and leaves nothing behind.

    Example: entropy-gpt export runs/python-stdlib-small/model --onnx --cache --output my_onnx_model
    """
    from .export_job import Job, run

    assert onnx, "the option is required, and has no opposite"
    run(Job(source, output.resolve(), cached, tokenizer, dry_run, overwrite))
