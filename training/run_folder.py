"""A training run's folder: whose it is, the settings of its run, and where that continues from."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from entropy_gpt.conversion.errors import UserError
from modeling_entropy_gpt import EntropyGPTConfig

from .checkpoints import find_damage, last_checkpoint, list_checkpoints
from .files import delete, is_finished, written_whole
from .recipe import Recipe
from .trainer import LEARNING_RATE_MULTIPLIERS


RUN_SETTINGS = "run.json"
MODEL, ADAPTER = "model", "adapter"
# Settings that change nothing about what comes out, so that a run may go on with others.
WITHOUT_EFFECT = frozenset(
    {
        *("output_dir", "resume_from_checkpoint", "data_cache", "report_to", "run_name", "disable_tqdm", "log_level"),
        *("save_total_limit", "dataloader_pin_memory", "push_to_hub"),
    }
)
# Settings that lie in the states of optimiser and schedule, and can't be changed by going on from these.
OF_THE_OPTIMIZER = ("optim", "learning_rate", "weight_decay", "adam_", *LEARNING_RATE_MULTIPLIERS.values())
SIZES = ("notation", "final_normalization", "n_layer", "n_embd", "n_head", "n_inner", "n_positions", "vocab_size")


def check_folder(recipe: Recipe, config: EntropyGPTConfig) -> Path | None:
    """
    Refuses a folder that holds something else than an earlier part of this run, and finds where to go on from.

    Returns:
        `Path`: The checkpoint to go on from, or `None`.

    Raises:
        `UserError`: If the folder or the checkpoint can't be used.
    """
    output, given = Path(recipe.training.output_dir), recipe.training.resume_from_checkpoint
    if output.exists() and (not output.is_dir() or any(map(is_finished, output.iterdir()))):
        if not (output / RUN_SETTINGS).exists():
            raise UserError(f"{output} is there already and holds no training run: give another output_dir.")
        _refuse_changes(recipe, output)
    checkpoint = last_checkpoint(output)
    if checkpoint is None and given is not None:
        checkpoint = Path(given)
        if damage := find_damage(checkpoint):
            raise UserError(f"resume_from_checkpoint={given} can't be used: {damage}.")
        told = checkpoint.parent / RUN_SETTINGS
        changed = _changes(_read_settings(told), _settings(recipe)) if told.exists() else {}
        if kept := [text for name, text in changed.items() if name.startswith(OF_THE_OPTIMIZER)]:
            raise UserError(
                f"{given} keeps its optimiser's settings ({'; '.join(kept)}): leave these as they were, or start "
                "from its weights, with model_name_or_path."
            )
    if checkpoint is not None:
        check_architecture(checkpoint, recipe, config, *(name for name in SIZES if name != "vocab_size"))
    return checkpoint


def check_architecture(checkpoint: Path, recipe: Recipe, config: EntropyGPTConfig, *names: str):
    """
    Refuses to go on from a checkpoint of other sizes, or from one of adapters without them, or the other way round.

    Args:
        checkpoint (`Path`): Its folder.
        recipe ([`Recipe`]): The run's settings.
        config ([`EntropyGPTConfig`]): Of the model to train.
        names (`str`): What is compared; a checkpoint of adapters holds none of it.
    """
    adapted = (checkpoint / "adapter_config.json").exists()
    if adapted != (recipe.lora.lora_r is not None):
        held, wanted = ("adapters", "all weights") if adapted else ("all weights", "adapters")
        raise UserError(f"{checkpoint} holds {held}, and this run is to train {wanted}: give another output_dir.")
    if adapted:
        rank = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        differing = [("lora_r", rank, recipe.lora.lora_r)]
    else:
        saved = AutoConfig.from_pretrained(checkpoint)
        if not isinstance(saved, EntropyGPTConfig):
            raise UserError(f"{checkpoint} holds a model of another family ({saved.model_type}).")
        differing = [(name, getattr(saved, name), getattr(config, name)) for name in names]
    for name, then, now in differing:
        if then != now:
            raise UserError(
                f"{checkpoint} holds a model with {name} {then}, and this run is to train one with {now}: start in "
                "another output_dir, or resume a run of the same architecture."
            )


def check_text(recipe: Recipe, text: str):
    """
    Refuses to go on with a run on other text than before.

    Raises:
        `UserError`: If the text changed.
    """
    path = Path(recipe.training.output_dir, RUN_SETTINGS)
    if path.exists() and (earlier := _read_settings(path).get("text")) != text:
        raise UserError(
            f"{path.parent} holds a run that was trained on {earlier}, which is {text} now: give another output_dir."
        )


def take_folder(recipe: Recipe, checkpoint: Path | None, text: str):
    """Leaves in the folder the run's settings, with the text, and no checkpoint after the one it continues from."""
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
            f"{output} holds a run with other settings ({'; '.join(changed.values())}): give another output_dir, with "
            f"resume_from_checkpoint={output}/checkpoint-STEP to go on from there."
        )


def _changes(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """What differs, by name, in words."""
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
