"""What a training run works on: folder, architecture and model, refused before any work where they can't be had."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, set_seed

from conversion.gpt2_checkpoint import load_language_model
from conversion.simplification import TRAINING_FIELDS, plan_conversion, set_training_fields, target_config
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM
from training.adapters import attach_lora
from training.checkpoints import find_damage, last_checkpoint
from training.files import written_whole
from training.recipe import Recipe

from .errors import CommandError


RUN_SETTINGS = "run.json"
MODEL, ADAPTER = "model", "adapter"
# Settings that change nothing about what comes out, so that a run may go on with others.
WITHOUT_EFFECT = frozenset(
    {
        *("output_dir", "resume_from_checkpoint", "data_cache", "report_to", "run_name", "disable_tqdm", "log_level"),
        *("save_steps", "save_total_limit", "dataloader_num_workers", "dataloader_pin_memory", "push_to_hub"),
    }
)


@dataclass(frozen=True)
class Start:
    """
    What a run starts from.

    Args:
        source ([`EntropyGPTForCausalLM`], *optional*): A trained model.
        config ([`EntropyGPTConfig`]): Of the model to train, but for the vocabulary of a tokenizer to be trained.
        context (`int`): Tokens of a sequence.
    """

    source: EntropyGPTForCausalLM | None
    config: EntropyGPTConfig
    context: int

    @property
    def converts(self) -> bool:
        """Whether the source is of another architecture."""
        if self.source is None:
            return False
        plan = plan_conversion(self.source.config, self.config)
        return bool(plan.simplifications or plan.finish)


def find_start(recipe: Recipe) -> Start:
    """
    The architecture that a recipe asks for.

    Raises:
        `CommandError`: If it can't be had, or the model to start from can't be read.
    """
    try:
        if recipe.model.model_name_or_path is None:
            source, config = None, _config_from_scratch(recipe)
        else:
            source = load_language_model(recipe.model.model_name_or_path).float()
            config = _config_of_source(source.config, recipe)
            plan_conversion(source.config, config)
        if recipe.lora.lora_r is not None:
            with torch.device("meta"):
                attach_lora(EntropyGPTForCausalLM(config), recipe.lora)
    except StrictDataclassError as error:
        raise CommandError(f"{recipe.name}: {error.__cause__ or error}") from error
    except ValueError as error:
        raise CommandError(f"{recipe.name}: {error}") from error
    start = Start(source, config, recipe.data.context or config.n_positions)
    _check_settings(recipe, start)
    return start


def fit_vocabulary(config: EntropyGPTConfig, recipe: Recipe, tokenizer) -> EntropyGPTConfig:
    """
    The configuration with the tokenizer's special tokens, and, where nothing says how large it is, its vocabulary.

    Raises:
        `CommandError`: If the tokenizer has more tokens than the model.
    """
    from_scratch = recipe.model.model_name_or_path is None
    if from_scratch and "vocab_size" not in recipe.config_fields:
        config.vocab_size = len(tokenizer)
    if len(tokenizer) > config.vocab_size:
        raise CommandError(
            f"The tokenizer has {len(tokenizer):,} tokens, and the model vocab_size={config.vocab_size:,}: "
            + ("raise it, or leave it out." if from_scratch else "take the model's own tokenizer.")
        )
    if from_scratch:
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return config


def check_output(recipe: Recipe, start: Start) -> Path | None:
    """
    Refuses a folder that holds something else than an earlier part of this run, and finds where to go on from.

    Returns:
        `Path`: The checkpoint to go on from, or `None`.

    Raises:
        `CommandError`: If the folder or the checkpoint can't be used.
    """
    output = Path(recipe.training.output_dir)
    given = recipe.training.resume_from_checkpoint
    remedy = "give another output_dir=FOLDER, or delete it"
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and given is None:
        if not (output / RUN_SETTINGS).exists():
            raise CommandError(f"{output} is there already and holds no training run: {remedy}.")
        changed = _changes(_read_settings(output / RUN_SETTINGS), recipe.settings)
        if changed:
            raise CommandError(
                f"{output} holds a run with other settings ({'; '.join(changed)}): {remedy}; or go on under the new "
                f"settings all the same, with resume_from_checkpoint={output}/checkpoint-STEP."
            )
    checkpoint = last_checkpoint(output) if given is None else Path(given)
    if given is not None and (damage := find_damage(checkpoint)):
        raise CommandError(f"resume_from_checkpoint={given} can't be used: {damage}.")
    if checkpoint is not None:
        _check_architecture(checkpoint, start.config)
    return checkpoint


def write_settings(recipe: Recipe):
    """Leaves what the run was told in its folder."""
    with written_whole(Path(recipe.training.output_dir, RUN_SETTINGS)) as path:
        path.write_text(json.dumps(recipe.settings, indent=1) + "\n", encoding="utf-8")


def make_model(start: Start, seed: int) -> EntropyGPTForCausalLM:
    """The model with its first weights: new ones, or those of a source of the same architecture."""
    if start.source is not None:
        return set_training_fields(start.source, start.config)
    set_seed(seed)
    return EntropyGPTForCausalLM(start.config)


def _check_settings(recipe: Recipe, start: Start):
    training = recipe.training
    if start.context > start.config.n_positions:
        raise CommandError(f"context={start.context}: the model has n_positions={start.config.n_positions}. Lower it.")
    if recipe.data.streaming and start.converts:
        raise CommandError("streaming=true gives a conversion nothing to be fitted to: convert first, without it.")
    if recipe.data.streaming and training.max_steps < 1:
        raise CommandError("streaming=true has no last document that would end the run: set max_steps.")
    if training.on_divergence == "rollback" and training.lr_scheduler_type == "reduce_lr_on_plateau":
        raise CommandError(
            "on_divergence=rollback slows the learning rate down, which lr_scheduler_type=reduce_lr_on_plateau does "
            "itself: take another one, or on_divergence=stop."
        )


def _config_from_scratch(recipe: Recipe) -> EntropyGPTConfig:
    fields = {"bos_token_id": None, "eos_token_id": None, **recipe.config_fields}
    if recipe.data.context is not None:
        fields = {"n_positions": recipe.data.context, **fields}
    if recipe.model.notation is None:
        return EntropyGPTConfig(**fields)
    return EntropyGPTConfig.from_notation(recipe.model.notation, **fields)


def _config_of_source(config: EntropyGPTConfig, recipe: Recipe) -> EntropyGPTConfig:
    allowed = {*TRAINING_FIELDS, "final_normalization"}
    if foreign := sorted(recipe.config_fields.keys() - allowed):
        raise CommandError(
            f"{foreign[0]}={recipe.config_fields[foreign[0]]} can't be set beside model_name_or_path: sizes are those "
            f"of the model, and its architecture is told by notation. These can: {', '.join(sorted(allowed))}."
        )
    fields = {"final_normalization": config.final_normalization, **recipe.config_fields}
    return target_config(config, recipe.model.notation or config.notation, **fields)


def _changes(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = sorted((earlier.keys() | now.keys()) - WITHOUT_EFFECT)
    return [
        f"{name} {earlier.get(name)} then, {now.get(name)} now" for name in names if earlier.get(name) != now.get(name)
    ]


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CommandError(f"{path} is damaged ({error}): delete the folder, or give another output_dir.") from error


def _check_architecture(checkpoint: Path, config: EntropyGPTConfig):
    """A checkpoint is of the same architecture and sizes; one of adapters tells neither."""
    if not (checkpoint / "config.json").exists():
        return
    saved = AutoConfig.from_pretrained(checkpoint)
    if not isinstance(saved, EntropyGPTConfig):
        raise CommandError(f"{checkpoint} holds a model of another family ({saved.model_type}).")
    names = ["notation", "final_normalization", "n_layer", "n_embd", "n_head", "n_inner", "n_positions"]
    for name in names:
        if (then := getattr(saved, name)) != (now := getattr(config, name)):
            raise CommandError(
                f"{checkpoint} holds a model with {name} {then}, and this run is to train one with {now}: start in "
                "another output_dir, or resume a run of the same architecture."
            )
