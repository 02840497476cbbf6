"""A model of given weights, without a second copy of them."""

import copy

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from modeling_entropy_gpt.layers import LEARNED_SCALARS


def assemble(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: dict[str, torch.Tensor],
    generation_config: GenerationConfig | None,
) -> PreTrainedModel:
    """
    Makes a model whose parameters are the tensors themselves: until they are put in, it takes no memory.

    Args:
        model_class (`type`): A model of transformers or of this project.
        config (`PreTrainedConfig`): Its configuration; the dtype is set to that of the weights.
        tensors (`dict[str, torch.Tensor]`): The whole state of the model, by name.
        generation_config (`GenerationConfig`, *optional*): How it generates; copied. Else what its class makes of the
            configuration.
    """
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.config.dtype = model.dtype
    if generation_config is not None:
        model.generation_config = copy.deepcopy(generation_config)
    return model


def inference_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state of a model but for what acts in training alone, such as entropy thresholds."""
    left_out = tuple(scalar.parameter for scalar in LEARNED_SCALARS if scalar.in_training_alone)
    return {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(left_out)}
