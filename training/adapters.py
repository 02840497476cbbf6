"""Low-rank adapters (LoRA, by PEFT) in place of training all weights, and their merge into them."""

import difflib

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from modeling_entropy_gpt import (
    EntropyGPTForCausalLM,
    EntropyGPTForQuestionAnswering,
    EntropyGPTForSequenceClassification,
    EntropyGPTForTokenClassification,
    EntropyGPTModel,
    EntropyGPTPreTrainedModel,
)
from modeling_entropy_gpt.layers import LEARNED_SCALARS, EntropyGPTNormalizedConv1D

from .arguments import LoraArguments


ALL_LINEAR = "all-linear"
TASK_TYPES = {
    EntropyGPTForCausalLM: TaskType.CAUSAL_LM,
    EntropyGPTForSequenceClassification: TaskType.SEQ_CLS,
    EntropyGPTForTokenClassification: TaskType.TOKEN_CLS,
    EntropyGPTForQuestionAnswering: TaskType.QUESTION_ANS,
    EntropyGPTModel: TaskType.FEATURE_EXTRACTION,
}


def attach_lora(
    model: EntropyGPTPreTrainedModel, arguments: LoraArguments, base_model: str | None = None
) -> PeftModel:
    """
    Freezes a model but for low-rank adapters on linear maps of its blocks, and, as the flags say, its temperatures,
    entropy thresholds and shifts of attention scores where the architecture has them. The head of a classifier is
    trained too, as PEFT does. An adapter of normalised weights is added to them before they are normalised, so that it
    can be merged.

    Args:
        model ([`EntropyGPTPreTrainedModel`]): A model with any head; it is changed.
        arguments ([`LoraArguments`]): What is adapted and trained.
        base_model (`str`, *optional*): The folder or repository of the model, from which PEFT's `AutoPeftModel` loads
            it before the adapter.

    Returns:
        `PeftModel`: Trains, saves and loads as every model of PEFT.

    Raises:
        `ValueError`: If the rank is below 1, a target is no linear map of the blocks, or there is dropout before
            adapters of normalised weights.
    """
    if arguments.lora_r is None or arguments.lora_r < 1:
        raise ValueError(f"lora_r={arguments.lora_r} is no rank of an adapter: give 1 or more, such as 8.")
    trained_beside = [
        scalar.module
        for scalar in LEARNED_SCALARS
        if scalar.adapter_switch and getattr(arguments, scalar.adapter_switch) and scalar.is_in(model.config)
    ]
    configuration = LoraConfig(
        task_type=TASK_TYPES[type(model)],
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        **_find_targets(model, arguments),
        modules_to_save=trained_beside or None,
    )
    adapted = get_peft_model(model, configuration)
    if base_model is not None:  # PEFT has put the model's own note of it there
        adapted.active_peft_config.base_model_name_or_path = base_model
    return adapted


def merge_adapter(model: PeftModel) -> EntropyGPTPreTrainedModel:
    """
    The plain model that an adapted one amounts to, adapters added to its weights; all of it can be trained again.

    Args:
        model (`PeftModel`): Result of [`attach_lora`], or loaded by PEFT; it can't be used any more.

    Raises:
        `ValueError`: If an adapter is not finite.
    """
    return model.merge_and_unload(safe_merge=True).requires_grad_(True)


def _find_targets(model: EntropyGPTPreTrainedModel, arguments: LoraArguments) -> dict:
    """What PEFT takes to adapt the targets, all of which are there: their modules, or if need be their parameters."""
    maps = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Conv1D | EntropyGPTNormalizedConv1D)
    }
    names = sorted({".".join(name.split(".")[-2:]) for name in maps})
    targets = arguments.lora_target_modules
    if not targets:
        raise ValueError(f"lora_target_modules is empty: give some of {', '.join(names)}, or {ALL_LINEAR}.")
    if ALL_LINEAR in targets:
        targets = sorted({name.rpartition(".")[2] for name in maps})
    adapted: list[nn.Module] = []
    for target in targets:
        found = [module for name, module in maps.items() if f".{name}".endswith(f".{target}")]
        if not found:
            short = {name.rpartition(".")[2] for name in names}
            nearest = difflib.get_close_matches(target, [*names, *short, ALL_LINEAR], n=1, cutoff=0.0)[0]
            raise ValueError(
                f"lora_target_modules: {target!r} is no linear map of this model's blocks; the nearest is "
                f"{nearest!r}. There are {', '.join(names)} (without what is before the dot: all of that name), or "
                f"{ALL_LINEAR}."
            )
        adapted += found
    if not any(isinstance(module, EntropyGPTNormalizedConv1D) for module in adapted):
        return {"target_modules": targets, "fan_in_fan_out": True}  # as Conv1D keeps its weights
    if arguments.lora_dropout:
        raise ValueError(
            f"lora_dropout={arguments.lora_dropout} can't be had with adapters of normalised weights (there is "
            f"weight_normalization={model.config.weight_normalization!r} among {', '.join(targets)}), since they are "
            "added to the weights rather than to what these yield: set lora_dropout=0, or adapt other maps."
        )
    return {"target_modules": [], "target_parameters": [f"{target}.weight" for target in targets]}
