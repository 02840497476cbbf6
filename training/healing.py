"""Healing: training after a conversion, drawn to the original model, with a guard against running away."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from .distillation import hidden_state_distance, logits_divergence, residual_scale_distance
from .removal_schedule import RemovalSchedule
from .trainer import EntropyTrainer


# A loss so many nats above its running mean has run away, as has a residual stream so many times its running scale.
LARGEST_RISE = 1.0
LARGEST_SCALE = 4.0
SMOOTHING = 0.1
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
        mean_loss (`float`, *optional*): Running mean of the loss per token.
        mean_scale (`float`, *optional*): Running mean of the residual stream's scale before the final norm.
        removed (`int`): Number of things that the schedule has removed.
        rollbacks (`int`): How often the guard went back.
        events (`list[list]`): Steps at which something was removed or the guard went back, and what it was.
    """

    def __init__(self, pace: float = 0.0):
        self.clock = 0.0
        self.pace = pace
        self.slowdown = 1.0
        self.mean_loss: float | None = None
        self.mean_scale: float | None = None
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
    stream runs away. A good state is kept at the beginning and at every checkpoint, so that a resumed run takes the
    same course.

    Args:
        healing_loss ([`HealingLoss`]): Parts of the loss.
        original ([`EntropyGPTForCausalLM`]): The model that was converted.
        residual_scale (`float`): The standard deviation of the rows before the final norm, in the original.
        removal_steps (`int`): Steps in which the schedule removes everything.
        schedule ([`RemovalSchedule`], *optional*): For a model with gates.
        kwargs: As for a `Trainer`, with `restore_callback_states_from_checkpoint=True` in its arguments.

    Raises:
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
        self.healing_loss = healing_loss
        self.original = original.to(self.args.device).eval()
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
        loss, outputs = super().compute_loss(
            model, {**inputs, "output_hidden_states": True}, True, num_items_in_batch=num_items_in_batch
        )
        weights = self.healing_loss
        predicted = torch.zeros_like(inputs["labels"], dtype=torch.bool)
        predicted[:, :-1] = inputs["labels"][:, 1:] != -100
        num_items = predicted.sum() if num_items_in_batch is None else num_items_in_batch
        stream = outputs.hidden_states[1:]
        self._watch(outputs, stream[-1], num_items / predicted.sum())
        if weights.needs_original:
            with torch.no_grad():
                expected = self.original(inputs["input_ids"], output_hidden_states=True, use_cache=False)
        if weights.logits:
            divergence = logits_divergence(outputs.logits, expected.logits, predicted, num_items, weights.temperature)
            loss = (1 - weights.logits) * loss + weights.logits * divergence
        if weights.hidden_states:
            distance = hidden_state_distance(stream, expected.hidden_states[1:], predicted, num_items)
            loss = loss + weights.hidden_states * distance
        if weights.residual_scale:
            distance = residual_scale_distance(stream[-1], self.residual_scale, predicted, num_items)
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
        return torch.tensor(self.progress.mean_loss or 0.0, device=self.args.device)

    def evaluate(self, *args, **kwargs):
        self._close_gates()
        return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        self._keep_good_state()

    def _close_gates(self):
        if self.schedule is None:
            return
        progress = self.progress
        removed = self.schedule.set_clock(progress.clock)
        for removal in self.schedule.removals[progress.removed : removed]:
            progress.events.append([self.state.global_step, f"{removal.name} removed"])
        progress.removed = removed

    def _watch(self, outputs, stream: torch.Tensor, share: torch.Tensor | float):
        """Notes the mean loss of these tokens, and the residual stream's scale."""
        scale = stream.detach().float()[:, 1:].std(dim=-1, unbiased=False).mean()
        self._seen.append(((outputs.cross_entropy_loss.detach() * share).item(), scale.item()))

    def _find_runaway(self) -> str | None:
        """Why what was seen in this step, in all parts of its batch, can't be trusted, or `None` if it can."""
        progress = self.progress
        loss, scale = (sum(values) / len(values) for values in zip(*self._seen, strict=True))
        self._seen = []
        if not math.isfinite(loss) or not math.isfinite(scale):
            return f"the loss is {loss}, the residual stream's scale {scale}"
        if progress.mean_loss is None:
            progress.mean_loss, progress.mean_scale = loss, scale
        if loss > progress.mean_loss + LARGEST_RISE:
            return f"the loss is {loss:.2f}, above its running mean of {progress.mean_loss:.2f}"
        if scale > LARGEST_SCALE * progress.mean_scale:
            return f"the residual stream's scale is {scale:.3g}, above its running mean of {progress.mean_scale:.3g}"
        progress.mean_loss += SMOOTHING * (loss - progress.mean_loss)
        progress.mean_scale += SMOOTHING * (scale - progress.mean_scale)
        return None

    def _keep_good_state(self):
        self._good_state = {
            "model": {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "clock": self.progress.clock,
            "mean_loss": self.progress.mean_loss,
            "mean_scale": self.progress.mean_scale,
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
        for name in ("clock", "mean_loss", "mean_scale"):
            setattr(progress, name, good[name])
        progress.slowdown *= SLOWDOWN
        steps_left = max(1, self.state.max_steps - self.state.global_step - 1)
        progress.pace = max(progress.pace * SLOWDOWN, (1 - progress.clock) / steps_left)

    def _slowed(self, factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: factor(step) * self.progress.slowdown
