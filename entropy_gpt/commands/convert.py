"""Options of `entropy-gpt convert`, which simplifies a trained GPT-2 and measures the cost of each step."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from entropy_gpt.conversion.early_checks import check_model, check_notation, check_place
from entropy_gpt.training.claims import refuse_claimed
from entropy_gpt.workflows.output_folder import CONVERSION

from .paths import read_path
from .text_options import DataConfig, EndOfText, Split, TextColumn


def convert(
    source: Annotated[
        str, typer.Argument(help="A GPT-2 or EntropyGPT: a folder, a repository on the Hub, or a nanoGPT file.")
    ],
    to: Annotated[
        str, typer.Option(help="The target architecture, such as 'EReg(SM(t)+ScFuFFN)' or 'SM+StaticLN+G'.")
    ],
    output: Annotated[Path, typer.Option(callback=read_path, help="Folder for the model and the report.")],
    text: Annotated[
        str | None,
        typer.Option(
            help="Text similar to the model's training text: a text file, a folder of text files, a data file or "
            "folder (JSON lines, CSV, TSV, Parquet), or a data set on the Hub. Default: Python's standard library."
        ),
    ] = None,
    split: Split = "train",
    config: DataConfig = None,
    text_column: TextColumn = "text",
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or repository of the tokenizer. Default: the source.")
    ] = None,
    eos_token: EndOfText = None,
    activation: Annotated[
        Literal["gelu", "gelu_new"] | None,
        typer.Option(
            help="The activation of a nanoGPT file: gelu (default), or gelu_new, which nanoGPT used before June 2023."
        ),
    ] = None,
    final_norm: Annotated[
        Literal["layernorm", "static", "none"] | None,
        typer.Option(help="The norm before the head (default: that of the source)."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="A field that acts only in training, such as resid_pdrop=0."
        ),
    ] = None,
    prune_by_damage: Annotated[
        bool,
        typer.Option(
            "--prune-by-damage", help="Prune as many FFNs as --to says, but those whose removal does the least damage."
        ),
    ] = False,
    naive: Annotated[
        bool,
        typer.Option("--naive", help="Copy weights and fit nothing, to measure what fitting gains."),
    ] = False,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a sequence (default: the model's positions, up to 1024).")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Tokens that the steps are fitted to.")] = 65536,
    evaluation_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that each step and the result are measured on.")
    ] = 16384,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the statistics, so that another conversion can use them again."),
    ] = None,
    heal_steps: Annotated[
        int, typer.Option(min=0, help="Training steps after the removal, or during it with --schedule.")
    ] = 0,
    schedule: Annotated[
        Literal["none", "gate", "staircase"],
        typer.Option(
            help="When healing removes: before its first step (none), gradually and everywhere at once (gate), or one "
            "part after another (staircase)."
        ),
    ] = "none",
    distill: Annotated[
        bool, typer.Option("--distill", help="Learn from the original's predictions too, at equal weight.")
    ] = False,
    distill_temperature: Annotated[
        float, typer.Option(min=0.01, help="Temperature of the predictions that --distill learns from.")
    ] = 1.0,
    hidden_state_weight: Annotated[
        float, typer.Option(min=0, help="Weight of the distance to the original's residual stream.")
    ] = 0.0,
    residual_scale_weight: Annotated[
        float,
        typer.Option(
            min=0,
            help="Weight of the loss that holds the residual stream's scale, for a static or missing final norm.",
        ),
    ] = 0.0,
    freeze_embeddings: Annotated[
        bool,
        typer.Option(
            "--freeze-embeddings",
            help="Healing leaves the embeddings as they are, and with them a head that is tied to them: so they stay "
            "public (private serve --embedding public). Needs --heal-steps.",
        ),
    ] = False,
    learning_rate: Annotated[
        float, typer.Option(min=1e-9, help="Peak learning rate of healing: 5 % warm-up, then linear decay.")
    ] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a healing step.")] = 8,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the order of the healing text.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the steps and what they change; write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier conversion in --output.")] = False,
):
    """
    Convert a trained GPT-2 to a simpler architecture, step by step.

    Each step is fitted to text and measured against the original on other text, next to its naive version. With
    --heal-steps, the result is trained further. The folder holds the model, ready for the Hub, and
    conversion_report.md. After an interruption, the same command continues.

    Example: entropy-gpt convert openai-community/gpt2 --to 'EReg(SM(t)+ScFuFFN)' --text my_texts --output my_model
    --heal-steps 1000 --distill
    """
    options = dict(locals())
    check_model(source)
    check_notation(to)
    for place in filter(None, (text, tokenizer)):
        check_place(place)
    output = output.resolve()
    CONVERSION.is_replaced_in(output, overwrite)  # before the imports, which take seconds
    if not dry_run:
        refuse_claimed(CONVERSION.work(output), output)
    from entropy_gpt.terminal.convert import run

    run(**options | {"output": output})
