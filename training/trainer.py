"""The HF Trainer with what this family's extra parameters need."""

import json
from pathlib import Path

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


# Scalars and vectors that weight decay would pull away from what they mean.
NOT_DECAYED = ("log_temperature", "entropy_threshold", "ffn_alpha", "ffn_beta", "gain", "negative_slope")


class EntropyTrainer(Trainer):
    """
    A `Trainer` without weight decay on temperatures, thresholds, residual scales and gains, as in the public code's
    recipe (arXiv 2501.03489). The loss, with its entropy penalty, is the model's own, so a plain `Trainer` works too.

    Raises:
        `ValueError`: If `label_smoothing_factor` or `compute_loss_func` is given for a model with
            `entropy_regularization`: both make the `Trainer` compute a loss of its own, without the penalty.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        loss_of_its_own = {
            "label_smoothing_factor": self.label_smoother,
            "compute_loss_func": self.compute_loss_func,
        }
        given = [name for name, value in loss_of_its_own.items() if value is not None]
        if given and getattr(self.model.config, "entropy_regularization", False):
            raise ValueError(
                f"With {given[0]} the Trainer computes a loss of its own, without the entropy penalty that "
                "entropy_regularization=True asks for: leave it out, or train a model without the penalty."
            )

    def get_decay_parameter_names(self, model) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(NOT_DECAYED)]


def last_checkpoint(folder: Path) -> Path | None:
    """
    The latest whole checkpoint in a Trainer's output folder, or `None` without one. A checkpoint is whole if the
    trainer's state, which is written last, can be read: a killed process may leave one that is not.
    """
    checkpoints = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.partition("-")[2]))
    return next((checkpoint for checkpoint in reversed(checkpoints) if _is_whole(checkpoint)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True
