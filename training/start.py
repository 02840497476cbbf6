"""What a training run starts from: architecture and model, refused before any work where they can't be had."""

import copy
import math
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import set_seed

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.conversion.simplification import TRAINING_FIELDS, plan_conversion, set_training_fields, target_config
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .adapters import attach_lora
from .recipe import Recipe
from .tokenizer import load_tokenizer


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
        `UserError`: If it can't be had, or the model to start from can't be read.
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
        raise UserError(f"{recipe.name}: {error.__cause__ or error}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{recipe.name}: {error}") from error
    start = Start(source, config, recipe.data.context or config.n_positions)
    _check_settings(recipe, start)
    return start


def fit_vocabulary(config: EntropyGPTConfig, recipe: Recipe, tokenizer) -> EntropyGPTConfig:
    """
    The configuration with the tokenizer's special tokens, and, where nothing says how large it is, its vocabulary.

    Raises:
        `UserError`: If the tokenizer has more tokens than the model.
    """
    from_scratch = recipe.model.model_name_or_path is None
    if from_scratch and "vocab_size" not in recipe.config_fields:
        config.vocab_size = len(tokenizer)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"The tokenizer has {len(tokenizer):,} tokens, and the model vocab_size={config.vocab_size:,}: "
            + ("raise it, or leave it out." if from_scratch else "take the model's own tokenizer.")
        )
    if from_scratch:
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return config


def make_model(start: Start, seed: int) -> EntropyGPTForCausalLM:
    """The model with its first weights: new ones, or those of a source of the same architecture."""
    if start.source is not None:
        return set_training_fields(start.source, start.config)
    set_seed(seed)
    return EntropyGPTForCausalLM(start.config)


def _check_settings(recipe: Recipe, start: Start):
    training = recipe.training
    if start.context > start.config.n_positions:
        raise UserError(f"context={start.context}: the model has n_positions={start.config.n_positions}. Lower it.")
    if recipe.data.streaming and start.converts:
        raise UserError("streaming=true gives a conversion nothing to be fitted to: convert first, without it.")
    if recipe.data.streaming and training.max_steps < 1:
        raise UserError("streaming=true has no last document that would end the run: set max_steps.")
    if training.on_divergence == "rollback" and training.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise UserError(
            f"on_divergence=rollback slows the learning rate down, which lr_scheduler_type="
            f"{training.lr_scheduler_type.value} does itself: take another one, or on_divergence=stop."
        )
    if training.save_only_model:
        raise UserError("save_only_model=true leaves checkpoints that no run can go on from: leave it out.")
    _check_vocabulary(recipe, start.config)


def _check_vocabulary(recipe: Recipe, config: EntropyGPTConfig):
    """As far as it is known before the text is read."""
    place = recipe.data.tokenizer or recipe.model.model_name_or_path
    if place is not None:
        fit_vocabulary(copy.deepcopy(config), recipe, load_tokenizer(place))
    elif recipe.data.tokenizer_vocab_size > (size := recipe.config_fields.get("vocab_size", math.inf)):
        raise UserError(
            f"tokenizer_vocab_size={recipe.data.tokenizer_vocab_size} is more than vocab_size={size}: lower the one, "
            "or leave out the other."
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
        raise UserError(
            f"{foreign[0]}={recipe.config_fields[foreign[0]]} can't be set with model_name_or_path: sizes are those "
            f"of the model, and notation sets its architecture. These can: {', '.join(sorted(allowed))}."
        )
    fields = {"final_normalization": config.final_normalization, **recipe.config_fields}
    return target_config(config, recipe.model.notation or config.notation, **fields)
