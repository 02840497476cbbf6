"""Entropies of every head while a model trains: measured on the same text each time, logged, and alarms in words."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from modeling_entropy_gpt.layers import LEARNED_SCALARS, LearnedScalar, gather

from .callbacks import PEAK_MEMORY, TOKENS_PER_SECOND
from .divergence import base_model
from .run_log import RunLogWriter


logger = logging.get_logger(__name__)

# A head with a mean entropy below the first part of the most that a causal mask allows has collapsed; one above the
# second spreads its attention all but evenly. A layer is worth an alarm if half of its heads do.
COLLAPSED, OVERLOADED = 0.05, 0.95
ALARMING_SHARE = 0.5
# What the trainer logs of its own speed.
SPEEDS = ("_runtime", "_per_second")


class EntropyCallback(TrainerCallback):
    """
    Writes down what the attention heads do, in a run's folder and for those who look on.

    Every `every` steps, at the beginning and at the end, a forward pass without dropout over the same tokens gives the
    mean row entropy of each head, the scalars that blocks learn ([`LEARNED_SCALARS`]; of temperatures the geometric
    mean over positions), and the standard deviation of the residual stream behind each block. They go to
    `training_log.jsonl`, together with all that the trainer logs, and, layer by layer, to TensorBoard and Weights &
    Biases where `report_to` names these.
    Layers in which half of the heads collapsed or are overloaded are reported, once the learning rate has warmed up.
    Works with any `Trainer`, and changes nothing about the training.

    Args:
        input_ids (`torch.Tensor` of shape `(batch, length)`): Tokens to measure on.
        every (`int`): Steps between measurements; 0 measures nothing.
        run (`dict`, *optional*): What else the log's first record is to say.
    """

    def __init__(self, input_ids: torch.Tensor, every: int = 50, run: dict | None = None):
        self.input_ids = input_ids
        self.every = every
        self.run = run or {}
        self._log: RunLogWriter | None = None
        self._board = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            self._log = RunLogWriter(Path(args.output_dir), self._describe(args, state, model), state.global_step)
            if "tensorboard" in args.report_to:
                from torch.utils.tensorboard import SummaryWriter

                resumed_after = state.global_step and state.global_step + 1
                self._board = SummaryWriter(Path(args.output_dir, "runs", "entropy"), purge_step=resumed_after)
        if self.every and state.global_step == 0:
            self._measure(args, state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        is_last = state.global_step == state.max_steps or control.should_training_stop
        if self.every and (is_last or state.global_step % self.every == 0):
            self._measure(args, state, model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._log is None or "train_runtime" in logs:
            return
        if "divergence" in logs:
            action = "stop" if control.should_training_stop else "rollback"
            self._log.write("divergence", state.global_step + 1, text=logs["divergence"], action=action)
            return
        # Apart, since a run that is repeated is as before but for its speed.
        speed = {name: logs[name] for name in (TOKENS_PER_SECOND, PEAK_MEMORY) if name in logs}
        others = {name: value for name, value in logs.items() if name not in speed and not name.endswith(SPEEDS)}
        self._log.write("log", state.global_step, **others)
        if speed:
            self._log.write("speed", state.global_step, **speed)

    def on_train_end(self, args, state, control, **kwargs):
        for writer in (self._log, self._board):
            if writer is not None:
                writer.close()
        self._log = self._board = None

    def _describe(self, args, state, model) -> dict:
        config = base_model(model).config
        sequences = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return {
            "notation": config.notation,
            "config": config.to_dict(),
            "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            "max_steps": state.max_steps,
            "tokens_per_step": sequences * self.input_ids.shape[1],
            "context": self.input_ids.shape[1],
            "seed": args.seed,
            **self.run,
        }

    def _measure(self, args, state, model):
        """On every rank: of a sharded model, each has a part."""
        record = measure_heads(model, self.input_ids.to(args.device))
        if self._log is None:
            return
        before = self._log.last.get("entropy")
        self._log.write("entropy", state.global_step, **record)
        self._show(record, args, state.global_step)
        if state.global_step < (warm_from := args.get_warmup_steps(state.max_steps)):
            return
        known = find_alarms(before) if before is not None and before["step"] >= warm_from else {}
        for (layer, kind), text in find_alarms(record).items():
            if (layer, kind) not in known:
                self._log.write("alarm", state.global_step, layer=layer, text=text)
                logger.warning(f"step {state.global_step}: {text}")

    def _show(self, record: dict, args, step: int):
        scalars = {f"entropy/{name}": value for name, value in layer_scalars(record).items()}
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
            self._board.add_histogram("entropy/all_heads", torch.tensor(record["entropies"]), step)
            self._board.flush()
        if "wandb" in args.report_to:
            import wandb

            wandb.log({**scalars, "train/global_step": step})


@torch.no_grad()
def measure_heads(model: nn.Module, input_ids: torch.Tensor) -> dict:
    """
    What the heads and scales of a model are like on a batch, in one forward pass without dropout.

    Args:
        model (`nn.Module`): An EntropyGPT of any head, wrapped or not.
        input_ids (`torch.Tensor` of shape `(batch, length)`): The batch.

    Returns:
        `dict`: `entropies` in nats, of shape `(layers, heads)`; `residual_scale`, of shape `(layers,)`; each of
            [`LEARNED_SCALARS`] by name, of one of these shapes, `None` where there are none. `maximum` is the mean of
            the largest entropies that a causal mask allows, `context_maximum` the logarithm of the length.
    """
    base = base_model(model)
    deviations: list[float] = []
    handles = [
        block.register_forward_hook(lambda _, __, output: deviations.append(output[0].float().std().item()))
        for block in base.h
    ]
    was_training = model.training
    model.eval()
    try:
        outputs = model(input_ids=input_ids, use_cache=False, output_entropies=True)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    keys = outputs.visible_keys.double()
    return {
        "entropies": [entropies.double().mean(dim=(0, 2)).tolist() for entropies in outputs.attention_entropies],
        "maximum": keys.log().mean().item(),
        "context_maximum": keys.max().log().item(),
        **{scalar.name: _values(scalar, base.h) for scalar in LEARNED_SCALARS},
        "residual_scale": deviations,
    }


def find_alarms(record: dict) -> dict[tuple[int, str], str]:
    """
    Layers in which half of the heads collapsed or are overloaded, in plain words.

    Args:
        record (`dict`): Result of [`measure_heads`].

    Returns:
        `dict`: For each layer and `"collapse"` or `"overload"`, what to say.
    """
    alarms = {}
    for layer, heads in enumerate(record["entropies"]):
        low = sum(value < COLLAPSED * record["maximum"] for value in heads)
        high = sum(value > OVERLOADED * record["maximum"] for value in heads)
        sides = {"collapse": (low, "below", COLLAPSED), "overload": (high, "above", OVERLOADED)}
        for kind, (count, side, limit) in sides.items():
            if count >= ALARMING_SHARE * len(heads):
                words = f"{count} of {len(heads)} heads {side} {limit * 100:.0f} % of the maximum entropy"
                alarms[layer, kind] = f"layer {layer}: {words} (entropy {kind})"
    return alarms


def layer_scalars(record: dict) -> dict[str, float]:
    """One number for each layer and quantity of a record, by name; of quantities of heads the mean."""
    scalars = {}
    for name in ("entropies", *(scalar.name for scalar in LEARNED_SCALARS), "residual_scale"):
        for layer, value in enumerate(record[name] or []):
            if value is not None:
                scalars[f"{name}/layer_{layer}"] = sum(value) / len(value) if isinstance(value, list) else value
    return scalars


def _values(scalar: LearnedScalar, blocks: Iterable[nn.Module]) -> list[float | list[float] | None] | None:
    """The numbers of every block, or of each of its heads; `None` for a block, or for all, without any."""
    found = [scalar.get(block) for block in blocks]
    if all(parameter is None for parameter in found):
        return None
    return [None if parameter is None else _numbers(scalar, gather(parameter).float().cpu()) for parameter in found]


def _numbers(scalar: LearnedScalar, values: torch.Tensor) -> float | list[float]:
    values = values.flatten(1).mean(dim=-1) if values.ndim > 1 else values
    values = values.exp() if scalar.is_logarithm else values
    return values.tolist() if scalar.by_head else values.item()
