"""Healing: training after a conversion, drawn to the original model, with a guard against running away."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from .distillation import hidden_state_distance, logits_divergence, residual_scale_distance
from .removal_schedule import RemovalSchedule
from .trainer import EntropyTrainer


# A running mean of the loss so many nats above that of the last good state has run away, as has a residual stream so
# many times as large. Single batches are no reason: they scatter.
LARGEST_RISE = 1.0
LARGEST_SCALE = 4.0
SMOOTHING = 0.1
FIRST_BATCHES = 5
# What a rollback multiplies learning rate and pace of removal by, and how many are made before giving up.
SLOWDOWN = 0.5
MOST_ROLLBACKS = 6


@dataclass(frozen=True)
class HealingLoss:
    """
    What the loss of healing consists of, beside the model's own.

    Args:
        logits (`float`): Weight of the KL to the original, between 0 and 1; the model's own loss has the rest.
        temperature (`float`): Of that KL.
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


class HealingProgress(TrainerCallback, ExportableState):
    """
    How far healing is: the part of its state that the Trainer's own does not hold, saved in its checkpoints.

    Attributes:
        clock (`float`): Time of the removal schedule, from 0 to 1.
        pace (`float`): By how much the clock goes on in a step.
        slowdown (`float`): What the learning rate is multiplied by.
        batches (`int`): Number of steps that the running means are of.
        mean_loss, mean_scale (`float`): Running means of the loss per token, and of the residual stream's scale before
            the final norm.
        good_loss, good_scale (`float`): What these were in the last good state.
        removed (`int`): Number of things that the schedule has removed.
        rollbacks (`int`): How often the guard went back.
        events (`list[list]`): Steps at which something was removed or the guard went back, and what it was.
    """

    def __init__(self, pace: float = 0.0):
        self.clock = 0.0
        self.pace = pace
        self.slowdown = 1.0
        self.batches = 0
        self.mean_loss = self.mean_scale = 0.0
        self.good_loss = self.good_scale = 0.0
        self.removed = 0
        self.rollbacks = 0
        self.events: list[list] = []

    def state(self) -> dict:
        return {"args": {}, "attributes": dict(vars(self))}

    def on_step_end(self, args, state, control, **kwargs):
        self.clock = min(1.0, self.clock + self.pace)


class HealingTrainer(EntropyTrainer):
    """
    Trains a converted model: removes step by step what the schedule says, adds what draws it to the original to the
    loss, and goes back to the last good state, at half the learning rate and pace, when the loss or the residual
    stream runs away, or a gradient is not finite. A good state is kept at the beginning and at every checkpoint, so
    that a resumed run takes the same course.

    Args:
        healing_loss ([`HealingLoss`]): Parts of the loss.
        original ([`EntropyGPTForCausalLM`]): The model that was converted.
        residual_scale (`float`): The standard deviation of the rows before the final norm, in the original.
        removal_steps (`int`): Steps in which the schedule removes everything.
        schedule ([`RemovalSchedule`], *optional*): For a model with gates.
        kwargs: As for a `Trainer`, with `restore_callback_states_from_checkpoint=True` in its arguments.

    Raises:
        `ValueError`: If there are several processes or devices.
        `FloatingPointError`: In training, if it runs away again and again.
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
        super().__init__(*args, **kwargs)
        if (devices := max(self.accelerator.num_processes, self.args.n_gpu)) > 1:
            raise ValueError(f"Healing takes one device, and there are {devices}: set CUDA_VISIBLE_DEVICES to one.")
        self.healing_loss = healing_loss
        self.original = original.to(self.args.device).eval()
        self._stream_of_model, self._stream_of_original = (
            _StreamBeforeHead(model) for model in (self.model, self.original)
        )
        self.residual_scale = residual_scale
        self.schedule = schedule
        self.add_callback(HealingProgress(1 / removal_steps))
        self._good_state: dict | None = None
        self._seen: list[tuple[float, float]] = []

    @property
    def progress(self) -> HealingProgress:
        """The present one: a resumed run has another than the one it was made with."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, HealingProgress))

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        created = super().create_scheduler(num_training_steps, optimizer)
        created.lr_lambdas = [self._slowed(factor) for factor in created.lr_lambdas]
        return created

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
        self._watch(outputs.cross_entropy_loss * (num_items / predicted.sum()), stream)
        if weights.needs_original:
            with torch.no_grad():
                expected = self.original(inputs["input_ids"], output_hidden_states=compares_streams, use_cache=False)
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

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._good_state is None:
            self._keep_good_state()
        self._close_gates()
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
            reason = self._find_runaway() if self.accelerator.sync_gradients else None
        except FloatingPointError as error:  # the model's own detection of divergence
            reason = str(error)
        if reason is None:
            return loss
        self._roll_back(reason)
        return torch.tensor(self.progress.mean_loss, device=self.args.device)

    def evaluate(self, *args, **kwargs):
        self._close_gates()
        return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        self._keep_good_state()
        super()._save_checkpoint(model, trial)

    def _close_gates(self):
        if self.schedule is None:
            return
        progress = self.progress
        removed = self.schedule.set_clock(progress.clock)
        for removal in self.schedule.removals[progress.removed : removed]:
            progress.events.append([self.state.global_step, f"{removal.name} removed"])
        progress.removed = removed

    def _watch(self, loss: torch.Tensor, stream: torch.Tensor):
        """Notes the mean loss of these tokens, and the residual stream's scale."""
        scale = stream.detach().float()[:, 1:].std(dim=-1, unbiased=False).mean()
        self._seen.append((loss.item(), scale.item()))

    def _find_runaway(self) -> str | None:
        """Why what was seen in this step, in all parts of its batch, can't be trusted, or `None` if it can."""
        progress = self.progress
        loss, scale = (sum(values) / len(values) for values in zip(*self._seen, strict=True))
        self._seen = []
        if not math.isfinite(loss) or not math.isfinite(scale):
            return f"the loss is {loss}, the residual stream's scale {scale}"
        # A scaler of half precision skips such steps itself.
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if self.accelerator.scaler is None and not nn.utils.get_total_norm(gradients).isfinite():
            return "a gradient is not finite"
        progress.batches += 1
        share = max(SMOOTHING, 1 / progress.batches)
        progress.mean_loss += share * (loss - progress.mean_loss)
        progress.mean_scale += share * (scale - progress.mean_scale)
        if progress.batches <= FIRST_BATCHES:  # what is usual is not known yet
            progress.good_loss, progress.good_scale = progress.mean_loss, progress.mean_scale
        if progress.mean_loss > progress.good_loss + LARGEST_RISE:
            return f"the loss is {progress.mean_loss:.2f}, and {progress.good_loss:.2f} in the last good state"
        if progress.mean_scale > LARGEST_SCALE * progress.good_scale:
            return (
                f"the residual stream's scale is {progress.mean_scale:.3g}, and {progress.good_scale:.3g} in the last "
                "good state"
            )
        return None

    def _keep_good_state(self):
        progress = self.progress
        progress.good_loss, progress.good_scale = progress.mean_loss, progress.mean_scale
        self._good_state = {
            "model": {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "clock": progress.clock,
            "batches": progress.batches,
        }

    def _roll_back(self, reason: str):
        """Goes back to the last good state, slower: but never so slow that the schedule would not end in time."""
        progress, good = self.progress, self._good_state
        self._seen = []
        progress.rollbacks += 1
        progress.events.append([self.state.global_step, f"back to the last good state: {reason}"])
        if progress.rollbacks > MOST_ROLLBACKS:
            raise FloatingPointError(
                f"Healing ran away {progress.rollbacks} times, at last because {reason}. Lower the learning rate, or "
                "give it more steps."
            )
        self.model.load_state_dict(good["model"])
        self.optimizer.load_state_dict(copy.deepcopy(good["optimizer"]))
        self.optimizer.zero_grad(set_to_none=True)
        progress.clock, progress.batches = good["clock"], good["batches"]
        progress.mean_loss, progress.mean_scale = progress.good_loss, progress.good_scale
        progress.slowdown *= SLOWDOWN
        steps_left = max(1, self.state.max_steps - self.state.global_step - 1)
        progress.pace = max(progress.pace * SLOWDOWN, (1 - progress.clock) / steps_left)

    def _slowed(self, factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: factor(step) * self.progress.slowdown


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
