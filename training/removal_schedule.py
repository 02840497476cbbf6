"""Gates through which a model passes, step by step, from the original's norms and FFNs to the simplified ones.

While it heals, a model holds both: a gate blends them, from 1 (as in the original) to 0 (as in the simplified model).
Two schedules close the gates: a staircase, one after the other in the order of the published studies (arXiv
2409.13710, 2507.02559), and all together on a cosine (arXiv 2602.10408).
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from entropy_gpt.conversion.assembly import assemble
from entropy_gpt.conversion.calibration import OTHERS, Calibration, group_rows
from modeling_entropy_gpt import EntropyGPTForCausalLM
from modeling_entropy_gpt.layers import EntropyGPTStaticLayerNorm


ScheduleKind = Literal["gate", "staircase"]

# The weight of a training step's rows in the running moments of a gated norm.
REFRESHMENT = 0.05
# On a cosine, rows with constants of their own give them up in the last part of the schedule.
SPECIAL_ROWS_FROM = 0.8
# To which a clock is read.
DECIMALS = 6


class GatedNorm(nn.Module):
    """
    A LayerNorm on its way to a static one: rows are multiplied by `gate / std(row) + (1 - gate) / constant`.

    The constant follows the rows of training until the gate is closed, and is frozen then. First positions and ends of
    text have constants of their own, which go over into that of all other rows as `apartness` goes to 0.

    Shape: `(batch, length, hidden_size)` to the same.
    """

    def __init__(self, norm: nn.LayerNorm, calibration: Calibration, name: str):
        super().__init__()
        self.weight, self.bias, self.epsilon = norm.weight, norm.bias, norm.eps
        sums = calibration.row_deviations(name)
        self.register_buffer("moments", (sums[:, 1:] / sums[:, :1]).float())  # of each group, mean std and its square
        self.gate = 1.0
        self.apartness = 1.0
        self.groups: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        centered = hidden_states - hidden_states.mean(dim=-1, keepdim=True)
        factor = self._static_factor().to(hidden_states.dtype)
        if self.gate > 0:
            deviations = (centered.square().mean(dim=-1, keepdim=True) + self.epsilon).sqrt()
            if self.training:
                self._refresh(deviations.detach())
            factor = self.gate / deviations + (1 - self.gate) * factor
        return centered * factor * self.weight + self.bias

    def make_static(self) -> EntropyGPTStaticLayerNorm:
        """The norm that is left when the gate is closed."""
        static = EntropyGPTStaticLayerNorm(len(self.weight))
        static.weight, static.bias = self.weight, self.bias
        static.standard_deviation = self._constants()[OTHERS].to(self.weight.dtype)
        return static

    def _constants(self) -> torch.Tensor:
        """Of each group: the mean of the squares over the mean, as in `Calibration.norm_constant`."""
        return self.moments[:, 1] / self.moments[:, 0]

    def _static_factor(self) -> torch.Tensor:
        inverse = 1 / self._constants()
        inverse = self.apartness * inverse + (1 - self.apartness) * inverse[OTHERS]
        return inverse[self.groups].unsqueeze(-1)

    @torch.no_grad()
    def _refresh(self, deviations: torch.Tensor):
        for group in range(len(self.moments)):
            rows = deviations[self.groups == group].float()
            if len(rows):
                self.moments[group].lerp_(torch.stack([rows.mean(), rows.square().mean()]), REFRESHMENT)


class PrunedFFN(nn.Module):
    """What pruning leaves of an FFN: a constant, which becomes part of the attention's bias in the end."""

    def __init__(self, bias: torch.Tensor):
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.bias.expand_as(hidden_states)


class GatedFFN(nn.Module):
    """
    The original's FFN on its way to the simplified one, `gate * before + (1 - gate) * after`.

    Args:
        before (`nn.Module`): The original FFN.
        after (`nn.Module`): The simplified one.
    """

    def __init__(self, before: nn.Module, after: nn.Module):
        super().__init__()
        self.before, self.after = before, after
        self.gate = 1.0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.gate == 1:
            return self.before(hidden_states)
        if self.gate == 0:
            return self.after(hidden_states)
        return self.gate * self.before(hidden_states) + (1 - self.gate) * self.after(hidden_states)


@dataclass(frozen=True)
class Removal:
    """One thing that a schedule removes: its name, and its gate (`None`: the constants of special rows)."""

    name: str
    gate: GatedNorm | GatedFFN | None


class RemovalSchedule:
    """
    Closes the gates of a model as its clock goes from 0 to 1.

    Args:
        model ([`EntropyGPTForCausalLM`]): A model with gates, of [`insert_gates`].
        kind (`str`): `"gate"`: all together on a cosine; `"staircase"`: one after the other, second norms of all
            blocks, first norms, FFNs from the deepest on, the final norm, constants of special rows.
    """

    def __init__(self, model: EntropyGPTForCausalLM, kind: ScheduleKind):
        self.kind = kind
        self.norms = [module for module in model.modules() if isinstance(module, GatedNorm)]
        self.removals = list_removals(model)

    def set_clock(self, clock: float) -> int:
        """Sets all gates to what they are at a time between 0 and 1; returns how many things are removed by then."""
        for index, removal in enumerate(self.removals):
            openness = self._openness(index, clock)
            if removal.gate is not None:
                removal.gate.gate = openness
                continue
            for norm in self.norms:
                norm.apartness = openness
        return sum(self._openness(index, clock) == 0 for index in range(len(self.removals)))

    def _openness(self, index: int, clock: float) -> float:
        """A clock that is a sum of many steps may be short of where it should be by their rounding."""
        if self.kind == "staircase":
            return float(round(clock * len(self.removals), DECIMALS) < index + 1)
        begin, end = (SPECIAL_ROWS_FROM, 1.0) if self.removals[index].gate is None else (0.0, SPECIAL_ROWS_FROM)
        part = min(max(round((clock - begin) / (end - begin), DECIMALS), 0.0), 1.0)
        return 0.0 if part == 1 else (1 + math.cos(math.pi * part)) / 2


def insert_gates(
    original: EntropyGPTForCausalLM, simplified: EntropyGPTForCausalLM, calibration: Calibration
) -> EntropyGPTForCausalLM:
    """
    A copy of the simplified model that computes what the original does, through open gates.

    Args:
        original ([`EntropyGPTForCausalLM`]): The model that was simplified.
        simplified ([`EntropyGPTForCausalLM`]): What its steps up to the folding of norms made of it.
        calibration ([`Calibration`]): Of the original.
    """
    gated = copy.deepcopy(simplified)
    before = copy.deepcopy(original)
    static, final_static = (
        kind == "static" for kind in (simplified.config.normalization, simplified.config.final_normalization)
    )
    for layer, (block, old) in enumerate(zip(gated.transformer.h, before.transformer.h, strict=True)):
        name = f"transformer.h.{layer}"
        block.ln_1 = _gate_norm(old.ln_1, block.ln_1, static, calibration, f"{name}.ln_1")
        if old.mlp is None:
            continue
        block.ln_2 = _gate_norm(old.ln_2, block.ln_2, static, calibration, f"{name}.ln_2")
        if block.mlp is None:
            moved = (block.attn.c_proj.bias - old.attn.c_proj.bias).detach()
            block.attn.c_proj.bias = old.attn.c_proj.bias
            block.mlp = GatedFFN(old.mlp, PrunedFFN(moved))
        elif _architecture_of_ffns(original) != _architecture_of_ffns(simplified):
            block.mlp = GatedFFN(old.mlp, block.mlp)
    old, new = before.transformer.ln_f, gated.transformer.ln_f
    gated.transformer.ln_f = _gate_norm(old, new, final_static, calibration, "transformer.ln_f")
    norms = [module for module in gated.modules() if isinstance(module, GatedNorm)]

    def tell_rows(module, arguments, keywords):
        input_ids = arguments[0] if arguments else keywords["input_ids"]
        for norm in norms:
            norm.groups = group_rows(input_ids, gated.config.eos_token_id)

    gated.transformer.register_forward_pre_hook(tell_rows, with_kwargs=True)
    return gated


def list_removals(model: EntropyGPTForCausalLM) -> list[Removal]:
    """What a schedule removes from a model with gates, in the order of the staircase."""
    blocks = model.transformer.h
    order = [(f"h.{layer}.ln_2", block.ln_2) for layer, block in enumerate(blocks)]
    order += [(f"h.{layer}.ln_1", block.ln_1) for layer, block in enumerate(blocks)]
    order += [(f"h.{layer}.mlp", block.mlp) for layer, block in reversed([*enumerate(blocks)])]
    order += [("ln_f", model.transformer.ln_f)]
    removals = [Removal(name, gate) for name, gate in order if isinstance(gate, GatedNorm | GatedFFN)]
    if any(isinstance(removal.gate, GatedNorm) for removal in removals):
        removals.append(Removal("special rows", None))
    return removals


def remove_gates(gated: EntropyGPTForCausalLM, simplified: EntropyGPTForCausalLM) -> EntropyGPTForCausalLM:
    """The simplified architecture with the weights that a model with closed gates has; its parameters are shared."""
    tensors = gated.state_dict()
    for name, gate in gated.named_modules():
        if isinstance(gate, GatedFFN) and isinstance(gate.after, PrunedFFN):
            bias = f"{name.removesuffix('.mlp')}.attn.c_proj.bias"
            tensors[bias] = tensors[bias] + gate.after.bias.detach()
        elif isinstance(gate, GatedNorm | GatedFFN):
            left = gate.make_static() if isinstance(gate, GatedNorm) else gate.after
            tensors.update({f"{name}.{key}": tensor for key, tensor in left.state_dict().items()})
    tensors = {name: tensors[name] for name in simplified.state_dict()}
    return assemble(EntropyGPTForCausalLM, simplified.config, tensors, simplified.generation_config).eval()


def _gate_norm(old: nn.Module, new: nn.Module | None, static: bool, calibration: Calibration, name: str) -> nn.Module:
    """A gate where a LayerNorm becomes static; the norm that stays, where none does (`new` is none where pruned)."""
    if static and isinstance(old, nn.LayerNorm):
        return GatedNorm(old, calibration, name)
    return old if new is None else new


def _architecture_of_ffns(model: EntropyGPTForCausalLM) -> tuple[str, str]:
    return model.config.ffn_type, model.config.activation_function
