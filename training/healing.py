"""Healing: training after a conversion, drawn to the original model, with a guard against running away."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerState

from .callbacks import find_callback
from .distillation import hidden_state_distance, logits_divergence, residual_scale_distance
from .divergence import FIRST_BATCHES, SLOWDOWN, Action, DivergenceGuard
from .removal_schedule import RemovalSchedule
from .trainer import EntropyTrainer


# A residual stream this many times as large as in the last good state has run away.
LARGEST_SCALE = 4.0
# The parts of a batch that the original is given.
READ_BY_ORIGINAL = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class HealingLoss:
    """
    The terms of healing's loss, in addition to the model's own.

    Args:
        logits (`float`): Weight of the KL to the original, between 0 and 1; the model's own loss has the rest.
        temperature (`float`): Temperature of that KL.
        hidden_states (`float`): Weight of the distance of the residual streams.
        residual_scale (`float`): Weight of the distance from the residual stream's scale.
    """

    logits: float = 0.0
    temperature: float = 1.0
    hidden_states: float = 0.0
    residual_scale: float = 0.0

    @property
    def needs_original(self) -> bool:
        """Whether the original takes part."""
        return self.logits > 0 or self.hidden_states > 0


class HealingProgress(DivergenceGuard):
    """
    How far healing is, and a guard that goes back to the last good state when the residual stream runs away too: at
    half the learning rate, and half the pace of removal.

    Attributes:
        clock (`float`): Time of the removal schedule, from 0 to 1.
        pace (`float`): By how much the clock goes on in a step; `first_pace` at the beginning.
        mean_scale (`float`): Running mean of the residual stream's scale before the final norm.
        good_scale (`float`): What it was in the last good state.
        removed (`int`): Number of things that the schedule has removed.
    """

    follows_minimum = False  # what is removed may cost something: the last good state counts

    def __init__(self, action: Action = "rollback", first_pace: float = 0.0):
        super().__init__(action)
        self.clock = 0.0
        self.pace = self.first_pace = first_pace
        self.scale = self.mean_scale = self.good_scale = 0.0
        self.removed = 0

    def state(self) -> dict:
        state = super().state()
        state["args"]["first_pace"] = state["attributes"].pop("first_pace")
        return state

    def observe(self, loss: float) -> str | None:
        if not math.isfinite(self.scale):
            return f"the residual stream's scale is {self.scale}"
        if reason := super().observe(loss):
            return reason
        self.mean_scale += self.share_of_step * (self.scale - self.mean_scale)
        if self.batches <= FIRST_BATCHES:
            self.good_scale = self.mean_scale
        if self.batches > FIRST_BATCHES and self.mean_scale > LARGEST_SCALE * self.good_scale:
            return (
                f"the residual stream's scale is {self.mean_scale:.3g}, and {self.good_scale:.3g} in the last good "
                "state"
            )
        return None

    def keep(self) -> dict[str, Any]:
        self.good_loss, self.good_scale = self.mean_loss, self.mean_scale
        return {**super().keep(), "mean_scale": self.mean_scale, "clock": self.clock}

    def go_back(self, kept: dict[str, Any], state: TrainerState):
        """Never so slow that the schedule would not end in time."""
        super().go_back(kept, state)
        self.clock, self.mean_scale = kept["clock"], kept["mean_scale"]
        steps_left = max(1, state.max_steps - state.global_step - 1)
        self.pace = max(self.pace * SLOWDOWN, (1 - self.clock) / steps_left)

    def on_step_end(self, args, state, control, **kwargs):
        self.clock = min(1.0, self.clock + self.pace)


class HealingTrainer(EntropyTrainer):
    """
    Trains a converted model: removes step by step what the schedule says, adds what draws it to the original to the
    loss, and goes back to the last good state, at half the learning rate and pace, when the loss or the residual
    stream runs away, or a gradient is not finite.

    Args:
        healing_loss ([`HealingLoss`]): Parts of the loss.
        original ([`EntropyGPTForCausalLM`]): The model that was converted.
        residual_scale (`float`): The standard deviation of the rows before the final norm, in the original.
        removal_steps (`int`): Steps in which the schedule removes everything.
        schedule ([`RemovalSchedule`], *optional*): For a model with gates.
        kwargs: As for an [`EntropyTrainer`].

    Raises:
        `ValueError`: If there are several processes or devices, a schedule with `activation_checkpointing`, or
            `label_smoothing_factor`.
    """

    def __init__(
        self,
        *args,
        healing_loss: HealingLoss,
        original: PreTrainedModel,
        residual_scale: float,
        removal_steps: int = 1,
        schedule: RemovalSchedule | None = None,
        **kwargs,
    ):
        super().__init__(*args, guard=HealingProgress(first_pace=1 / removal_steps), **kwargs)
        if (devices := max(self.accelerator.num_processes, self.args.n_gpu)) > 1:
            raise ValueError(f"Healing takes one device, and there are {devices}: set CUDA_VISIBLE_DEVICES to one.")
        if schedule is not None and self.args.activation_checkpointing:
            raise ValueError(
                "activation_checkpointing=True would take each row into the constants of gated norms twice: train "
                "without it, or without a schedule."
            )
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.args.label_smoothing_factor}: the loss of healing is weighted against "
                "the cross-entropy, without smoothing; leave it out. HealingLoss(logits=..., temperature=...) takes "
                "soft labels from the original."
            )
        self.healing_loss = healing_loss
        self.original = original.to(self.args.device).eval()
        self._stream_of_model, self._stream_of_original = (
            _StreamBeforeHead(model) for model in (self.model, self.original)
        )
        self.residual_scale = residual_scale
        self.schedule = schedule
        self._scales: list[float] = []

    @property
    def progress(self) -> HealingProgress:
        """How far healing is."""
        return find_callback(self, HealingProgress)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        weights = self.healing_loss
        compares_streams = weights.hidden_states > 0
        loss, outputs = super().compute_loss(
            model, {**inputs, "output_hidden_states": compares_streams}, True, num_items_in_batch=num_items_in_batch
        )
        stream = self._stream_of_model.take()
        predicted = torch.zeros_like(inputs["labels"], dtype=torch.bool)
        predicted[:, :-1] = inputs["labels"][:, 1:] != -100
        num_items = predicted.sum() if num_items_in_batch is None else num_items_in_batch
        self._scales.append(stream.detach().float()[:, 1:].std(dim=-1, unbiased=False).mean().item())
        if weights.needs_original:
            with torch.no_grad():
                read = {name: inputs[name] for name in READ_BY_ORIGINAL if name in inputs}
                expected = self.original(**read, output_hidden_states=compares_streams, use_cache=False)
            original_stream = self._stream_of_original.take()
        if weights.logits:
            divergence = logits_divergence(outputs.logits, expected.logits, predicted, num_items, weights.temperature)
            loss = loss + weights.logits * (divergence - outputs.cross_entropy_loss)
        if compares_streams:  # the last hidden states of a model are those behind its final norm
            found, wanted = (
                [*states[1:-1], last]
                for states, last in ((outputs.hidden_states, stream), (expected.hidden_states, original_stream))
            )
            loss = loss + weights.hidden_states * hidden_state_distance(found, wanted, predicted, num_items)
        if weights.residual_scale:
            distance = residual_scale_distance(stream, self.residual_scale, predicted, num_items)
            loss = loss + weights.residual_scale * distance
        return (loss, outputs) if return_outputs else loss

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        self._close_gates()  # whose time has come with the last step
        return result

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._close_gates()
        return super().training_step(model, inputs, num_items_in_batch)

    def evaluate(self, *args, **kwargs):
        self._close_gates()
        return super().evaluate(*args, **kwargs)

    def _close_gates(self):
        if self.schedule is None:
            return
        progress = self.progress
        removed = self.schedule.set_clock(progress.clock)
        for removal in self.schedule.removals[progress.removed : removed]:
            progress.events.append([self.state.global_step, f"{removal.name} removed"])
        progress.removed = removed

    def _diverge(self, reason: str):
        self._scales = []
        super()._diverge(reason)

    def _find_divergence(self) -> str | None:
        self.progress.scale = sum(self._scales) / len(self._scales)
        self._scales = []
        return super()._find_divergence()


class _StreamBeforeHead:
    """The residual stream of a model's last forward pass, as its final norm reads it."""

    def __init__(self, model: PreTrainedModel):
        self._stream: torch.Tensor | None = None
        model.transformer.ln_f.register_forward_pre_hook(self._keep)

    def _keep(self, module, arguments):
        self._stream = arguments[0]

    def take(self) -> torch.Tensor:
        """Of shape `(batch, length, n_embd)`; it is not kept any longer."""
        stream, self._stream = self._stream, None
        return stream
