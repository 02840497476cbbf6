"""When training runs away: how it is noticed, where it began, and what is done about it."""

import math
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from modeling_entropy_gpt import EntropyGPTModel


# A running mean of the loss this many nats above that of the last good state has run away. Single batches
# scatter, and are no reason.
LARGEST_RISE = 1.0
SMOOTHING = 0.1
FIRST_BATCHES = 5
# What a rollback multiplies the learning rate by, and how many are made before giving up.
SLOWDOWN = 0.5
MOST_ROLLBACKS = 6

Action = Literal["stop", "rollback"]


class DivergenceGuard(TrainerCallback, ExportableState):
    """
    Follows the loss of a run, and remembers what was done when it ran away: part of the run's state, saved in its
    checkpoints. The [`EntropyTrainer`] that it is a callback of asks it after every step.

    Args:
        action (`"stop"` or `"rollback"`): Whether to stop the run, or to go back to the last good state.

    Attributes:
        slowdown (`float`): What the learning rate is multiplied by.
        batches (`int`): Number of steps that the running mean is of.
        mean_loss (`float`): Running mean of the loss per token.
        first_loss (`float`): Loss of the first step.
        good_loss (`float`): What it is held against: the lowest that it was.
        rollbacks (`int`): How often the run went back.
        events (`list[list]`): Steps at which something happened, and what it was.
        diverged (`str`, *optional*): Why the run was stopped.
    """

    follows_minimum = True

    def __init__(self, action: Action = "stop"):
        self.action = action
        self.slowdown = 1.0
        self.batches = 0
        self.mean_loss = 0.0
        self.first_loss = self.good_loss = 0.0
        self.rollbacks = 0
        self.events: list[list] = []
        self.diverged: str | None = None

    def state(self) -> dict:
        attributes = dict(vars(self))
        return {"args": {"action": attributes.pop("action")}, "attributes": attributes}

    def on_train_begin(self, args, state, control, **kwargs):
        """A run from its beginning does not go by what became of one before."""
        if state.global_step == 0:
            vars(self).update(vars(type(self)(**self.state()["args"])))

    def observe(self, loss: float) -> str | None:
        """Takes the loss of a step into the mean; why it can't be trusted, or `None` if it can."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        self.batches += 1
        self.mean_loss += self.share_of_step * (loss - self.mean_loss)
        if self.batches == 1:
            self.first_loss = loss
        if self.batches <= FIRST_BATCHES:  # what is usual is not known yet, but the first loss was not far from it
            self.good_loss = min(self.mean_loss, self.first_loss + LARGEST_RISE)
            return None
        if self.mean_loss > self.good_loss + LARGEST_RISE:
            return f"the loss is {self.mean_loss:.2f}, and was {self.good_loss:.2f}"
        if self.follows_minimum:
            self.good_loss = min(self.good_loss, self.mean_loss)
        return None

    @property
    def share_of_step(self) -> float:
        """Weight of the last step in running means."""
        return max(SMOOTHING, 1 / self.batches)

    def keep(self) -> dict[str, Any]:
        """Takes the present state as good; returns what belongs to it."""
        return {"batches": self.batches, "mean_loss": self.mean_loss, "good_loss": self.good_loss}

    def go_back(self, kept: dict[str, Any], state: TrainerState):
        """Back to a good state, slower."""
        self.rollbacks += 1
        self.batches, self.mean_loss, self.good_loss = kept["batches"], kept["mean_loss"], kept["good_loss"]
        self.slowdown *= SLOWDOWN


def find_first_bad_layer(model: nn.Module, inputs: dict[str, Any]) -> tuple[float, str]:
    """
    Where a forward pass first yields a value that is not finite; or, if it does nowhere, behind which block the
    residual stream is largest. Takes a forward pass.

    Args:
        model (`nn.Module`): An EntropyGPT of any head, wrapped or not.
        inputs (`dict`): A batch, as the model takes it.

    Returns:
        `tuple[float, str]`: The largest deviation of the residual stream, infinity if a value is not finite, and the
        place in words.
    """
    base = base_model(model)
    places = {base.wte: "the embeddings (wte)"}
    places |= {block: f"layer {index} (h.{index})" for index, block in enumerate(base.h)}
    places |= {base.ln_f: "the final norm (ln_f)"}
    found: list[tuple[str, float]] = []

    def note(module, arguments, output):
        hidden_states = output if torch.is_tensor(output) else output[0]
        found.append((places[module], hidden_states.float().std().item()))

    handles = [module.register_forward_hook(note) for module in places]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    if bad := [place for place, scale in found if not math.isfinite(scale)]:
        return math.inf, f"values that are not finite first appear in the output of {bad[0]}"
    place, scale = max((entry for entry in found if entry[0].startswith("layer")), key=lambda entry: entry[1])
    text = f"every layer is finite, and the residual stream is largest behind {place}: a deviation of {scale:.3g}"
    return scale, text


def base_model(model: nn.Module) -> EntropyGPTModel:
    """The blocks of a model, under whatever wraps it: heads, adapters, data parallelism."""
    return next(module for module in model.modules() if isinstance(module, EntropyGPTModel))
