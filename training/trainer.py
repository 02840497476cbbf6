"""The HF Trainer with what this family's extra parameters need."""

from transformers import Trainer


# Scalars and vectors that weight decay would pull away from what they mean.
NOT_DECAYED = ("log_temperature", "entropy_threshold", "ffn_alpha", "ffn_beta", "gain", "negative_slope")


class EntropyTrainer(Trainer):
    """
    A `Trainer` without weight decay on temperatures, thresholds, residual scales and gains, as in the public code's
    recipe (arXiv 2501.03489). The loss, with its entropy penalty, is the model's own, so a plain `Trainer` works too.
    """

    def get_decay_parameter_names(self, model) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(NOT_DECAYED)]
