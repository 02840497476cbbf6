"""Gradients of single sequences by Opacus, for differentially private training, of layers that it does not know."""

import torch
from opacus.grad_sample import GradSampleModule
from torch import nn
from torch.func import functional_call, grad, vmap


# By name: the classes of code that came along with a model are others than this project's.
LAYERS = ("EntropyGPTResidualScaling", "EntropyGPTStaticLayerNorm", "EntropyGPTNormalizedConv1D")


def register_grad_samplers(model: nn.Module):
    """
    Tells Opacus how to get the gradients of single sequences of layers with several inputs or with buffers; it gets
    those of all other layers by itself. Where layers have buffers, as `StaticLN` and `SN` do, wrap the model as
    `GradSampleModule(model, strict=False)` also for `PrivacyEngine.make_private`, which wraps strictly what it wraps
    itself, and refuses such layers.

    Opacus looks for the batch in what each layer reads, so give `position_ids` of shape `(batch, length)`, as for
    GPT-2. It has none for entropy thresholds, which read nothing: freeze them.

    Args:
        model (`nn.Module`): An EntropyGPT of any head, before `GradSampleModule` or `PrivacyEngine` wraps it.
    """
    for module in model.modules():
        if type(module).__name__ in LAYERS:
            GradSampleModule.GRAD_SAMPLERS[type(module)] = _sample_gradients


class _WithoutHooks(nn.Module):
    """Runs a layer past its hooks, through which Opacus would take this for a pass of its own."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.layer.forward(*inputs)


def _sample_gradients(
    layer: nn.Module, inputs: list[torch.Tensor], output_gradients: torch.Tensor
) -> dict[nn.Parameter, torch.Tensor]:
    """The gradients of a layer's parameters for each row of its inputs, `(batch, ...)`."""
    bare = _WithoutHooks(layer)
    parameters = {name: parameter for name, parameter in bare.named_parameters() if parameter.requires_grad}

    def weigh(values, output_gradient, *rows):
        output = functional_call(bare, values, tuple(row[None] for row in rows))
        return (output * output_gradient[None]).sum()

    values = {name: parameter.detach() for name, parameter in parameters.items()}
    in_dims = (None, 0, *[0] * len(inputs))
    gradients = vmap(grad(weigh), in_dims=in_dims)(values, output_gradients, *inputs)
    return {parameter: gradients[name] for name, parameter in parameters.items()}
