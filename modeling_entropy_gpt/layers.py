# SPDX-License-Identifier: Apache-2.0
"""The building blocks in which an EntropyGPT may differ from GPT-2: norms, activations, linear maps and scalars."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D


POWER_ITERATIONS_AT_INIT = 20
# One function, up to rounding. transformers computes all but the last in up to eight passes, torch's kernel in one.
TANH_GELUS = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class LearnedScalar:
    """
    A kind of numbers that blocks learn one by one, in contrast to matrices. Initial values, optimiser, adapters, logs,
    pictures and conversion go by this list; the block alone knows what the number does.

    Args:
        name (`str`): What logs call it.
        place (`str`): Where a block has it.
        title (`str`): What pictures call it.
        setting (`str`): The field or property of the configuration that brings it.
        values (`tuple`): The values of this field with which it is there.
        start (`str`, *optional*): The field of the configuration with its initial value.
        neutral (`float`, *optional*): The value at which a block computes what it does without it.
        by_head (`bool`): Whether there is one for each head, or several, whose mean is logged (of logarithms).
        is_logarithm (`bool`): Whether the parameter is the logarithm of the number.
        in_training_alone (`bool`): Whether only the loss of training reads it.
        lr_multiplier (`str`, *optional*): The training argument that multiplies its learning rate.
        adapter_switch (`str`, *optional*): The argument of adapters with which it is trained with them.
    """

    name: str
    place: str
    title: str
    setting: str
    values: tuple
    start: str | None = None
    neutral: float | None = None
    by_head: bool = False
    is_logarithm: bool = False
    in_training_alone: bool = False
    lr_multiplier: str | None = None
    adapter_switch: str | None = None

    @property
    def parameter(self) -> str:
        """The parameter's own name."""
        return self.place.rpartition(".")[2]

    @property
    def module(self) -> str:
        """The name of the module that holds it."""
        return self.place.split(".")[-2]

    def is_in(self, config) -> bool:
        """Whether a model of this configuration has it."""
        return getattr(config, self.setting) in self.values

    def get(self, block: nn.Module) -> nn.Parameter | None:
        """The parameter of a block; `None` if the block has none."""
        found = block
        for name in self.place.split("."):
            found = getattr(found, name, None)
        return found if isinstance(found, torch.Tensor) else None  # other leaky ReLUs have a plain number


LEARNED_SCALARS = (
    LearnedScalar(
        *("thresholds", "attn.threshold.entropy_threshold", "threshold", "entropy_regularization", (True,)),
        start="entropy_threshold_init",
        by_head=True,
        in_training_alone=True,
        lr_multiplier="threshold_lr_multiplier",
        adapter_switch="train_thresholds",
    ),
    LearnedScalar(
        *("alpha", "residual_scaling.ffn_alpha", "alpha", "ffn_residual_scaling", (True,)),
        start="ffn_alpha_init",
        neutral=1.0,
        lr_multiplier="residual_scale_lr_multiplier",
    ),
    LearnedScalar(
        *("beta", "residual_scaling.ffn_beta", "beta", "ffn_residual_scaling", (True,)),
        start="ffn_beta_init",
        neutral=1.0,
        lr_multiplier="residual_scale_lr_multiplier",
    ),
    LearnedScalar(
        *("temperatures", "attn.temperature.log_temperature", "temperature", "attention_temperature"),
        ("head", "position"),
        start="temperature_init",
        neutral=1.0,
        by_head=True,
        is_logarithm=True,
        lr_multiplier="temperature_lr_multiplier",
        adapter_switch="train_temperatures",
    ),
    LearnedScalar(
        *("shifts", "attn.shift.attention_shift", "shift of scores", "has_attention_shift", (True,)),
        start="attention_shift_init",
        by_head=True,
        lr_multiplier="shift_lr_multiplier",
        adapter_switch="train_shifts",
    ),
    LearnedScalar(
        *("slopes", "mlp.act.negative_slope", "slope of leaky ReLU", "activation_function", ("learnable_leaky_relu",)),
    ),
)


class EntropyGPTLayer(nn.Module):
    """A layer with parameters or buffers that GPT-2 has not."""

    def initialize(self):
        """What `_init_weights` does not do of itself; called where a checkpoint does not bring all of the layer."""
        raise NotImplementedError


class EntropyGPTStaticLayerNorm(EntropyGPTLayer):
    """
    LayerNorm with a constant in place of each row's standard deviation: `(x - mean(x)) / standard_deviation * weight +
    bias`, an affine map and so free of charge under secure computation. The constant is measured on data (arXiv
    2409.13710) and saved with the weights; it is 1 until then.

    Shape: `(..., hidden_size)` to the same.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.register_buffer("standard_deviation", torch.ones(()))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        centered = hidden_states - hidden_states.mean(dim=-1, keepdim=True)
        return centered * (self.weight / self.standard_deviation) + self.bias

    def initialize(self):
        init.ones_(self.standard_deviation)


class EntropyGPTLearnableLeakyReLU(EntropyGPTLayer):
    """Leaky ReLU with one learnable slope, which starts at 0.01, the constant of `leaky_relu`."""

    def __init__(self):
        super().__init__()
        self.negative_slope = nn.Parameter(torch.tensor([0.01]))  # FSDP takes no parameters without a dimension

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.clamp(min=0) + self.negative_slope.squeeze() * hidden_states.clamp(max=0)

    def initialize(self):
        init.constant_(self.negative_slope, 0.01)


class EntropyGPTTemperature(EntropyGPTLayer):
    """
    Learnable softmax temperatures (SM(t) in arXiv 2501.03489), kept as logarithms, so that no training step can bring
    one to zero or below. A module of its own, as the two below, so that PEFT's `modules_to_save` can name it.

    Args:
        n_head (`int`): Number of heads.
        n_positions (`int`, *optional*): With it, there is one for each head and query position, else one a head.
        start (`float`): The first temperature.
    """

    def __init__(self, n_head: int, n_positions: int | None = None, start: float = 1.0):
        super().__init__()
        self.start = start
        self.by_position = n_positions is not None
        self.log_temperature = nn.Parameter(torch.empty(n_head, n_positions or 1))

    def forward(self, position_ids: torch.Tensor | None) -> torch.Tensor:
        """1 / t for each query, broadcastable to `(batch, heads, query_length, 1)`, and as long as `position_ids`."""
        inverse = torch.exp(-self.log_temperature)
        if self.by_position:
            return inverse[:, position_ids].transpose(0, 1).unsqueeze(-1)
        # Tools for gradients of single sequences look for the batch in what a module reads and in what it returns.
        rows = 1 if position_ids is None else len(position_ids)
        return inverse[None, :, :, None].expand(rows, -1, -1, -1)

    def initialize(self):
        init.constant_(self.log_temperature, math.log(self.start))


class EntropyGPTEntropyThreshold(EntropyGPTLayer):
    """Learnable threshold (theta in arXiv 2501.03489) of the entropy penalty for each head."""

    def __init__(self, n_head: int, start: float = 0.5):
        super().__init__()
        self.start = start
        self.entropy_threshold = nn.Parameter(torch.empty(n_head))

    def forward(self) -> torch.Tensor:
        """A copy, of shape `(heads,)`: FSDP frees the parameter's storage after the block, the penalty comes later."""
        return self.entropy_threshold.clone()

    def initialize(self):
        init.constant_(self.entropy_threshold, self.start)


class EntropyGPTAttentionShift(EntropyGPTLayer):
    """Learnable shift c of the scores, for each head and query position; see attention_functions.py."""

    def __init__(self, n_head: int, n_positions: int, start: float = 0.0):
        super().__init__()
        self.start = start
        self.attention_shift = nn.Parameter(torch.empty(n_head, n_positions))

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """The shift of each query, of shape `(batch or 1, heads, query_length)`, as long as `position_ids`."""
        return self.attention_shift[:, position_ids].transpose(0, 1)

    def initialize(self):
        init.constant_(self.attention_shift, self.start)


def keep_in_graph(hidden_states: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """
    The hidden states, bit for bit, whose gradient gives the parameter one of zero. Data parallelism waits for a
    gradient of every parameter, also where the loss is computed without it.
    """
    never = torch.zeros((), dtype=torch.bool, device=hidden_states.device)
    return torch.where(never, parameter.sum().to(hidden_states.dtype), hidden_states)


class EntropyGPTResidualScaling(EntropyGPTLayer):
    """The FFN's residual sum with learnable scales, `beta * residual + ffn_output / alpha` (arXiv 2501.03489)."""

    def __init__(self, alpha: float = 1.0, beta: float = 1.0):
        super().__init__()
        self.start = {"ffn_alpha": alpha, "ffn_beta": beta}
        # FSDP takes no parameters without a dimension.
        self.ffn_alpha = nn.Parameter(torch.empty(1))
        self.ffn_beta = nn.Parameter(torch.empty(1))

    def forward(self, residual: torch.Tensor, ffn_output: torch.Tensor) -> torch.Tensor:
        return self.ffn_beta.squeeze() * residual + ffn_output / self.ffn_alpha.squeeze()

    def initialize(self):
        for name, value in self.start.items():
            init.constant_(getattr(self, name), value)


class EntropyGPTNormalizedConv1D(EntropyGPTLayer):
    """
    GPT-2's linear map with its weights normalised, for all or some of the equal groups of its output features.

    The weights used are `weight * scale`, with a scale for each output feature:
    - `"weight"`: `gain / |weights of that feature|`, with a learnable gain a feature (Salimans & Kingma, 2016);
    - `"spectral"`: `gain / largest singular value of the group's matrix`, with the gain a constant, 1 from scratch
      (Miyato et al., 2018). The singular value follows weights that are trained by one power iteration in each
      forward pass of training ([`update_singular_vectors`]).
    Features of other groups have scale 1, and weights that are all zero stay zero. So the normalisation costs nothing
    once folded into plain weights.

    It is no subclass of `Conv1D`, so that tools which write into the weights of one refuse it or pass it over: what
    they add would be scaled too. PEFT refuses it in `target_modules` and leaves it out of `"all-linear"`; an adapter
    of the weights before they are normalised (`target_parameters`) is the one that can be merged.

    Args:
        nf (`int`): Number of output features.
        nx (`int`): Number of input features.
        kind (`str`): `"weight"` or `"spectral"`.
        normalized_groups (`list[bool]`): For each equal group of output features, whether it is normalised.
    """

    def __init__(self, nf: int, nx: int, kind: str, normalized_groups: list[bool]):
        super().__init__()
        self.nf = nf
        self.nx = nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        self.kind = kind
        self.normalized_groups = normalized_groups
        self.group_size = nf // len(normalized_groups)
        count = sum(normalized_groups)
        if kind == "weight":
            self.gain = nn.Parameter(torch.ones(count, self.group_size))
        else:
            self.register_buffer("gain", torch.ones(count, 1))
            self.register_buffer("singular_vectors", torch.full((count, self.group_size), self.group_size**-0.5))

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, kind={self.kind!r}, normalized_groups={self.normalized_groups}"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.normalized_weight()
        output = torch.addmm(self.bias, hidden_states.view(-1, self.nx), weight)
        return output.view(*hidden_states.shape[:-1], self.nf)

    def normalized_weight(self) -> torch.Tensor:
        """The weights used, of shape `(nx, nf)`."""
        groups = self._normalized(self.weight)
        if self.kind == "weight":
            norm = groups.norm(dim=1)
        else:
            # A copy: autograd keeps it, and the next forward pass changes the buffer.
            right = self.singular_vectors.to(groups.dtype, copy=True)
            left = _to_length_one(torch.einsum("gio,go->gi", groups.detach(), right))
            norm = torch.einsum("gi,gio,go->g", left, groups, right)[:, None]
        factors = (self.gain / norm.where(norm != 0, 1)).to(groups.dtype).expand(-1, self.group_size).unbind()
        ones = groups.new_ones(self.group_size)
        remaining = iter(factors)
        scale = torch.cat([next(remaining) if normalized else ones for normalized in self.normalized_groups])
        return self.weight * scale

    @torch.no_grad()
    def update_singular_vectors(self, iterations: int = 1):
        """Brings the singular vectors nearer to those of the present weights."""
        groups = self._normalized(gather(self.weight))
        self.singular_vectors.copy_(_iterate(groups, self.singular_vectors.to(groups.dtype), iterations))

    def initialize(self):
        """Sets what a checkpoint did not bring, so that weight normalisation starts as the plain linear map."""
        groups = self._normalized(self.weight)
        if self.kind == "weight":
            init.copy_(self.gain, groups.norm(dim=1))
            return
        init.ones_(self.gain)
        if groups.is_meta:  # whose values are still to come; buffers are not always on that device too
            return
        start = torch.full_like(self.singular_vectors, self.group_size**-0.5, dtype=groups.dtype)
        init.copy_(self.singular_vectors, _iterate(groups, start, POWER_ITERATIONS_AT_INIT))

    def _normalized(self, weight: torch.Tensor) -> torch.Tensor:
        """The part of the weights in the normalised groups, of shape `(groups, nx, group_size)`."""
        groups = weight.view(self.nx, len(self.normalized_groups), self.group_size).unbind(dim=1)
        return torch.stack([group for group, keep in zip(groups, self.normalized_groups, strict=True) if keep])


def _iterate(matrices: torch.Tensor, right: torch.Tensor, iterations: int) -> torch.Tensor:
    """Power iterations towards the first right singular vectors of matrices; of those without any, it stays."""
    for _ in range(iterations):
        left = _to_length_one(torch.einsum("gio,go->gi", matrices, right))
        found = _to_length_one(torch.einsum("gio,gi->go", matrices, left))
        right = found.where(found.any(dim=-1, keepdim=True), right)
    return right


def _to_length_one(vectors: torch.Tensor) -> torch.Tensor:
    """Zero stays zero, in half precision too, where torch's own epsilon is 0."""
    length = vectors.norm(dim=-1, keepdim=True)
    return vectors / length.where(length != 0, 1)


def gather(parameter: torch.Tensor) -> torch.Tensor:
    """The whole of a parameter, of which FSDP leaves each rank a part outside of its block."""
    if not torch.distributed.is_available():
        return parameter
    from torch.distributed.tensor import DTensor

    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def build_norm(kind: str, hidden_size: int, epsilon: float) -> nn.Module:
    """The norm that `config.normalization` or `config.final_normalization` names."""
    if kind == "layernorm":
        return nn.LayerNorm(hidden_size, eps=epsilon)
    return EntropyGPTStaticLayerNorm(hidden_size) if kind == "static" else nn.Identity()


def build_activation(name: str) -> nn.Module:
    """The activation that `config.activation_function` names."""
    if name == "identity":
        return nn.Identity()
    if name in TANH_GELUS:
        return nn.GELU(approximate="tanh")
    return EntropyGPTLearnableLeakyReLU() if name == "learnable_leaky_relu" else ACT2FN[name]


def build_linear(config, nf: int, nx: int, targets: tuple[str, ...], adds_to_residual: bool = False) -> nn.Module:
    """
    GPT-2's linear map from `nx` to `nf` features, normalised as the config says.

    Args:
        config ([`EntropyGPTConfig`]): The configuration.
        nf (`int`): Number of output features.
        nx (`int`): Number of input features.
        targets (`tuple[str]`): Which weight normalisation target each equal group of output features belongs to.
        adds_to_residual (`bool`): Whether the output is added to the residual stream; then GPT-2's initial weights are
            smaller by the root of the number of such additions. The map carries the factor itself, since transformers
            does not initialise modules of custom code that have no parameters of their own.
    """
    normalized_groups = [target in config.weight_normalization_targets for target in targets]
    if config.weight_normalization is None or not any(normalized_groups):
        linear = Conv1D(nf, nx)
    else:
        linear = EntropyGPTNormalizedConv1D(nf, nx, config.weight_normalization, normalized_groups)
    linear.initializer_scale = (2 * config.n_layer) ** -0.5 if adds_to_residual else 1.0
    return linear


__all__ = [
    "LEARNED_SCALARS",
    "EntropyGPTAttentionShift",
    "EntropyGPTEntropyThreshold",
    "EntropyGPTLayer",
    "EntropyGPTLearnableLeakyReLU",
    "EntropyGPTNormalizedConv1D",
    "EntropyGPTResidualScaling",
    "EntropyGPTStaticLayerNorm",
    "EntropyGPTTemperature",
    "LearnedScalar",
    "build_activation",
    "build_linear",
    "build_norm",
    "gather",
    "keep_in_graph",
]
