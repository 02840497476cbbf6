"""A training run's folder: the settings of the run that owns it, and the checkpoint that it continues from."""

import json
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from entropy_gpt.conversion.errors import UserError
from modeling_entropy_gpt import EntropyGPTConfig

from . import storage
from .checkpoints import SEAL, find_damage, last_checkpoint, list_checkpoints
from .files import delete, is_finished, written_whole
from .recipe import ARGUMENT_FIELDS, Recipe
from .trainer import LEARNING_RATE_MULTIPLIERS


RUN_SETTINGS = "run.json"
MODEL, ADAPTER, CONVERTED = "model", "adapter", "converted"
# Settings that do not change the result: a run may continue with others.
WITHOUT_EFFECT = frozenset(
    {
        *("output_dir", "resume_from_checkpoint", "data_cache", "report_to", "run_name", "disable_tqdm", "log_level"),
        *("save_total_limit", "dataloader_pin_memory", "push_to_hub"),
    }
)
# Settings that the state of the optimiser holds: a run that continues from a checkpoint can't change them.
OF_THE_OPTIMIZER = (
    *("optim", "learning_rate", "weight_decay", "adam_", "freeze_embeddings"),
    *LEARNING_RATE_MULTIPLIERS.values(),
)
# Arguments that are not given have these values; fields of the configuration may have those of a model to start from.
DEFAULTS = {name: field.default for name, field in ARGUMENT_FIELDS.items() if field.default is not MISSING}
SIZES = ("notation", "final_normalization", "n_layer", "n_embd", "n_head", "n_inner", "n_positions", "vocab_size")


def check_folder(recipe: Recipe, config: EntropyGPTConfig) -> Path | None:
    """
    Refuses a folder that holds anything but an earlier part of this run, and finds the checkpoint to continue from.

    Args:
        recipe ([`Recipe`]): The settings of the run, with its folder.
        config ([`EntropyGPTConfig`]): The configuration of the model to train.

    Returns:
        `Path`: The checkpoint, or `None` if the run starts from the beginning.

    Raises:
        `UserError`: If the folder or the checkpoint can't be used.
    """
    output, given = Path(recipe.training.output_dir), recipe.training.resume_from_checkpoint
    storage.check_folder(output, "output_dir")
    if output.exists() and any(map(is_finished, output.iterdir())):
        if not (output / RUN_SETTINGS).exists():
            raise UserError(f"{output} exists and holds no training run: give another output_dir.")
        _refuse_changes(recipe, output)
    checkpoint = last_checkpoint(output)
    if checkpoint is None and given is not None:
        checkpoint = Path(given)
        if damage := find_damage(checkpoint):
            raise UserError(f"resume_from_checkpoint={given} can't be used: {damage}.")
        notes = checkpoint.parent / RUN_SETTINGS
        changed = _changes(_read_settings(notes), _settings(recipe)) if notes.exists() else {}
        if kept := [text for name, text in changed.items() if name.startswith(OF_THE_OPTIMIZER)]:
            raise UserError(
                f"{given} holds settings of the optimiser that can't change ({'; '.join(kept)}): leave them as they "
                "were, or start from its weights, with model_name_or_path."
            )
    if checkpoint is not None:
        check_architecture(checkpoint, recipe, config, *(name for name in SIZES if name != "vocab_size"))
    return checkpoint


def can_go_on(output: Path) -> bool:
    """Whether a run's folder holds something that the next attempt does not do again."""
    made = [output / MODEL, output / CONVERTED, *(checkpoint / SEAL for checkpoint in list_checkpoints(output))]
    return any(path.exists() for path in made)


def check_architecture(checkpoint: Path, recipe: Recipe, config: EntropyGPTConfig, *names: str):
    """
    Refuses a checkpoint of another model: one of other sizes, or one of adapters where all weights are trained.

    Args:
        checkpoint (`Path`): The folder of the checkpoint.
        recipe ([`Recipe`]): The settings of the run.
        config ([`EntropyGPTConfig`]): The configuration of the model to train.
        names (`str`): The fields of the configuration to compare; checkpoints of adapters have none of them.

    Raises:
        `UserError`: If something differs.
    """
    adapted = (checkpoint / "adapter_config.json").exists()
    if adapted != (recipe.lora.lora_r is not None):
        held, wanted = ("adapters", "all weights") if adapted else ("all weights", "adapters")
        raise UserError(f"{checkpoint} holds {held}, and this run trains {wanted}: give another output_dir.")
    if adapted:
        rank = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        differing = [("lora_r", rank, recipe.lora.lora_r)]
    else:
        saved = AutoConfig.from_pretrained(checkpoint)
        if not isinstance(saved, EntropyGPTConfig):
            raise UserError(
                f"{checkpoint} holds a model of type {saved.model_type!r}, not an EntropyGPT: give another checkpoint."
            )
        differing = [(name, getattr(saved, name), getattr(config, name)) for name in names]
    for name, then, now in differing:
        if then != now:
            raise UserError(
                f"{checkpoint} holds a model with {name} {then}, and this run trains one with {now}: start in another "
                "output_dir, or resume a run of the same architecture."
            )


def check_text(recipe: Recipe, text: str):
    """
    Refuses to continue a run if its text has changed.

    Args:
        recipe ([`Recipe`]): The settings of the run, with its folder.
        text (`str`): The name and the revision of the text.

    Raises:
        `UserError`: If the folder's run has another text.
    """
    path = Path(recipe.training.output_dir, RUN_SETTINGS)
    if path.exists() and (earlier := _read_settings(path).get("text")) != text:
        raise UserError(
            f"{path.parent} holds a run that was trained on {earlier}, and the text is {text} now: give another "
            "output_dir."
        )


def take_folder(recipe: Recipe, checkpoint: Path | None, text: str):
    """
    Makes the folder this run's own: writes its settings, and deletes all checkpoints later than the one to continue
    from.

    Args:
        recipe ([`Recipe`]): The settings of the run, with its folder.
        checkpoint (`Path`, *optional*): The checkpoint to continue from.
        text (`str`): The name and the revision of the text.
    """
    output = Path(recipe.training.output_dir)
    with written_whole(output / RUN_SETTINGS) as path:
        path.write_text(json.dumps({**_settings(recipe), "text": text}, indent=1) + "\n", encoding="utf-8")
    for other in list_checkpoints(output):
        if checkpoint is None or other.name == checkpoint.name:
            break
        delete(other)


def _settings(recipe: Recipe) -> dict[str, Any]:
    return {**recipe.settings, "processes": recipe.training.world_size}


def _refuse_changes(recipe: Recipe, output: Path):
    earlier = _read_settings(output / RUN_SETTINGS)
    earlier.pop("text", None)
    if changed := _changes(earlier, _settings(recipe)):
        raise UserError(
            f"{output} holds a run with other settings ({'; '.join(changed.values())}): give another output_dir, and "
            f"add resume_from_checkpoint={output}/checkpoint-STEP to continue from there."
        )


def _changes(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """The settings that differ, by name, each described in words."""
    earlier, now = {**DEFAULTS, **earlier}, {**DEFAULTS, **now}
    names = sorted((earlier.keys() | now.keys()) - WITHOUT_EFFECT)
    return {
        name: f"{name} {earlier.get(name)} then, {now.get(name)} now"
        for name in names
        if earlier.get(name) != now.get(name)
    }


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete the folder, or give another output_dir.") from error
