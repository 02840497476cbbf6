"""The start of a training run: its architecture and its first weights, checked before any work."""

import copy
import math
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerFast, set_seed

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.conversion.planning import plan_conversion, target_config
from entropy_gpt.conversion.simplification import TRAINING_FIELDS, set_training_fields
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .adapters import attach_lora
from .recipe import Recipe
from .tokenizer import fits, load_tokenizer


@dataclass(frozen=True)
class Start:
    """
    The start of a run.

    Args:
        source ([`EntropyGPTForCausalLM`], *optional*): A trained model to start from, in float32.
        config ([`EntropyGPTConfig`]):
            The configuration of the model to train. [`fit_vocabulary`] completes it once the tokenizer is known.
        context (`int`): Tokens of a sequence.
    """

    source: EntropyGPTForCausalLM | None
    config: EntropyGPTConfig
    context: int

    @property
    def converts(self) -> bool:
        """Whether the source has another architecture, and is converted first."""
        if self.source is None:
            return False
        plan = plan_conversion(self.source.config, self.config)
        return bool(plan.simplifications or plan.finish)


def find_start(recipe: Recipe) -> Start:
    """
    Finds the architecture that a recipe asks for, and loads the model to start from.

    Raises:
        `UserError`: If there is no such architecture, the model can't be loaded, or settings contradict each other.
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


def fit_vocabulary(config: EntropyGPTConfig, recipe: Recipe, tokenizer: PreTrainedTokenizerFast):
    """
    Completes the configuration of a new model with the tokenizer's special tokens and, unless the recipe sets
    `vocab_size`, with the size of its vocabulary.

    Args:
        config ([`EntropyGPTConfig`]): The configuration; it is changed.
        recipe ([`Recipe`]): The settings.
        tokenizer (`PreTrainedTokenizerFast`): The tokenizer.

    Raises:
        `UserError`: If the tokenizer has more tokens than the model.
    """
    from_scratch = recipe.model.model_name_or_path is None
    if from_scratch and "vocab_size" not in recipe.config_fields:
        config.vocab_size = len(tokenizer)
    if not fits(tokenizer, config.vocab_size):
        raise UserError(
            f"The tokenizer has {len(tokenizer):,} tokens, more than the model's vocab_size={config.vocab_size:,}: "
            + ("raise vocab_size, or leave it out." if from_scratch else "use the model's own tokenizer.")
        )
    if from_scratch:
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id


def make_model(start: Start, seed: int) -> EntropyGPTForCausalLM:
    """The model before its first step: with new weights, or with those of a source of the same architecture."""
    if start.source is not None:
        return set_training_fields(start.source, start.config)
    set_seed(seed)
    return EntropyGPTForCausalLM(start.config)


def _check_settings(recipe: Recipe, start: Start):
    training = recipe.training
    if start.context > start.config.n_positions:
        raise UserError(f"context={start.context}: the model has n_positions={start.config.n_positions}. Lower it.")
    if recipe.data.streaming and start.converts:
        raise UserError(
            "streaming=true leaves no text to fit the conversion to: convert the model first, without streaming."
        )
    if recipe.data.streaming and training.max_steps < 1:
        raise UserError("streaming=true needs max_steps, because the length of a stream is not known: set max_steps.")
    if training.on_divergence == "rollback" and training.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise UserError(
            f"on_divergence=rollback and lr_scheduler_type={training.lr_scheduler_type.value} would both lower the "
            "learning rate: choose another lr_scheduler_type, or on_divergence=stop."
        )
    if training.freeze_embeddings and start.source is None:
        raise UserError("freeze_embeddings=true keeps embeddings that are trained: name a model_name_or_path.")
    if training.save_only_model:
        raise UserError("save_only_model=true saves checkpoints that no run can continue from: leave it out.")
    _check_vocabulary(recipe, start.config)


def _check_vocabulary(recipe: Recipe, config: EntropyGPTConfig):
    """Checks the vocabulary as far as it is known before the text is read."""
    place = recipe.data.tokenizer or recipe.model.model_name_or_path
    if place is not None:
        fit_vocabulary(copy.deepcopy(config), recipe, load_tokenizer(place, recipe.data.eos_token))
    elif recipe.data.tokenizer_vocab_size > (size := recipe.config_fields.get("vocab_size", math.inf)):
        raise UserError(
            f"tokenizer_vocab_size={recipe.data.tokenizer_vocab_size} is more than vocab_size={size}: lower "
            "tokenizer_vocab_size, or leave out vocab_size."
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
            f"{foreign[0]}={recipe.config_fields[foreign[0]]} can't be set together with model_name_or_path: sizes "
            "come from the model, and its architecture from notation. Fields that can be set are "
            f"{', '.join(sorted(allowed))}."
        )
    fields = {"final_normalization": config.final_normalization, **recipe.config_fields}
    return target_config(config, recipe.model.notation or config.notation, **fields)
