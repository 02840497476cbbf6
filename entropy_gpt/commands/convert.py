"""`entropy-gpt convert`: a trained GPT-2 to an architecture for private inference, with the cost of each step."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Norm(StrEnum):
    layernorm = "layernorm"
    static = "static"
    none = "none"


class Schedule(StrEnum):
    none = "none"
    gate = "gate"
    staircase = "staircase"


def convert(
    source: Annotated[
        str, typer.Argument(help="A GPT-2 or EntropyGPT: a folder, a repository on the Hub, or a nanoGPT file.")
    ],
    to: Annotated[
        str, typer.Option(help="The architecture wanted, such as 'EReg(SM(t)+ScFuFFN)' or 'SM+StaticLN+G'.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the model and the report.")],
    text: Annotated[
        Path | None,
        typer.Option(help="Text like that the model was trained on: a folder or a file. Else the standard library."),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Where the tokenizer is, if not with the source.")] = None,
    final_norm: Annotated[Norm | None, typer.Option(help="The norm before the head; as it is, if not given.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="What acts in training alone, like resid_pdrop=0."),
    ] = None,
    prune_by_damage: Annotated[
        bool,
        typer.Option("--prune-by-damage", help="Prune as many FFNs as --to says, but those that are missed least."),
    ] = False,
    naive: Annotated[
        bool,
        typer.Option("--naive", help="Copy weights; fit no norm and no linear map. To see what fitting is worth."),
    ] = False,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens of a sequence (default: up to 1024).")] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Tokens that the steps are fitted to.")] = 65536,
    evaluation_tokens: Annotated[int, typer.Option(min=1, help="Tokens that the cost is measured on.")] = 16384,
    calibration: Annotated[
        Path | None, typer.Option(help="Folder where statistics are kept, to use them again for another target.")
    ] = None,
    heal_steps: Annotated[int, typer.Option(min=0, help="Steps of training after (or during) the removal.")] = 0,
    schedule: Annotated[
        Schedule,
        typer.Option(
            help="Remove all at once before healing, through gates that close together, or one by one (staircase)."
        ),
    ] = Schedule.none,
    distill: Annotated[
        bool, typer.Option("--distill", help="Heal by the original's predictions too, at equal weight.")
    ] = False,
    distill_temperature: Annotated[float, typer.Option(min=0.01, help="Softens what is distilled.")] = 1.0,
    hidden_state_weight: Annotated[
        float, typer.Option(min=0, help="Weight of the distance to the original's residual stream.")
    ] = 0.0,
    residual_scale_weight: Annotated[
        float, typer.Option(min=0, help="Weight of what keeps the residual stream's scale, for a static final norm.")
    ] = 0.0,
    learning_rate: Annotated[float, typer.Option(min=1e-9, help="Of healing; 5 % warm-up, then linear decay.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a step of healing.")] = 8,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the healing's data order.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the steps and what they change; write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier conversion in --output.")] = False,
):
    """
    Convert a trained GPT-2 to a simpler architecture, step by step.

    Each step is fitted to real text, and held against the original on text it was not fitted to, beside its naive
    version. Healing trains the result further, if asked. The folder holds the model, ready for the Hub, and
    conversion_report.md. If interrupted, the same command goes on.

    Example: entropy-gpt convert openai-community/gpt2 --to 'EReg(SM(t)+ScFuFFN)' --text my_texts --output my_model
    --heal-steps 1000 --distill
    """
    from entropy_gpt.workflows.convert import run
    from entropy_gpt.workflows.convert_inputs import Job, read_fields

    run(
        Job(
            source=source,
            notation=to,
            output=output.resolve(),
            text=text,
            tokenizer=tokenizer,
            fields=read_fields(settings or [], final_norm),
            prune_by_damage=prune_by_damage,
            naive=naive,
            context=context,
            calibration_tokens=calibration_tokens,
            evaluation_tokens=evaluation_tokens,
            calibration_folder=calibration,
            heal_steps=heal_steps,
            schedule=schedule.value,
            distill=distill,
            distill_temperature=distill_temperature,
            hidden_state_weight=hidden_state_weight,
            residual_scale_weight=residual_scale_weight,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            overwrite=overwrite,
        ),
        dry_run=dry_run,
    )
