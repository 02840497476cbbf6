"""Options of `entropy-gpt export`, which writes a model as a graph for other runtimes and checks it there."""

from pathlib import Path
from typing import Annotated

import typer

from entropy_gpt.conversion.early_checks import check_model
from entropy_gpt.training.claims import refuse_claimed
from entropy_gpt.workflows.output_folder import EXPORT

from .paths import read_path


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A GPT-2 or EntropyGPT: a folder, a repository on the Hub, or a nanoGPT file."
        ),
    ],
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write an ONNX graph. Required, because it is the only format so far.")
    ],
    output: Annotated[
        Path, typer.Option(callback=read_path, help="Folder for graph, configuration, tokenizer and report.")
    ] = Path("exported_model"),
    cached: Annotated[
        bool,
        typer.Option(
            "--cache/--no-cache",
            help="Make the keys and values of each layer inputs and outputs of the graph, to generate token by token.",
        ),
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or repository of the tokenizer (default: the model).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Export, check and show the report, but keep nothing.")
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
    check_model(source)
    output = output.resolve()
    EXPORT.is_replaced_in(output, overwrite)  # before the imports, which take seconds
    if not dry_run:
        refuse_claimed(EXPORT.work(output), output)
    from entropy_gpt.terminal.export import run

    run(source, output, dry_run, cached=cached, tokenizer=tokenizer, overwrite=overwrite)
