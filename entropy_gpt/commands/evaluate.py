"""`entropy-gpt evaluate`: what a model is worth, what its heads do, and what it takes."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _list_tasks(tasks: str | None) -> str | None:
    if tasks == "list":
        from entropy_gpt.workflows.evaluate import print_tasks

        print_tasks()
        raise typer.Exit
    return tasks


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="EntropyGPTs or GPT-2s: folders, or repositories on the Hub."),
    ],
    text: Annotated[
        str | None,
        typer.Option(
            help="A text file, a folder of text files, a data file or folder (JSON lines, CSV, Parquet), or a data "
            "set on the Hub. Else the part of Python's standard library that training here keeps apart."
        ),
    ] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Of --text, only the part that training on it keeps apart.")
    ] = False,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    config: Annotated[str | None, typer.Option(help="Configuration of a data set.")] = None,
    text_column: Annotated[str, typer.Option(help="Column of a data set that holds the text.")] = "text",
    tokenizer: Annotated[str | None, typer.Option(help="Where the tokenizer is, if not with each model.")] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens that a model sees at once (default: one less than the fewest positions of a model, up to "
            "1023: trained on blocks of its own length, a model has never predicted from its last position)."
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens predicted in each window after the first: fewer see more before them (all)."),
    ] = None,
    separate: Annotated[
        bool,
        typer.Option("--separate", help="Predict each document alone; else they follow one another, as in training."),
    ] = False,
    bos: Annotated[
        bool, typer.Option("--bos", help="Begin with the beginning-of-text token, and predict the first token too.")
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Stop after so many tokens of text.")] = None,
    per_position: Annotated[
        bool, typer.Option("--per-position", help="Give the perplexity by the number of tokens seen too.")
    ] = False,
    frequency_text: Annotated[
        str | None,
        typer.Option(
            help="Give the perplexity by how often tokens are in this text too: as --text, or 'training' for what "
            "training takes where the rest is evaluated."
        ),
    ] = None,
    head_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens whose attention is looked at, spread over the text; 0: none.")
    ] = 65536,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...",
            help="Tasks of lm-eval; 'list' shows those for --task-data.",
            is_eager=True,
            callback=_list_tasks,
        ),
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="Folder with BLiMP, LAMBADA, HellaSwag or ARC, for the tasks local_*.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take so many samples of each task alone.")] = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a forward pass: speed and memory, no results.")
    ] = 4096,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and computation.")] = Dtype.float32,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0 (default: a GPU if there is one).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what lm-eval draws.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for numbers and pictures.")] = Path("evaluation_output"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another evaluation in the folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read models and text, and show what would be measured.")
    ] = False,
):
    """
    Measure models: perplexity on text, attention heads, operations, and tasks of lm-eval.

    All models see the same text in the same windows. The folder ends up with results.json, where each number has its
    conditions, and with pictures of each model's heads; entropy-gpt report makes one page of it. Interrupted, the same
    command goes on with the first model that is not done.

    Example: entropy-gpt evaluate runs/baseline/model runs/proposal/model --text my_texts --stride 64 --per-position
    """
    from entropy_gpt.workflows import evaluate as evaluate_job
    from entropy_gpt.workflows.evaluate_inputs import Job

    evaluate_job.run(
        Job(
            models=tuple(models),
            text=text,
            held_out=held_out,
            split=split,
            config=config,
            text_column=text_column,
            tokenizer=tokenizer,
            context=context,
            stride=stride,
            separate=separate,
            bos=bos,
            max_tokens=max_tokens,
            per_position=per_position,
            frequency_text=frequency_text,
            head_tokens=head_tokens,
            tasks=tasks,
            task_data=task_data,
            limit=limit,
            batch_tokens=batch_tokens,
            dtype=str(dtype),
            device=device,
            seed=seed,
        ),
        output,
        overwrite,
        dry_run,
    )
