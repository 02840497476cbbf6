"""What accompanies the steps of a training run: its duration, its memory, and its progress."""

import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState


try:
    import resource
except ImportError:  # on Windows
    resource = None


# What the trainer logs of speed and memory.
TOKENS_PER_SECOND, PEAK_MEMORY = "tokens_per_second", "peak_memory_mebibytes"

Callback = TypeVar("Callback", bound=TrainerCallback)


def find_callback(trainer: Trainer, kind: type[Callback]) -> Callback:
    """The present callback of a kind: a resumed run may have another than the one it was given."""
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind))


def peak_memory(device: torch.device) -> dict[str, float]:
    """
    The most memory that this process has had so far, in MiB, by its name in the log: of a GPU what tensors took, else
    of the processor. Empty where the system does not count it.
    """
    if device.type == "cuda":
        return {PEAK_MEMORY: torch.cuda.max_memory_allocated(device) / 2**20}
    if resource is None:
        return {}
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return {PEAK_MEMORY: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}


class Stopwatch(TrainerCallback, ExportableState):
    """
    Measures the seconds spent in training, and those of the processor in this process, over interruptions too: the
    time up to a checkpoint is kept in it. Needs `restore_callback_states_from_checkpoint=True` in the arguments.
    """

    def __init__(self):
        self.seconds_before, self.cpu_seconds_before = 0.0, 0.0
        self.started: tuple[float, float] | None = None
        self.stopped: tuple[float, float] | None = None

    @property
    def seconds(self) -> float:
        """Seconds in training so far."""
        return self.seconds_before + self._since_start()[0]

    @property
    def cpu_seconds(self) -> float:
        """Seconds of all cores together that this process has used in training so far."""
        return self.cpu_seconds_before + self._since_start()[1]

    def _since_start(self) -> tuple[float, float]:
        if self.started is None:
            return 0.0, 0.0
        now = self.stopped or _read_clocks()
        return now[0] - self.started[0], now[1] - self.started[1]

    def state(self) -> dict:
        return {"args": {}, "attributes": {"seconds_before": self.seconds, "cpu_seconds_before": self.cpu_seconds}}

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.stopped = _read_clocks(), None

    def on_train_end(self, args, state, control, **kwargs):
        self.stopped = _read_clocks()


def _read_clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


class StepObserver(TrainerCallback):
    """
    Hands the progress of training to whoever shows it.

    Args:
        on_step: Called with the number of finished steps and that of all, at the beginning and after each step.
        say: Called with the mean training loss and the tokens a second since the last call, in words, whenever the
            trainer logs them.
    """

    def __init__(self, on_step: Callable[[int, int], None], say: Callable[[str], None]):
        self.notify_step = on_step
        self.say = say

    def on_train_begin(self, args, state, control, **kwargs):
        self.notify_step(state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.notify_step(state.global_step, state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.say(f"loss {logs['loss']:.3f}, {logs[TOKENS_PER_SECOND]:,.0f} tokens/s")
