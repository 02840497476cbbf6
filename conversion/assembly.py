"""A model of given weights, without a second copy of them."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel


def assemble(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: dict[str, torch.Tensor]
) -> PreTrainedModel:
    """
    Makes a model whose parameters are the tensors themselves: until they are put in, it takes no memory.

    Args:
        model_class (`type`): A model of transformers or of this project.
        config (`PreTrainedConfig`): Its configuration; the dtype is set to that of the weights.
        tensors (`dict[str, torch.Tensor]`): The whole state of the model, by name.
    """
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.config.dtype = model.dtype
    return model
