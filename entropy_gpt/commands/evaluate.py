"""`entropy-gpt evaluate`: measures perplexity, attention heads, operations and task scores of models."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from entropy_gpt.conversion.early_checks import check_head, check_model, check_place
from entropy_gpt.training.claims import refuse_claimed
from entropy_gpt.workflows.output_folder import EVALUATION

from .paths import read_path
from .text_options import DataConfig, EndOfText, Split, TextColumn


def _list_tasks(tasks: str | None) -> str | None:
    if tasks == "list":
        from entropy_gpt.terminal.evaluate import print_tasks

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
            help="A text file, a folder of text files, a data file or folder (JSON lines, CSV, TSV, Parquet), or a "
            "data set on the Hub. Default: the held-out part of Python's standard library."
        ),
    ] = None,
    held_out: Annotated[
        bool,
        typer.Option("--held-out", help="Evaluate only the part of --text that training keeps for validation."),
    ] = False,
    split: Split = "train",
    config: DataConfig = None,
    text_column: TextColumn = "text",
    tokenizer: Annotated[
        str | None, typer.Option(help="The tokenizer of all models. Default: each model's own.")
    ] = None,
    eos_token: EndOfText = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens that a model sees at once. Default: one less than the fewest positions of a model, at most "
            "1023. A model trained on blocks of its own length has never predicted from its last position."
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens that each window after the first predicts. Fewer leave more context. Default: all."),
    ] = None,
    separate: Annotated[
        bool,
        typer.Option("--separate", help="Predict each document alone. Default: one after the other, as in training."),
    ] = False,
    bos: Annotated[
        bool, typer.Option("--bos", help="Begin with the beginning-of-text token, and predict the first token too.")
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Stop after this many tokens of text.")] = None,
    per_position: Annotated[
        bool, typer.Option("--per-position", help="Also show the perplexity by the number of tokens seen before.")
    ] = False,
    frequency_text: Annotated[
        str | None,
        typer.Option(
            help="Also show the perplexity by how often a token occurs in this text. Give it like --text, or as "
            "'training' for the part of --text that is not evaluated."
        ),
    ] = None,
    head_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens whose rows of attention are measured, spread over the text; 0 for none.")
    ] = 65536,
    prompt: Annotated[
        str | None, typer.Option(help="A text: the report shows the entropy of every head at each of its tokens.")
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER,HEAD",
            help="The head whose attention to --prompt is shown. Default: the one with the lowest entropy.",
        ),
    ] = None,
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
        Path | None, typer.Option(help="Folder with BLiMP, LAMBADA, HellaSwag or ARC, for tasks local_*.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The number of samples of each task. Default: all.")] = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens in one forward pass. They affect speed and memory, not results.")
    ] = 4096,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="The type of weights and computation.")
    ] = "float32",
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0. Default: a GPU if there is one.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples that lm-eval draws.")] = 0,
    output: Annotated[Path, typer.Option(callback=read_path, help="Folder for numbers and pictures.")] = Path(
        "evaluation_output"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another evaluation in the folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check models and text, and show what would be measured.")
    ] = False,
):
    """
    Measure models: perplexity on text, attention heads, operations, and tasks of lm-eval.

    All models read the same text in the same windows. The output folder gets results.json, in which each number has
    its conditions, and pictures of each model's heads. `entropy-gpt report` makes a page of it. If interrupted, run
    the same command again: it continues with the first model that has no result.

    Example: entropy-gpt evaluate runs/baseline/model runs/proposal/model --text my_texts --stride 64 --per-position
    """
    options = dict(locals())
    for model in models:
        check_model(model)
    for place in filter(None, (text, frequency_text, tokenizer)):
        check_place(place)
    check_head(head)
    EVALUATION.is_in(output)  # before the imports, which take seconds
    if not dry_run:
        refuse_claimed(output)
    from entropy_gpt.terminal.evaluate import run

    run(**options)
